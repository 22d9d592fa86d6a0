"""Global keys and global rows by the Triton kernels in the interpreter, against the oracle, with every gradient."""

import pytest
import torch

from kernels.launch import num_splits
from kernels.window_attention import global_rows_attention, window_attention
from tests.kernels.global_cases import GLOBAL_SETS, make_global_index
from tests.kernels.window import assert_same, error, make_inputs, make_valid, run

pytestmark = pytest.mark.interpreter

# seq_len, key_len, query_start, heads, key heads, window, dilation, causal, valid
PLACES = {
    "text": (35, 35, 0, 2, 2, 4, [1, 3], False, "holes"),
    "causal_grouped": (35, 35, 0, 2, 1, [5, 0], [1, 2], True, "tail"),
    "cached": (6, 40, 34, 2, 2, 4, [1, 3], True, "none"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", GLOBAL_SETS)
def test_global_keys_are_the_oracle(kind, place):
    seq_len, key_len, query_start, num_heads, key_heads, window, dilation, causal, mask = PLACES[place]
    inputs = make_inputs(seq_len, num_heads=num_heads, key_heads=key_heads, key_len=key_len)
    options = {"window": window, "dilation": dilation, "causal": causal, "query_start": query_start}
    options |= {"valid": make_valid(mask, 2, key_len), "global_index": make_global_index(kind, 2, key_len)}
    assert_same(run(inputs, **options, impl="triton"), run(inputs, **options, impl="reference"))


def run_rows(inputs, **options):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    out = global_rows_attention(leaves["query"], leaves["key"], leaves["value"], **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(out, list(leaves.values()), weights.to(out.dtype), allow_unused=True)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("mask", ["holes", "one_all_masked"])
@pytest.mark.parametrize("kind", [kind for kind in GLOBAL_SETS if kind != "empty"])
def test_global_rows_are_the_oracle(kind, mask, causal):
    """70 keys are five tiles of the interpreter: cut into two parts."""
    index = make_global_index(kind, 2, 70)[:, :20]
    inputs = make_inputs(index.shape[1], num_heads=2, key_heads=1, key_len=70)
    options = {"global_index": index, "valid": make_valid(mask, 2, 70), "causal": causal}
    assert_same(run_rows(inputs, **options, impl="triton"), run_rows(inputs, **options, impl="reference"))


def test_more_rows_than_one_tile_holds():
    index = torch.arange(70).expand(1, 70)
    inputs = make_inputs(70, batch=1, num_heads=1, head_dim=20, key_len=70)
    options = {"global_index": index, "scale": -0.3}
    assert_same(run_rows(inputs, **options, impl="triton"), run_rows(inputs, **options, impl="reference"))


@pytest.mark.parametrize(
    ("length", "programs", "block"), [(1, 1, 16), (130, 4, 16), (131072, 12, 128), (4096, 999, 64)]
)
def test_parts_cover_all_keys_in_whole_tiles(length, programs, block):
    parts, chunk = num_splits(length, programs, block)
    assert chunk % block == 0 and (parts - 1) * chunk < length <= parts * chunk
    assert parts == 1 or parts * programs <= 528


def test_every_key_global_is_full_attention():
    inputs, index = make_inputs(30), torch.arange(29, -1, -1).expand(2, 30)
    full = run(inputs, window=30, impl="triton")
    assert_same(run(inputs, window=2, dilation=[1, 3], global_index=index, impl="triton"), full)


def test_order_and_pads_of_the_list_change_nothing():
    inputs = make_inputs(30)
    lists = ([[3, 20, 11], [7, -1, -1]], [[11, -1, 3, 20, 3], [-1, -1, 7, 99, 7]])
    first, second = (run(inputs, window=3, global_index=torch.tensor(list_), impl="triton") for list_ in lists)
    assert_same(first, second)


def test_a_list_of_pads_is_no_list():
    inputs = make_inputs(30)
    without = run(inputs, window=3, impl="triton")
    for name, tensor in run(inputs, window=3, global_index=torch.full((2, 4), -1), impl="triton").items():
        assert tensor.equal(without[name])


def test_mates_with_other_global_tokens_change_nothing():
    inputs, index = make_inputs(30), torch.tensor([[3, 20], [7, -1]])
    both = window_attention(**inputs, window=3, global_index=index, impl="triton")
    for member in range(2):
        alone = {name: tensor[member : member + 1] for name, tensor in inputs.items()}
        out = window_attention(**alone, window=3, global_index=index[member : member + 1], impl="triton")
        assert error(out.detach(), both[member : member + 1].detach()) == 0


@pytest.mark.parametrize("mask", ["tail", "isolated"])
def test_content_that_no_row_sees_is_irrelevant(mask):
    valid, index = make_valid(mask, 2, 40), torch.tensor([[3, 10, -1], [17, 0, 24]])
    inputs = make_inputs(3, key_len=40)
    spoilt = {name: tensor.detach() for name, tensor in inputs.items()}
    for name in ("key", "value"):
        spoilt[name] = spoilt[name].masked_fill(~valid[:, :, None, None], 1e4)
    seen = run_rows(inputs, global_index=index, valid=valid, impl="triton")
    for name, tensor in run_rows(spoilt, global_index=index, valid=valid, impl="triton").items():
        assert tensor.equal(seen[name]), name
