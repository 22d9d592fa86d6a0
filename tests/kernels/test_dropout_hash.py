"""The position hash of dropout: the wanted rate along every line of the matrix, nothing shared by any two of them."""

import pytest
import torch

from kernels.dropout import keep_mask, threshold

SIZE = 1024
DROPOUT = 0.1


def mask(seed=0, batch_head: int | torch.Tensor = 0, *, rows=(0, SIZE), columns=(0, SIZE), dropout=DROPOUT):
    """Entries of a stretch of rows and one of columns: bool [rows, columns]."""
    rows, columns = torch.arange(*rows)[:, None], torch.arange(*columns)
    return keep_mask(torch.tensor([seed]), batch_head, rows, columns, dropout)


def standardised(keep, dropout=DROPOUT):
    """Entries as float64 of mean 0 and variance 1, if they are kept with the wanted probability."""
    return (keep.double() - (1 - dropout)) / (dropout * (1 - dropout)) ** 0.5


def assert_normal(deviations):
    """Sums over their standard deviation: about 1 in size on average, none unheard of among so many."""
    deviations = deviations.flatten()
    spread = deviations.square().mean().item()
    assert abs(spread - 1) < 5 * (2 / len(deviations)) ** 0.5
    assert deviations.abs().max() < 6


@pytest.mark.parametrize("dropout", [0.01, 0.1, 0.5, 0.9])
def test_rate_of_all_entries(dropout):
    assert standardised(mask(dropout=dropout), dropout).sum().abs() < 5 * SIZE


def test_rates_at_the_ends():
    assert mask(dropout=0.0).all()
    assert threshold(1 - 1e-12) == 2**24 - 1  # not 2^24, which kernels would read as 0
    assert not mask(dropout=1 - 1e-12).any()


@pytest.mark.parametrize("start", [0, 2**16, 2**31 - SIZE], ids=str)
@pytest.mark.parametrize("dropout", [DROPOUT, 0.5])
def test_rate_of_every_row_column_and_diagonal(start, dropout):
    entries = standardised(mask(3, 5, rows=(start, start + SIZE), dropout=dropout), dropout)
    assert_normal(entries.sum(1) / SIZE**0.5)
    assert_normal(entries.sum(0) / SIZE**0.5)
    for matrix in (entries, entries.flip(1)):
        # a wrapped diagonal each row, taken by a shift of every row by its number
        index = (torch.arange(SIZE) + torch.arange(SIZE)[:, None]) % SIZE
        assert_normal(matrix.gather(1, index).sum(0) / SIZE**0.5)


def test_no_two_rows_and_no_two_columns_are_alike():
    entries = standardised(mask(1, 2))
    for matrix in (entries, entries.T):
        products = matrix @ matrix.T / SIZE**0.5
        assert_normal(products[torch.ones(SIZE, SIZE).triu(1) > 0])


def test_no_shift_of_the_matrix_is_like_it():
    """The correlation with every cyclic shift in both directions."""
    spectrum = torch.fft.fft2(standardised(mask(9, 4, dropout=0.5), 0.5))
    correlations = torch.fft.ifft2(spectrum.abs().square()).real.flatten()[1:] / SIZE
    assert_normal(correlations)


STREAMS = {
    "seeds": [(seed, 0) for seed in range(40)],
    "high_bits": [(seed << 32, 0) for seed in range(40)],
    "single_bits": [(0, 0), *((1 << bit if bit < 63 else -(2**63), 0) for bit in range(64))],
    "heads_and_batches": [(0, batch_head) for batch_head in range(40)],
    "both": [(seed, batch_head) for seed in range(7) for batch_head in range(7)],
    "opposite": [(seed, 20 - seed) for seed in range(20)],
}


@pytest.mark.parametrize("streams", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize("shifted", [False, True])
def test_streams_are_independent(streams, shifted):
    """Of seeds and heads; `shifted` compares neighbouring positions, of a row or of a column."""
    size = 128
    entries = torch.stack([standardised(mask(*stream, rows=(0, size), columns=(0, size))) for stream in streams])
    others = [entries.roll(1, dim) for dim in (1, 2)] if shifted else [entries]
    pairs = torch.ones(len(streams), len(streams)).triu(1) > 0
    for other in others:
        products = entries.flatten(1) @ other.flatten(1).T / size
        assert_normal(products[pairs])


def test_tiles_are_cut_from_one_matrix():
    whole = mask(6, 1)
    for first_row, first_column, size in ((0, 0, 16), (48, 500, 64), (1000, 3, 7)):
        rows, columns = (first_row, first_row + size), (first_column, first_column + size)
        tile = mask(6, 1, rows=rows, columns=columns)
        assert torch.equal(tile, whole[slice(*rows), slice(*columns)])


def test_heads_broadcast():
    rows, columns, heads = torch.arange(5)[:, None], torch.arange(8), torch.arange(6)
    together = keep_mask(torch.tensor([4]), heads[:, None, None], rows, columns, 0.3)
    assert torch.equal(
        together, torch.stack([mask(4, head, rows=(0, 5), columns=(0, 8), dropout=0.3) for head in heads])
    )


def test_bits_stay_what_they_were():
    """A seed that is stored with a run gives the same run with every later version."""
    packed = mask(0x123456789ABCDEF, 42, rows=(7, 11), columns=(100, 108), dropout=0.5).long() @ 2 ** torch.arange(8)
    assert packed.tolist() == [32, 234, 127, 110]
