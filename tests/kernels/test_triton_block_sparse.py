"""The block-sparse kernels in the interpreter against the oracle: values and every gradient, at awkward shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import tile_table
from kernels.block_sparse_attention import BlockPattern, block_sparse_attention
from kernels.block_sparse_attention.tables import device_tables
from tests.kernels.block_cases import CASES, build, drawn_cases, make_block_valid, make_pattern
from tests.kernels.window import assert_same, error, in_double, make_inputs
from tests.kernels.window import run as run_function

pytestmark = pytest.mark.interpreter


def run(inputs, impl="triton", **options):
    return run_function(inputs, function=block_sparse_attention, impl=impl, **options)


def assert_kernels_are_the_oracle(inputs, options):
    assert_same(run(inputs, **options), run(inputs, **options, impl="reference"))


def one_head(case):
    """A case with a single head, as the interpreter takes milliseconds for each tile."""
    *shape, _, mask = CASES[case]
    return *shape, 1, mask


@pytest.mark.parametrize("case", CASES)
def test_kernels_are_the_oracle(case):
    assert_kernels_are_the_oracle(*build(one_head(case), block_size=16, head_dim=8))


@pytest.mark.parametrize("case", ["two_blocks", "six_blocks", "front_of_two", "counts_ragged"])
def test_dropout_is_that_of_the_oracle(case):
    """Heads and examples drop pairs of their own."""
    assert_kernels_are_the_oracle(*build(CASES[case], block_size=16, head_dim=8, dropout=0.3))


@pytest.mark.parametrize("block_size", [17, 24, 32, 33, 100, 128])
def test_blocks_of_many_tiles_and_of_parts_of_them(block_size):
    seq_len = (2 if block_size < 100 else 1) * block_size + 7
    pattern = make_pattern("bigbird", 4 * block_size, block_size, 1)
    inputs = make_inputs(seq_len, num_heads=1, head_dim=4)
    assert_kernels_are_the_oracle(inputs, {"pattern": pattern, "valid": make_block_valid("tail", 2, seq_len)})


@pytest.mark.parametrize("rows, columns", [(32, 16), (16, 32), (64, 64)])
def test_tiles_of_every_shape(rows, columns):
    """Tiles that are no taller than needed for blocks of 48, and one that is taller than the block."""
    tiles = {"BLOCK_M": rows, "BLOCK_N": columns}
    inputs, options = build(("many_random", 5, 9, 5, 1, "ragged"), block_size=48, head_dim=4, dropout=0.2)
    expected = run(inputs, **options, impl="reference")
    with (
        tile_table.trial("block_forward", tiles),
        tile_table.trial("block_query_grad", tiles),
        tile_table.trial("block_key_grad", tiles),
    ):
        assert_same(run(inputs, **options), expected)


@pytest.mark.parametrize("head_dim", [1, 20, 96, 256])
def test_every_head_dim(head_dim):
    assert_kernels_are_the_oracle(*build(("bigbird", 3, 5, 3, 1, "tail"), block_size=16, head_dim=head_dim))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["six_blocks", "counts"])
def test_error_is_that_of_plain_attention_in_the_same_dtype(case, dtype):
    """1e-5 relative in float32; in half precision twice the error that the oracle makes there."""
    inputs, options = build(one_head(case), block_size=16, head_dim=20, dtype=dtype)
    exact = run(in_double(inputs), **options, impl="reference")
    plain = run(inputs, **options, impl="reference")
    kernels = run(inputs, **options)
    for name, truth in exact.items():
        assert kernels[name].dtype == dtype
        assert error(kernels[name], truth) <= max(1e-5, 2 * error(plain[name], truth)), name


@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_case_is_the_oracle(data):
    *shape, _, mask = data.draw(drawn_cases(most_blocks=8))
    block_size, seed = data.draw(st.sampled_from([16, 16, 20])), data.draw(st.integers(0, 9))
    assert_kernels_are_the_oracle(*build((*shape, 1, mask), block_size, 4, seed=seed))


@pytest.mark.parametrize("scale", [0.7, 0.0, -0.7])
def test_any_scale(scale):
    inputs, options = build(("bigbird", 3, 5, 3, 1, "none"), block_size=16, head_dim=4)
    assert_kernels_are_the_oracle(inputs, {**options, "scale": scale})


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_block_that_counts_many_times(dropout):
    """Its weight is the count's share, however often; blocks of so many entries are cut into parts."""
    counts = torch.tensor([[60, 1, 0], [0, 0, 3], [1, 100, 1]])
    pattern = BlockPattern.from_mask(counts, 16, num_heads=1)
    options = {"pattern": pattern, "dropout": dropout, "dropout_seed": torch.tensor([5])}
    assert device_tables(pattern, torch.device("cpu")).row_parts.shape[2] > 0
    assert_kernels_are_the_oracle(make_inputs(45, batch=1, num_heads=1, head_dim=4), options)
