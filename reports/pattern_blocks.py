"""What a pattern of blocks consists of, and exact numbers about it: pairs, the load of rows and columns, paths.

Everything follows from the counts, how often a query block reads a key block (Big Bird, section 2 and appendix D; a
block that is drawn although the row has it already counts twice).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from kernels.block_sparse_attention import BlockPattern

WINDOW, GLOBAL, RANDOM, SEEN, REPEATED = "window", "global", "random", "seen", "counted again"


def block_parts(pattern: BlockPattern, counts: np.ndarray, listed: str = RANDOM) -> dict[str, np.ndarray]:
    """How often each part has a block, int64 [N, N] by part; together the counts [N, N] of one head.

    A block belongs to the global rows and columns before it belongs to the window; what is left over, repetitions of
    those two included, comes from the lists and stands under `listed`.
    """
    is_global, near = pattern.global_and_near(len(counts))
    spread = is_global[:, None] | is_global
    parts = {WINDOW: near & ~spread, GLOBAL: spread}
    found = {name: part.astype(np.int64) for name, part in parts.items() if part.any()}
    rest = counts - sum(found.values())
    return {**found, listed: rest} if rest.any() or not found else found


def block_sizes(seq_len: int, block_size: int) -> np.ndarray:
    """Tokens of each block, int64 [N]; the last may hold fewer."""
    sizes = np.full(-(-seq_len // block_size), block_size, dtype=np.int64)
    sizes[-1] = seq_len - block_size * (len(sizes) - 1)
    return sizes


def block_numbers(pattern: BlockPattern, counts: np.ndarray, listed: str = RANDOM) -> dict[str, Any]:
    """Everything the command prints about a pattern of blocks, ready for JSON, from its counts [H, N, N].

    All lengths are in tokens: `pairs` with repetitions, `fewest_keys` and `most_keys` of a row, `longest_column` the
    rows that read one key. A skew is the longest column over the mean one; `ordinary_column_skew` leaves out global
    columns, which all rows read.
    """
    sizes = block_sizes(pattern.seq_len, pattern.block_size)
    dense = pattern.seq_len**2
    groups: dict[str, tuple[list[int], dict[str, Any]]] = {}
    for head, head_counts in enumerate(counts):
        numbers = _head_numbers(block_parts(pattern, head_counts, listed), head_counts, sizes)
        groups.setdefault(repr(numbers), ([], numbers))[0].append(head)
    pairs = sum(len(heads) * numbers["pairs"] for heads, numbers in groups.values())
    return {
        "seq_len": pattern.seq_len,
        "block_size": pattern.block_size,
        "num_blocks": len(sizes),
        "num_heads": len(counts),
        "pairs": pairs,
        "dense_pairs": dense * len(counts),
        "share_of_dense": pairs / (dense * len(counts)),
        "layers_to_all": layers_to_all(np.asarray(counts.any(axis=0))),
        "heads": [{"heads": heads, **numbers} for heads, numbers in groups.values()],
    }


def _head_numbers(parts, counts, sizes):
    rows, columns = counts @ sizes, sizes @ counts
    is_ordinary = ~(parts[GLOBAL] > 0).all(0) if GLOBAL in parts else np.ones(len(sizes), bool)
    pairs = int(sizes @ rows)
    ordinary = columns[is_ordinary]
    return {
        "pairs": pairs,
        "pairs_by_part": {name: int(sizes @ part @ sizes) for name, part in parts.items()},
        "repeated_pairs": int(sizes @ np.maximum(counts - 1, 0) @ sizes),
        "fewest_keys": int(rows.min()),
        "most_keys": int(rows.max()),
        "longest_column": int(columns.max()),
        "column_skew": _skew(columns, sizes),
        "longest_ordinary_column": int(ordinary.max(initial=0)),
        "ordinary_column_skew": _skew(ordinary, sizes[is_ordinary]),
    }


def _skew(columns, sizes):
    """Longest over mean, the mean of tokens and not of blocks; None where there is nothing."""
    total = int(columns @ sizes)
    return int(columns.max()) * int(sizes.sum()) / total if total else None


def layers_to_all(seen: np.ndarray) -> int | None:
    """The fewest layers with the pattern `seen` [N, N] after which every row depends on all columns, None if never.

    A row depends on itself whatever it sees: a layer adds to its input.
    """
    num_blocks = len(seen)
    everything = (1 << num_blocks) - 1
    neighbours: Sequence[list[int]] = [np.flatnonzero(row).tolist() for row in seen]
    reached = [1 << block for block in range(num_blocks)]
    for layer in range(1, num_blocks + 1):
        before = reached
        reached = []
        for itself, row in enumerate(neighbours):
            bits = before[itself]
            for block in row:
                bits |= before[block]
            reached.append(bits)
        if all(bits == everything for bits in reached):
            return layer
        if reached == before:
            return None
    return None
