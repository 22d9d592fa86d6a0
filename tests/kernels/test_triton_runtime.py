"""The kernels as operators of PyTorch, in the interpreter: compile, checkpointing, autocast, and what they refuse."""

import itertools
import json

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from kernels import dispatch, tile_table
from kernels.launch import device_lacks
from kernels.window_attention import api, global_rows_attention, ops, why_not_triton, window_attention
from tests.helpers import run_python
from tests.kernels.window import make_inputs, run
from tests.models.tiny import loss_and_gradients, text, tiny_model

pytestmark = pytest.mark.interpreter
INDEX = torch.tensor([[3, -1, 5, 3]])


def small_inputs(dtype=torch.float32):
    return make_inputs(20, batch=1, head_dim=16, dtype=dtype)


def test_operators_keep_their_word():
    """Schema, fake results, gradients and dynamic shapes as torch checks them."""
    query, key, value = small_inputs().values()
    valid = torch.arange(20)[None] < 18
    table = ops._global_table(INDEX, valid, 20)
    opcheck(ops._global_table, (INDEX, valid, 20))
    opcheck(ops._window_forward, (query, key, value, None, None, None, [3, 4], [1, 2], True, 0.25, 0))
    opcheck(ops._window_forward, (query, key, value, valid, *table, [3, 4], [1, 2], False, 0.25, 0))
    rows = query[:, :4].detach().requires_grad_()
    opcheck(ops._global_rows_forward, (rows, key, value, INDEX, valid, 0.25, False))


@pytest.mark.parametrize("dynamic", [True, False])
def test_compiled_in_one_graph_it_is_the_same(dynamic):
    def attend(query, key, value):
        local = window_attention(query * 1.0, key, value, window=3, dilation=[1, 2], global_index=INDEX, impl="triton")
        rows = global_rows_attention(query[:, : INDEX.shape[1]], key, value, global_index=INDEX, impl="triton")
        return local.sum() + rows.square().sum()

    inputs = list(small_inputs().values())
    expected = torch.autograd.grad(attend(*inputs), inputs)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for ours, theirs in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


class Attention(torch.nn.Module):
    """A window no other test has, so that its tables are not there yet, and global rows."""

    def __init__(self):
        super().__init__()
        self.register_buffer("index", INDEX)

    def forward(self, query, key, value):
        local = window_attention(
            query, key, value, window=[7, 5], dilation=[1, 3], global_index=self.index, impl="triton"
        )
        rows = global_rows_attention(
            query[:, : self.index.shape[1]], key, value, global_index=self.index, impl="triton"
        )
        return local, rows


@pytest.mark.filterwarnings("ignore")  # of the compiler itself
@pytest.mark.parametrize("strict", [False, True])
def test_exported_it_is_the_same_at_other_lengths(strict):
    length, inputs = torch.export.Dim("length", min=5), tuple(small_inputs().values())
    program = torch.export.export(Attention(), inputs, dynamic_shapes=({1: length},) * 3, strict=strict).module()
    for seq_len in (20, 33):
        inputs = tuple(make_inputs(seq_len, batch=1, head_dim=16, dtype=torch.float32).values())
        for ours, theirs in zip(program(*inputs), Attention()(*inputs), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_whole_model_compiles_without_a_break():
    options = {"window": [3, 5, [2, 6, 2, 0]], "dilation": [1, 2, [1, 2, 3, 1]]}
    ids, model = text(24), tiny_model(**options, impl="triton")
    blocked_loss, blocked = loss_and_gradients(tiny_model(**options, impl="blocked"), ids)
    for module in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        loss, gradients = loss_and_gradients(module, ids)
        torch.testing.assert_close(loss, blocked_loss)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, blocked[name.removeprefix("_orig_mod.")])


def test_checkpointed_it_is_the_same():
    inputs = list(small_inputs().values())

    def attend(*qkv):
        return window_attention(*qkv, window=4, impl="triton")

    expected = torch.autograd.grad(attend(*inputs).sum(), inputs)
    again = torch.autograd.grad(checkpoint(attend, *inputs, use_reentrant=False).sum(), inputs)
    assert all(ours.equal(theirs) for ours, theirs in zip(again, expected, strict=True))


def test_autocast_computes_in_its_dtype():
    inputs = small_inputs()
    with torch.autocast("cpu", torch.float16):
        out = window_attention(**inputs, window=4, impl="triton")
    assert out.dtype == torch.float16
    out.float().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.dtype == torch.float32 for tensor in inputs.values())


@pytest.mark.distributed
def test_wrapped_for_several_processes_it_is_the_same(tmp_path):
    ids, options = text(24), {"window": 4, "dilation": [1, 2, 3], "impl": "triton"}
    expected_loss, expected = loss_and_gradients(tiny_model(**options), ids)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(tiny_model(**options))
        loss, gradients = loss_and_gradients(wrapped, ids)
        # the last to hold the group would wait, with the interpreter's lock, for threads of it that need that lock
        del wrapped.reducer, wrapped.logger, wrapped.process_group
    finally:
        torch.distributed.destroy_process_group()
    assert loss.equal(expected_loss)
    assert all(gradients[f"module.{name}"].equal(gradient) for name, gradient in expected.items())


def test_twice_differentiated_it_refuses():
    query, key, value = small_inputs().values()
    out = window_attention(query, key, value, window=4, impl="triton")
    (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


def test_automatic_choice_on_a_cpu_stays_with_plain_pytorch():
    inputs = small_inputs()
    automatic, blocked = (run(inputs, window=4, impl=impl) for impl in ("auto", "blocked"))
    assert all(automatic[name].equal(blocked[name]) for name in blocked)


class TestRefusals:
    def test_wide_heads(self):
        inputs = make_inputs(4, head_dim=257, dtype=torch.float32)
        with pytest.raises(ValueError, match="head dim of at most 256, not 257"):
            window_attention(**inputs, window=1, impl="triton")

    def test_relative_positions(self):
        inputs = make_inputs(8, columns=4, dtype=torch.float32)
        with pytest.raises(NotImplementedError, match="impl='triton' has no position_query and position_key"):
            window_attention(**inputs, window=3, causal=True, impl="triton")

    def test_mixed_dtypes(self):
        query, key, value = small_inputs().values()
        with pytest.raises(ValueError, match="float16"):
            window_attention(query, key.half(), value, window=3, impl="triton")

    def test_integers(self):
        assert "not torch.int64" in str(why_not_triton(torch.device("cpu"), head_dim=16, dtype=torch.int64))

    def test_cpu_tensors_outside_the_interpreter(self, monkeypatch):
        monkeypatch.setattr(dispatch, "INTERPRETED", False)
        with pytest.raises(ValueError, match="run on CUDA, the tensors are on the CPU: .*TRITON_INTERPRET=1"):
            window_attention(**small_inputs(), window=3, impl="triton")

    @pytest.mark.parametrize(
        ("major", "shared", "reason"),
        [
            (7, 65536, "need compute capability 8.0, Tiny has 7.5"),
            (8, 1000, r"of shared memory for heads of 64 channels, Tiny has 1,000"),
        ],
    )
    def test_devices_that_are_too_small(self, monkeypatch, major, shared, reason):
        class Tiny:
            name, minor, shared_memory_per_block_optin = "Tiny", 5, shared

        Tiny.major = major
        monkeypatch.setattr(tile_table, "needed_shared_memory", lambda *place: 2000)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Tiny)
        assert reason in device_lacks("cuda:0", 2, 64, api.KERNELS)


@pytest.mark.parametrize("modern", [False, True])
def test_float32_products_are_rounded_as_torch_is_set(modern):
    """By the old interface or the new one, which torch does not let a program mix."""
    old, new = "torch.set_float32_matmul_precision({!r})", "torch.backends.cuda.matmul.fp32_precision = {!r}"
    choose = new if modern else old
    fast, exact = ("tf32", "ieee") if modern else ("high", "highest")
    code = (
        "import torch; from kernels.launch import precision\n"
        "print(precision(torch.float32))\n"
        f"{choose.format(fast)}; print(precision(torch.float32), precision(torch.bfloat16))\n"
        f"{choose.format(exact)}; print(precision(torch.float32))"
    )
    done = run_python("-c", code)
    assert done.stdout.split() == ["ieee", "tf32", "ieee", "ieee"], done.stderr


class TestTileTable:
    KERNELS = sorted({row["kernel"] for row in tile_table.rows()})

    @pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
    @pytest.mark.parametrize("element_size", [2, 4])
    def test_every_head_dim_has_a_row(self, arch, element_size):
        for kernel in self.KERNELS:
            for head_dim in (1, 16, 20, 40, 64, 80, 96, 128, 200, 256):
                for num_seen in (1, 641, 10**6):
                    tile = tile_table.choose(
                        kernel, arch=arch, element_size=element_size, head_dim=head_dim, num_seen=num_seen
                    )
                    assert tile["BLOCK_D"] >= head_dim and min(tile["BLOCK_M"], tile["BLOCK_N"]) >= 16
                    assert ("SPLIT" in tile) == (kernel in tile_table.WINDOW_KERNELS)

    @pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
    @pytest.mark.parametrize("element_size", [2, 4])
    def test_what_is_taken_fits_the_device(self, arch, element_size):
        """A device newer than a row may have less shared memory: then an older row is taken."""
        with tile_table.target(arch):
            limit = tile_table.shared_limit(torch.device("meta"))
        place = {"arch": arch, "element_size": element_size, "num_seen": 10**6}
        for kernel, head_dim in itertools.product(self.KERNELS, tile_table.BLOCK_DIMS):
            if tile_table.needed_shared_memory(arch, element_size, head_dim, (kernel,)) > limit:
                assert (element_size, head_dim) == (2, 256) and kernel not in api.KERNELS  # refused by `device_lacks`
                continue
            taken = tile_table.choose(kernel, head_dim=head_dim, limit=limit, **place)
            names = [name for name in tile_table.OPTIONS if name in taken]
            sizes = [
                row["shared_bytes"]
                for row in tile_table.rows()
                if (row["kernel"], row["element_size"], row["block_d"]) == (kernel, element_size, head_dim)
                and [row[name] for name in names] == [taken[name] for name in names]
            ]
            assert min(sizes) <= limit
            with pytest.raises(ValueError, match="no tile sizes"):
                tile_table.choose(kernel, head_dim=head_dim, limit=1, **place)
        assert tile_table.needed_shared_memory(arch, element_size, 256, api.KERNELS) <= limit

    def test_older_architectures_have_none(self):
        with pytest.raises(ValueError, match="no tile sizes of window_forward for sm_75"):
            tile_table.choose("window_forward", arch="sm_75", element_size=2, head_dim=64, num_seen=9)

    def test_shared_memory_is_known_of_every_row(self):
        assert all(0 < row["shared_bytes"] <= 232448 for row in tile_table.rows())
        assert 0 < tile_table.needed_shared_memory("sm_80", 2, 64, api.KERNELS) <= 166912

    def test_rows_are_in_order(self):
        """The first row that fits is taken: newest architecture first, narrow windows before wide ones."""
        rows = json.loads(tile_table.FILE.read_text())
        keys = [(row["kernel"], row["element_size"], row["block_d"]) for row in rows]
        for key in set(keys):
            same = [row for row, other in zip(rows, keys, strict=True) if other == key]
            order = [(-int(row["arch"][3:]), row["max_seen"] or 10**9) for row in same]
            assert order == sorted(order) and len(set(order)) == len(order)
            assert {row["max_seen"] for row in same if row["arch"] == "sm_80"} >= {None}

    def test_the_enclosing_target_decides(self):
        with tile_table.target("sm_80"):
            assert tile_table.architecture(torch.device("meta")) == "sm_80"
        assert tile_table.architecture(torch.device("cpu")) == "interpreter"
