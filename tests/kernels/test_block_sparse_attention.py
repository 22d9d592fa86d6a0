"""The oracle of block-sparse attention against loops, and laws that need no second implementation."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from kernels.block_sparse_attention import BlockPattern, block_sparse_attention
from tests.helpers import ROOT
from tests.kernels.block_cases import (
    BLOCK_MASKS,
    CASES,
    FIXED_LENGTH,
    KINDS,
    build,
    by_loops,
    drawn_cases,
    make_block_valid,
    make_pattern,
    random_counts,
)
from tests.kernels.window import assert_same, error, make_inputs, run

IMPLEMENTATIONS = ("reference", "blocked")
PATHS = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def attend(inputs, **options):
    return block_sparse_attention(**inputs, **options).detach()


def against_loops(case, **sizes):
    inputs, options = build(case, **sizes)
    expected = by_loops(**inputs, **options)
    assert error(attend(inputs, **options, impl="reference"), expected.detach()) <= 1e-12


@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["plain", "dropout"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_oracle_is_the_definition(case, dropout):
    against_loops(case, block_size=3, head_dim=2, dropout=dropout)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(drawn_cases(most_blocks=11))
def test_the_oracle_is_the_definition_on_drawn_cases(case):
    against_loops(case, block_size=2, head_dim=2)


@PATHS
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["plain", "dropout"])
@pytest.mark.parametrize("name", ["five_blocks", "counts_ragged", "hf_eval", "nothing"])
def test_gradients_are_derivatives(impl, name, dropout):
    inputs, options = build(CASES[name], block_size=2, head_dim=2, dropout=dropout)
    tensors = tuple(tensor.detach()[:, :9].clone().requires_grad_() for tensor in inputs.values())
    if options["valid"] is not None:
        options["valid"] = options["valid"][:, :9]
    if name == "hf_eval":  # one length alone
        tensors = tuple(inputs.values())
        options["valid"] = make_block_valid("ragged", 2, tensors[0].shape[1])

    def function(*tensors):
        return block_sparse_attention(*tensors, **options, impl=impl)

    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@PATHS
@pytest.mark.parametrize("seq_len", [1, 5, 12, 33])
@pytest.mark.parametrize("mask", BLOCK_MASKS)
def test_all_blocks_are_dense_attention(impl, seq_len, mask):
    inputs = make_inputs(seq_len)
    valid = make_block_valid(mask, 2, seq_len)
    query, key, value = (tensor.detach().transpose(1, 2) for tensor in inputs.values())
    dense = F.scaled_dot_product_attention(
        query, key, value, attn_mask=None if valid is None else valid[:, None, None, :]
    ).transpose(1, 2)
    if valid is not None:
        dense = dense.masked_fill(~valid[:, :, None, None], 0.0)
    everything = BlockPattern.from_function(lambda row, column: True, 40, 4, 2)
    all_global = BlockPattern.etc(36, 4, 2, num_global_blocks=9)
    wide = BlockPattern.uniform(36, 4, 2, 0, window=19, front=0, back=0)
    short = BlockPattern.bigbird(36, 4, 2, 2, full_when_short=True)
    for pattern in (everything, all_global, wide, short):
        assert error(attend(inputs, pattern=pattern, valid=valid, impl=impl), dense) <= 1e-12


@PATHS
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in FIXED_LENGTH])
def test_members_of_a_batch_are_independent(impl, kind):
    """Each alone, cut behind its last valid token, is what it is beside longer ones."""
    pattern = make_pattern(kind, 60, 4, 2)
    inputs = make_inputs(51, batch=5)
    valid = torch.rand(5, 51) > 0.2
    lengths = [0, 3, 17, 36, 51]
    for row, length in enumerate(lengths):
        valid[row, length:] = False
        valid[row, max(length - 1, 0)] = length > 0
    together = attend(inputs, pattern=pattern, valid=valid, impl=impl)
    for row, length in enumerate(lengths):
        alone = {name: tensor[row : row + 1, :length] for name, tensor in inputs.items()}
        out = attend(alone, pattern=pattern, valid=valid[row : row + 1, :length], impl=impl)
        assert error(together[row : row + 1, :length], out) <= 1e-12
        assert (together[row, length:] == 0).all()


@PATHS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [mask for mask in BLOCK_MASKS if mask != "none"])
def test_the_content_of_padding_is_irrelevant(impl, kind, mask):
    inputs = make_inputs(47)
    valid = make_block_valid(mask, 2, 47)
    options = {"pattern": make_pattern(kind, 47, 4, 2), "valid": valid, "impl": impl}
    other = {name: tensor.detach().clone() for name, tensor in inputs.items()}
    for tensor in other.values():
        tensor[~valid] = 100 * torch.randn_like(tensor[~valid])
    result = run(inputs, block_sparse_attention, **options)
    assert_same(run(other, block_sparse_attention, **options), result)
    assert all((tensor[~valid] == 0).all() for tensor in result.values())


@PATHS
@pytest.mark.parametrize("mask", ["none", "ragged"])
def test_heads_move_with_their_lists(impl, mask):
    counts, order = random_counts(4, 9), [2, 0, 3, 1]
    inputs = make_inputs(35, num_heads=4)
    options = {"valid": make_block_valid(mask, 2, 35), "impl": impl}
    out = attend(inputs, pattern=BlockPattern.from_mask(counts, 4), **options)
    moved = {name: tensor[:, :, order] for name, tensor in inputs.items()}
    out_moved = attend(moved, pattern=BlockPattern.from_mask(counts[order], 4), **options)
    assert error(out_moved, out[:, :, order]) <= 1e-12


@PATHS
def test_a_block_of_multiplicity_2_weighs_as_two_copies_of_its_keys(impl):
    inputs = make_inputs(12)
    counts = torch.tensor([[1, 2, 0], [3, 0, 1], [1, 1, 1]])
    out = attend(inputs, pattern=BlockPattern.from_mask(counts, 4, num_heads=2), impl=impl)
    for row in range(3):
        tokens = [j for block in range(3) for _ in range(counts[row, block]) for j in range(4 * block, 4 * block + 4)]
        query = inputs["query"][:, 4 * row : 4 * row + 4]
        copies = (query, inputs["key"][:, tokens], inputs["value"][:, tokens])
        dense = F.scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in copies)).transpose(1, 2)
        assert error(out[:, 4 * row : 4 * row + 4], dense.detach()) <= 1e-12


@PATHS
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_a_row_add_up_to_one(impl, kind):
    inputs = make_inputs(47)
    inputs["value"] = torch.ones_like(inputs["value"])
    pattern = make_pattern(kind, 47, 4, 2)
    out = attend(inputs, pattern=pattern, impl=impl)
    some = (pattern.counts(12).sum(dim=2) > 0).repeat_interleave(4, dim=1)[:, :47]  # [H, T]
    assert error(out, some.T[None, :, :, None].expand_as(out).double()) <= 1e-14


@PATHS
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_valid_gives_zeros_everywhere(impl, kind):
    inputs = make_inputs(47, dtype=torch.float32)
    options = {"pattern": make_pattern(kind, 47, 4, 2), "valid": torch.zeros(2, 47, dtype=torch.bool), "impl": impl}
    assert all((tensor == 0).all() for tensor in run(inputs, block_sparse_attention, **options).values())


@PATHS
def test_scale_multiplies_the_scores(impl):
    inputs, options = build(CASES["long_ragged"])
    scaled = inputs | {"query": 0.3 * inputs["query"]}
    out = attend(inputs, **options, scale=0.3, impl=impl)
    assert error(out, attend(scaled, **options, scale=1.0, impl=impl)) <= 1e-12
    default = attend(inputs, **options, impl=impl)
    assert error(default, attend(inputs, **options, scale=3**-0.5, impl=impl)) <= 1e-15


@PATHS
def test_dropout_drops_pairs_by_their_position(impl):
    """The same seed gives the same bits, another one others; a pair goes with all its repetitions."""
    inputs, options = build(CASES["counts"], dropout=0.5)
    out = attend(inputs, **options, impl=impl)
    assert torch.equal(out, attend(inputs, **options, impl=impl))
    assert not torch.equal(out, attend(inputs, **options | {"dropout_seed": torch.tensor(8)}, impl=impl))
    # one key a row: what is left of its weight is 0 or 1 / (1 - dropout), however often it is visited
    alone = BlockPattern.from_function(lambda row, column: 5 * (row == column), 32, 1, 2)
    ones = {name: torch.ones(3, 32, 2, 4, dtype=torch.float64) for name in inputs}
    weights = attend(ones, pattern=alone, dropout=0.2, dropout_seed=torch.tensor(1), impl=impl)
    assert torch.isclose(weights, torch.tensor(1.25).double()).logical_or(weights == 0).all()
    assert 0.6 < (weights > 0).double().mean() < 0.95


@PATHS
def test_an_empty_text_gives_an_empty_result(impl):
    pattern = make_pattern("bigbird", 40, 4, 2)
    assert block_sparse_attention(**make_inputs(0), pattern=pattern, impl=impl).shape == (2, 0, 2, 4)
    assert block_sparse_attention(**make_inputs(9, batch=0), pattern=pattern, impl=impl).shape == (0, 9, 2, 4)


def test_the_example_of_the_documentation_runs():
    text = (ROOT / "docs" / "kernels_block_sparse.md").read_text(encoding="utf-8")
    names = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert names["out"].shape == (2, 3000, 4, 64)
    expected = [[abs(row - column) <= 1 or column % 8 == 7 for column in range(64)] for row in range(64)]
    assert (names["pattern"].counts(64)[0] > 0).tolist() == expected
