"""Dropout of window attention and of global rows: by position, the same on both paths, at the rate asked for."""

import pytest
import torch

from kernels.dropout import keep_mask
from kernels.window_attention import blocked, global_rows_attention, window_attention
from tests.kernels.global_cases import CASES, ROW_CASES, build, build_rows
from tests.kernels.test_window_runtime import KINDS, SIDES, kept_for_backward, largest_tensor
from tests.kernels.test_window_runtime import build as build_kind
from tests.kernels.window import IMPLEMENTATIONS, assert_same, make_inputs, run

PATHS = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
DROPOUT = {"dropout": 0.3, "dropout_seed": torch.tensor([2**40 + 7])}


@SIDES
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_blocked_is_the_oracle(case, causal):
    inputs, options = build(case, causal)
    blocked, oracle = (run(inputs, **options | DROPOUT, impl=impl) for impl in ("blocked", "reference"))
    assert_same(blocked, oracle)


@SIDES
@pytest.mark.parametrize("case", ROW_CASES.values(), ids=ROW_CASES)
def test_blocked_rows_are_the_oracle(case, causal):
    inputs, options = build_rows(case, causal)
    found = [run(inputs, global_rows_attention, **options | DROPOUT, impl=impl) for impl in ("blocked", "reference")]
    assert_same(*found)


@SIDES
@KINDS
def test_in_small_pieces_and_computed_again_it_is_the_same(monkeypatch, kind, causal):
    """Blocks, chunks and recomputation decide how, not what: nor do they for a relative term."""
    inputs, options = build_kind(kind, 300, causal, window=40, dtype=torch.float64)
    expected = run(inputs, **options | DROPOUT | {"impl": "reference"})
    assert_same(run(inputs, **options | DROPOUT), expected)
    monkeypatch.setattr(blocked, "KEEP_BYTES", 0)
    monkeypatch.setattr(blocked, "CHUNK_BYTES", 2**15)
    assert_same(run(inputs, **options | DROPOUT), expected)


def weights_of(function, query, keys, **options):
    """The weight [B, H, T, S] of every key, read off values that are unit vectors."""
    batch, num_keys, num_heads, _ = keys.shape
    units = torch.eye(num_keys, dtype=keys.dtype)[:, None].expand(batch, -1, num_heads, -1)
    pad = (0, num_keys - keys.shape[-1])
    query, keys = (torch.nn.functional.pad(tensor, pad) for tensor in (query, keys))
    return function(query, keys, units, scale=0.5, **options).transpose(1, 2)


@PATHS
def test_each_pair_is_dropped_by_where_it_stands(impl):
    """A probability is 0, or what it is without dropout divided by the share that stays, as the hash says."""
    tensors = make_inputs(40, key_len=60, num_heads=3)
    query, key = tensors["query"].detach(), tensors["key"].detach()
    options = {"window": [4, 9, 2], "dilation": [1, 3, 2], "query_start": 20, "impl": impl}
    options["global_index"] = torch.tensor([[0, 33, 59], [1, -1, 2]])
    plain, found = (weights_of(window_attention, query, key, **options, **drop) for drop in ({}, DROPOUT))
    heads = torch.arange(6).view(2, 3, 1, 1)
    rows, columns = torch.arange(20, 60)[:, None], torch.arange(60)
    kept = keep_mask(DROPOUT["dropout_seed"], heads, rows, columns, 0.3)
    torch.testing.assert_close(found, plain * kept / 0.7)
    index = torch.tensor([[0, 33, 59], [1, -1, 2]])
    options = {"global_index": index, "impl": impl}
    plain, found = (weights_of(global_rows_attention, query[:, :3], key, **options, **drop) for drop in ({}, DROPOUT))
    kept = keep_mask(DROPOUT["dropout_seed"], heads, index[:, None, :, None], columns, 0.3)
    torch.testing.assert_close(found, plain * kept / 0.7)


@PATHS
def test_the_share_that_stays_is_the_one_asked_for(impl):
    query = torch.zeros(2, 256, 2, 4, dtype=torch.float64)
    options = {"window": 20, "impl": impl, "dropout_seed": torch.tensor(3)}
    for dropout in (0.1, 0.5):
        weights = weights_of(window_attention, query, query, dropout=dropout, **options)
        pairs = weights_of(window_attention, query, query, **options) > 0
        share = (weights[pairs] > 0).double().mean().item()
        assert abs(share - (1 - dropout)) < 5 * (dropout * (1 - dropout) / pairs.sum().item()) ** 0.5


@PATHS
def test_a_seed_is_a_mask(impl):
    inputs, options = build(CASES["mixed_heads_long"], causal=False)
    options |= {"impl": impl}
    out = window_attention(**inputs, **options, **DROPOUT)
    assert torch.equal(out, window_attention(**inputs, **options, **DROPOUT))
    other = window_attention(**inputs, **options, **DROPOUT | {"dropout_seed": torch.tensor(8)})
    assert not torch.equal(out, other)
    # the first example by itself drops the same pairs
    alone = {name: tensor[:1] for name, tensor in inputs.items()}
    options |= {name: options[name][:1] for name in ("valid", "global_index")}
    torch.testing.assert_close(window_attention(**alone, **options, **DROPOUT), out[:1])


@SIDES
def test_memory_stays_linear(monkeypatch, causal):
    single, double = (largest_tensor("globals_masked", seq_len, causal, **DROPOUT) for seq_len in (8192, 16_384))
    assert double < 2.05 * single
    monkeypatch.setattr(blocked, "KEEP_BYTES", 0)
    args = (causal, 64, torch.float32)
    long, longer = (kept_for_backward("globals_masked", seq_len, *args, **DROPOUT) for seq_len in (4096, 8192))
    assert (longer - long) / (4096 * 2 * 4 * 4) < 8
