"""The peers on a GPU compute what ours computes: masks, block lists, window conventions, global tokens."""

from dataclasses import replace

import pytest
import torch

from benchmarks import flex, peers
from benchmarks.cases import LongformerSelfAttention
from benchmarks.gpu_window import PREFIX, WindowCase
from kernels.window_attention import window_attention

SMALL = WindowCase("small", "", (), seq_len=300, head_dim=16, window=20, num_heads=2, num_kv_heads=2)
CASES = {
    "window": SMALL,
    "causal": replace(SMALL, causal=True),
    "dilated": replace(SMALL, dilation=3),
    "dilated-causal": replace(SMALL, dilation=4, causal=True),
    "globals": replace(SMALL, num_globals=5),
    "prefix-causal": replace(SMALL, num_globals=4, spread=PREFIX, causal=True),
    "wide": replace(SMALL, window=400),
    "whole-blocks": replace(SMALL, seq_len=512, window=200),
}
uncompiled = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def inputs(case, dtype=torch.float32, batch=1):
    generator = torch.Generator().manual_seed(0)
    heads = (case.num_heads, case.num_kv_heads, case.num_kv_heads)
    return [torch.randn(batch, case.seq_len, count, case.head_dim, generator=generator).to(dtype) for count in heads]


def ours(case, *qkv):
    index = case.global_index("cpu") if case.num_globals else None
    options = {"window": case.window, "dilation": case.dilation, "causal": case.causal}
    return window_attention(*qkv, **options, global_index=index, impl="reference")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_mask_of_flex_is_the_pattern(case):
    rows, keys = torch.arange(case.seq_len)[:, None], torch.arange(case.seq_len)
    expected = case.pattern.mask(case.seq_len)[0]
    expected[:, case.global_positions] = True
    expected &= (rows >= keys) | (not case.causal)
    assert torch.equal(flex.mask_mod(case, "cpu")(None, None, rows, keys), expected)


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("rows_at_once", ["all", "few"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_block_lists_are_those_of_torch(case, rows_at_once, block_size, monkeypatch):
    from torch.nn.attention.flex_attention import create_block_mask

    if rows_at_once == "few":
        monkeypatch.setattr(flex, "MASK_ELEMENTS", 1)
    seen = flex.mask_mod(case, "cpu")
    found = flex.block_mask(seen, case.seq_len, "cpu", block_size)
    expected = create_block_mask(seen, None, None, case.seq_len, case.seq_len, device="cpu", BLOCK_SIZE=block_size)
    assert found.seq_lengths == expected.seq_lengths and found.BLOCK_SIZE == expected.BLOCK_SIZE
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, numbers = (getattr(found, f"{name}_{what}") for what in ("num_blocks", "indices"))
        assert counts.dtype == numbers.dtype == torch.int32
        assert torch.equal(counts, getattr(expected, f"{name}_num_blocks"))
        listed = torch.arange(numbers.shape[-1]) < counts[..., None]
        assert torch.equal(numbers[listed], getattr(expected, f"{name}_indices")[listed])


@uncompiled
@pytest.mark.parametrize("name", ["globals", "dilated-causal", "whole-blocks"])
@pytest.mark.parametrize("num_kv_heads", [2, 1])
def test_flex_computes_the_case(name, num_kv_heads, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    case = replace(CASES[name], num_kv_heads=num_kv_heads)
    qkv = inputs(case, batch=2)
    index = None if not case.num_globals else case.global_index("cpu").expand(2, -1)
    options = {"window": case.window, "dilation": case.dilation, "causal": case.causal}
    expected = window_attention(*qkv, **options, global_index=index, impl="reference")
    torch.testing.assert_close(flex.of_case(case, "cpu")(*qkv), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_dense_peer_sees_everything(causal):
    case = replace(SMALL, window=300, causal=causal)
    qkv = inputs(case, torch.bfloat16)
    found = peers.dense_flash(causal, False, torch.bfloat16)(*qkv)
    torch.testing.assert_close(found, ours(case, *qkv), rtol=2e-2, atol=2e-2)


def varlen_by_hand(query, key, value, starts, starts_k, longest, longest_k, *, window_size=(-1, -1)):
    """varlen_attn's contract in the open: texts laid end to end, (left, right) keys inclusive, -1 for all."""
    assert starts.dtype == torch.int32 and torch.equal(starts, starts_k)
    assert longest == longest_k == starts.diff().max()
    out = []
    for first, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        distance = torch.arange(last - first) - torch.arange(last - first)[:, None]
        seen = (-distance <= window_size[0]) & (distance <= window_size[1])
        parts = (tensor[first:last].transpose(0, 1) for tensor in (query, key, value))
        out.append(torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=seen).transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("causal", [False, True])
def test_varlen_is_given_our_window(causal, monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_hand)
    case = replace(SMALL, causal=causal)
    qkv = inputs(case, batch=3)
    found = peers.flash_varlen(3, case.seq_len, case.window, causal, False, "cpu")(*qkv)
    torch.testing.assert_close(found, ours(case, *qkv))


def test_varlen_of_an_older_torch_is_named(monkeypatch):
    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        raise AssertionError

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", older)
    with pytest.raises(NotImplementedError, match="has no window_size"):
        peers.flash_varlen(1, 300, 20, False, False, "cpu")


@pytest.mark.parametrize("positions", [[0], [0, 3, 40, 41, 127]])
def test_longformer_with_globals_is_our_module(positions):
    """Output and the gradients of the input and every parameter; window 16 each side, two texts."""
    torch.manual_seed(0)
    mine = LongformerSelfAttention(32, 2, 16, capacity=len(positions)).double()
    theirs = peers.longformer_with_globals(32, 2, 16).double()
    theirs.attention.load_state_dict(mine.state_dict())
    x = torch.randn(2, 128, 32, dtype=torch.float64, requires_grad=True)
    is_global = torch.zeros(2, 128, dtype=torch.bool)
    is_global[:, positions] = True
    results = []
    for module, inner in ((mine, mine), (theirs, theirs.attention)):
        out = module(x, is_global)
        wanted = [x, *(parameter for _, parameter in sorted(inner.named_parameters()))]
        gradients = torch.autograd.grad(out, wanted, torch.ones_like(out).cumsum(1) / 128)
        results.append([out, *gradients])
    for found, expected in zip(*results, strict=True):
        # transformers takes the softmax in float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
