"""Dropout of attention probabilities by a hash of their position, so that no pass has to store what another dropped.

Whether row i of a head keeps column j is a function of (seed, batch * H + head, i, j) alone: the same in every pass,
path, tile and order. `tiles.keep_mask` is the same function in Triton, bit for bit. Each operation below has uint32
in mind; on int64 masked to 32 bits none of them overflows, as both multipliers are below 2^31.
"""

import torch

# the mixer "16 21f0aaad 15 735a2d97 15" found by skeeto/hash-prospector: a bijection in which each bit moves all others
MULTIPLIERS = (0x21F0AAAD, 0x735A2D97)
GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: multiples of it lie far apart
LOW_BITS = 0xFFFFFFFF
THRESHOLD_BITS = 24  # of a hash, its highest, decide: what they are compared with is an int32 for every compiler


def keep_mask(
    seed: torch.Tensor, batch_head: int | torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, dropout: float
) -> torch.Tensor:
    """Which probabilities stay, bool in the shape that batch_head, rows and columns broadcast to.

    Args:
        seed: int64 of one element, on the device of the others; all 64 bits count.
        batch_head: batch index * number of heads + head, below 2^32; int or int64.
        rows, columns: int64 positions in the sequence, from 0 to below 2^31.
        dropout: probability that an entry is dropped, 0 <= dropout < 1, taken to 24 bits.
    """
    low, high = seed.reshape(()) & LOW_BITS, (seed.reshape(()) >> 32) & LOW_BITS
    # two keys of 32 bits, one to one with the 64 of the seed; heads differ in both
    row_key = _scramble(low ^ _scramble((batch_head + torch.full_like(low, GOLDEN)) & LOW_BITS))
    column_key = _scramble(row_key ^ _scramble(high ^ _scramble((low + GOLDEN) & LOW_BITS)))
    mixed = _multiply(_scramble(rows ^ row_key) ^ ((columns * GOLDEN + column_key) & LOW_BITS))
    return mixed >> (32 - THRESHOLD_BITS) >= threshold(dropout)


def threshold(dropout: float) -> int:
    """What the highest THRESHOLD_BITS of a kept entry's hash are not below."""
    return min(round(dropout * 2**THRESHOLD_BITS), 2**THRESHOLD_BITS - 1)


def _scramble(x):
    x = _multiply(x)
    return x ^ (x >> 15)


def _multiply(x):
    """`_scramble` before its last step, which leaves the highest bits as they are."""
    x = ((x ^ (x >> 16)) * MULTIPLIERS[0]) & LOW_BITS
    return ((x ^ (x >> 15)) * MULTIPLIERS[1]) & LOW_BITS
