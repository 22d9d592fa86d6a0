"""What the door of block-sparse attention refuses and what it says, which path it takes, the dtype it computes in."""

import logging
import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels.block_sparse_attention
from kernels import dispatch
from kernels.block_sparse_attention import BlockPattern, api, block_sparse_attention
from tests.helpers import run_python
from tests.kernels.block_cases import CASES, build
from tests.kernels.window import make_inputs, run

T, H, D = 10, 4, 2
PATTERN = BlockPattern.bigbird(12, 2, H, 1)
SEED = torch.tensor([5])


def attend(shapes=None, **options):
    inputs = {name: tensor.detach() for name, tensor in make_inputs(T, num_heads=H, head_dim=D).items()}
    inputs |= {name: torch.zeros(shape, dtype=torch.float64) for name, shape in (shapes or {}).items()}
    return block_sparse_attention(**inputs, **{"pattern": PATTERN, **options})


@pytest.mark.parametrize("impl", ["auto", "blocked", "reference"])
@pytest.mark.parametrize(
    "shapes, options, message",
    [
        pytest.param({"query": (T, H, D)}, {}, r"must be \[B, T, H, D\], got \(10, 4, 2\)", id="query_3d"),
        pytest.param({"value": (2, T, H, 3)}, {}, r"share one shape: .*\(2, 10, 4, 3\)", id="value_dim"),
        pytest.param({"query": (3, T, H, D)}, {}, r"\(3, 10, 4, 2\) .* differ in batch", id="batch"),
        pytest.param({"query": (2, 8, H, D)}, {}, "query and key must be of one length, .*: 8, 10", id="key_len"),
        pytest.param(
            {"key": (2, T, 3, D), "value": (2, T, 3, D)}, {}, "4 query heads are no multiple of 3", id="key_heads"
        ),
        pytest.param({"valid": (2, T)}, {}, r"valid must be bool \[2, 10\], got torch.float64", id="valid_dtype"),
        pytest.param(
            {}, {"valid": torch.ones(2, 12, dtype=torch.bool)}, r"valid must be .*\(2, 12\)", id="valid_shape"
        ),
        pytest.param(
            {},
            {"pattern": BlockPattern.bigbird(12, 2, 3, 1)},
            r"query \(2, 10, 4, 2\) has 4 heads, the pattern has 3",
            id="pattern_heads",
        ),
        pytest.param(
            {},
            {"pattern": BlockPattern.bigbird(9, 2, H, 1)},
            "the sequence has 10 tokens, the pattern is made for at most 9",
            id="pattern_len",
        ),
        pytest.param(
            {},
            {"pattern": BlockPattern.bigbird(24, 2, H, 3, compat="tf")},
            "the sequence has 10 tokens, that is 5 blocks; this pattern, made with compat=, is made for 12 blocks of 2",
            id="pattern_fixed_len",
        ),
        pytest.param({}, {"pattern": None}, "pattern must be a BlockPattern, got NoneType", id="no_pattern"),
        pytest.param(
            {}, {"dropout": 0.1, "dropout_seed": 1}, "dropout_seed must be an int64 tensor .* got int", id="dropout_int"
        ),
        pytest.param({}, {"dropout": 1.0}, "dropout is 1.0, it must be at least 0 and below 1", id="dropout_1"),
        pytest.param({}, {"dropout": -0.1}, "dropout is -0.1, it must be at least 0", id="dropout_negative"),
        pytest.param({}, {"dropout": float("nan")}, "dropout is nan, it must be at least 0", id="dropout_nan"),
        pytest.param({}, {"dropout": 0.1}, "dropout is 0.1, it needs a dropout_seed: int64", id="dropout_seed"),
        pytest.param(
            {},
            {"dropout": 0.1, "dropout_seed": torch.tensor([1, 2])},
            r"dropout_seed must be int64 of one element, got torch.int64 \(2,\)",
            id="dropout_seed_shape",
        ),
        pytest.param(
            {},
            {"dropout": 0.1, "dropout_seed": torch.tensor([1.0])},
            "dropout_seed must be int64 of one element, got torch.float32",
            id="dropout_seed_dtype",
        ),
        pytest.param(
            {},
            {"dropout": 0.1, "dropout_seed": SEED.to("meta")},
            "dropout_seed is on meta, the other tensors are on cpu",
            id="dropout_seed_device",
        ),
    ],
)
def test_bad_arguments_are_named(shapes, options, message, impl):
    with pytest.raises(ValueError, match=message):
        attend(shapes, **options, impl=impl)


def test_an_unknown_path_is_named():
    with pytest.raises(ValueError, match="impl is 'flash', it must be one of auto, triton, blocked, reference"):
        attend(impl="flash")


def test_grouped_heads_are_named():
    with pytest.raises(NotImplementedError, match=r"grouped heads \(4 of query, 2 of key and value\)"):
        attend({"key": (2, T, 2, D), "value": (2, T, 2, D)})


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_mix_of_dtypes_is_refused(name):
    inputs = {each: tensor.detach() for each, tensor in make_inputs(T, num_heads=H).items()}
    inputs[name] = inputs[name].half()
    with pytest.raises(ValueError, match="query, key and value must share one dtype"):
        block_sparse_attention(**inputs, pattern=PATTERN)


@pytest.mark.parametrize("block_size", [8, 256])
def test_block_sizes_without_kernels(block_size):
    pattern = BlockPattern.bigbird(12, block_size, H, 1)
    message = f"impl='triton': the kernels take a block size of 16 to 128, not {block_size}"
    with pytest.raises(ValueError, match=message):
        attend(pattern=pattern, impl="triton")
    reason = api.why_not_triton(torch.device("cuda"), head_dim=64, block_size=block_size)
    assert reason == f"the kernels take a block size of 16 to 128, not {block_size}"


def test_without_triton_auto_is_blocked_and_triton_an_error():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from kernels.block_sparse_attention import BlockPattern, block_sparse_attention\n"
        "query, pattern = torch.randn(1, 40, 2, 4), BlockPattern.bigbird(40, 16, 2)\n"
        "def attend(impl): return block_sparse_attention(query, query, query, pattern, impl=impl)\n"
        "assert torch.equal(attend('auto'), attend('blocked')); attend('triton')"
    )
    done = run_python("-c", code)
    assert done.stderr.splitlines()[-1] == (
        "ValueError: block_sparse_attention: impl='triton': the package triton is not installed"
    )


@pytest.fixture
def paths_that_answer(monkeypatch):
    """Puts kernels in place that refuse with a reason, or where it is None answer "triton"; `blocked` answers too."""
    calls = {}

    def answering(name):
        def answer(*tensors, **options):
            calls[name] = options
            return name

        return types.SimpleNamespace(block_sparse_attention=answer)

    def put(reason):
        def why_not(device, *, head_dim, dtype, kernels):
            calls["asked"] = (device.type, head_dim, dtype, kernels)
            return reason

        monkeypatch.setattr(dispatch, "why_not_triton", why_not)
        return calls

    for name in ("ops", "blocked"):
        module = answering({"ops": "triton"}.get(name, name))
        monkeypatch.setattr(kernels.block_sparse_attention, name, module, raising=False)
        monkeypatch.setitem(sys.modules, f"kernels.block_sparse_attention.{name}", module)
        monkeypatch.setattr(api, name, module, raising=False)
    dispatch.say_once.cache_clear()
    return put


def test_the_paths_get_what_they_are_asked_for(paths_that_answer):
    calls = paths_that_answer(None)
    valid = torch.ones(2, T, dtype=torch.bool)
    wide = BlockPattern.bigbird(12, 16, H, 1)
    assert attend(pattern=wide, valid=valid, dropout=0.1, dropout_seed=SEED, impl="triton") == "triton"
    assert calls["asked"] == ("cpu", D, torch.float64, api.KERNELS)
    assert calls["triton"] == {
        "pattern": wide,
        "scale": D**-0.5,
        "valid": valid,
        "dropout": 0.1,
        "dropout_seed": SEED,
    }
    # a seed without dropout is not looked at
    assert attend(dropout_seed=SEED.to("meta"), scale=2.0, impl="blocked") == "blocked"
    assert calls["blocked"] == {"pattern": PATTERN, "scale": 2.0, "valid": None, "dropout": 0.0, "dropout_seed": None}


@pytest.mark.parametrize("reason", [None, "the moon is full"])
def test_on_a_gpu_auto_takes_the_kernels_where_they_can(paths_that_answer, caplog, reason):
    """Tensors that only say where they are: no GPU is needed."""
    paths_that_answer(reason)
    patterns = [BlockPattern.etc(40, block_size, H, 1) for block_size in (16, 8)]
    with FakeTensorMode(), caplog.at_level(logging.INFO, logger="kernels.dispatch"):
        query = torch.empty(2, 40, H, 32, device="cuda")
        taken = [block_sparse_attention(query, query, query, pattern) for pattern in patterns]
    assert taken == ["blocked" if reason else "triton", "blocked"]
    assert [record.message.split(":")[0] for record in caplog.records] == [
        f"block_sparse_attention runs on the {'blocked' if reason else 'triton'} path",
        "block_sparse_attention runs on the blocked path",
    ]
    assert (reason or "fastest") in caplog.text and "a block size of 16 to 128, not 8" in caplog.text


@pytest.mark.parametrize("impl", ["auto", "blocked", "reference"])
def test_under_autocast_all_is_cast_as_plain_attention_casts(impl):
    inputs, options = build(CASES["long_ragged"], dtype=torch.float32)
    inputs["key"] = inputs["key"].detach().half().requires_grad_()
    low = {name: tensor.detach().bfloat16() for name, tensor in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        result = run(inputs, block_sparse_attention, **options, impl=impl)
        expected = run(low, block_sparse_attention, **options, impl=impl)
    for name, dtype in {"out": torch.bfloat16, "query": torch.float32, "key": torch.half}.items():
        assert result[name].dtype == dtype
        assert torch.equal(result[name], expected[name].to(dtype))
    exact, options = build(CASES["long_ragged"])
    with torch.autocast("cpu", torch.bfloat16):
        assert block_sparse_attention(**exact, **options, impl=impl).dtype == torch.float64
