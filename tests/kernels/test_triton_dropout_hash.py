"""The position hash of dropout in Triton: the bits of its PyTorch twin, whatever the tiles and their orientation."""

import pytest
import torch
import triton
import triton.language as tl

from kernels.dropout import keep_mask, threshold
from kernels.tiles import keep_mask as keep_tile

pytestmark = pytest.mark.interpreter
NUM_ROWS, NUM_COLUMNS = 37, 50


@triton.jit
def _store_mask(
    out_ptr, seed_ptr, batch_head, first_row, first_column, num_rows, num_columns, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    rows = first_row + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = first_column + tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if TRANSPOSED:
        rows, columns = rows[None, :], columns[:, None]
    else:
        rows, columns = rows[:, None], columns[None, :]
    keep = keep_tile(tl.load(seed_ptr), batch_head, rows, columns, threshold)
    inside = (rows < first_row + num_rows) & (columns < first_column + num_columns)
    place = out_ptr + (rows - first_row) * num_columns + (columns - first_column)
    tl.store(place, keep.to(tl.int8), mask=inside)


def by_triton(seed, batch_head, first_row, first_column, dropout, block_m, block_n, transposed):
    """The mask [NUM_ROWS, NUM_COLUMNS] from (first_row, first_column) on, a tile a program."""
    out = torch.full((NUM_ROWS, NUM_COLUMNS), -1, dtype=torch.int8)
    _store_mask[(triton.cdiv(NUM_ROWS, block_m), triton.cdiv(NUM_COLUMNS, block_n))](
        out, torch.tensor([seed]), batch_head, first_row, first_column, NUM_ROWS, NUM_COLUMNS, threshold(dropout),
        BLOCK_M=block_m, BLOCK_N=block_n, TRANSPOSED=transposed,
    )  # fmt: skip
    assert (out >= 0).all()
    return out.bool()


@pytest.mark.parametrize("block_m, block_n, transposed", [(16, 16, False), (32, 8, False), (8, 64, True)])
@pytest.mark.parametrize(
    "seed, batch_head, first_row, first_column, dropout",
    [
        (0, 0, 0, 0, 0.5),
        (1, 7, 100, 3, 0.1),
        (2**31 + 5, 2**20 + 1, 65536, 131000, 0.3),
        (2**63 - 1, 3, 2**31 - 100, 2**31 - 100, 0.9),
        (-(2**63), 11, 5, 0, 0.0),
        (-2, 2**31 - 1, 1, 1, 0.999999999),
    ],
)
def test_bits_are_those_of_pytorch(seed, batch_head, first_row, first_column, dropout, block_m, block_n, transposed):
    rows = torch.arange(first_row, first_row + NUM_ROWS)[:, None]
    columns = torch.arange(first_column, first_column + NUM_COLUMNS)
    expected = keep_mask(torch.tensor([seed]), batch_head, rows, columns, dropout)
    found = by_triton(seed, batch_head, first_row, first_column, dropout, block_m, block_n, transposed)
    assert torch.equal(found, expected)
