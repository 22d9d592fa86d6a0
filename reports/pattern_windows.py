"""A window pattern with global tokens: which cells of its picture it fills, and exact numbers about it.

A global token is seen by every row and sees every position (Longformer, section 3.1); with `causal` no row sees ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from reports.pattern_blocks import GLOBAL, WINDOW
from reports.pattern_numbers import HeadGroup, Pattern, block_shares, head_groups, pattern_numbers


def window_cells(
    group: HeadGroup, seq_len: int, global_positions: Sequence[int], *, causal: bool, cell: int
) -> dict[str, np.ndarray]:
    """The share of each part in every cell of `cell` x `cell` pairs, float [cells, cells] by part.

    Any cell with a global row or column belongs to those wholly, so that they show at any size.
    """
    num_cells = -(-seq_len // cell)
    shares = block_shares(group, causal=causal, block=cell, num_blocks=num_cells)
    is_global = np.zeros(num_cells, bool)
    is_global[np.asarray(global_positions, dtype=int) // cell] = True
    spread = is_global[:, None] | is_global
    spread = np.tril(spread) if causal else spread
    return {WINDOW: np.where(spread, 0.0, shares), **({GLOBAL: spread.astype(float)} if spread.any() else {})}


def window_numbers(pattern: Pattern, seq_len: int, global_positions: Sequence[int]) -> dict[str, Any]:
    """Everything the command prints about one layer of window attention, ready for JSON; heads that agree together.

    `reach` and `gaps` are those of the windows alone (`pattern_numbers`), what one more layer adds to the receptive
    field; `layers_to_all` are enough for every position to depend on all others, given where a full head or global
    tokens see to that.
    """
    dense = seq_len * (seq_len + 1) // 2 if pattern.causal else seq_len**2
    alone = pattern_numbers([pattern], seq_len)["layers"][0]
    heads = []
    for group in head_groups(pattern):
        rows, columns = _loads(group, seq_len, global_positions, causal=pattern.causal)
        is_ordinary = ~np.isin(np.arange(seq_len), global_positions)
        ordinary, pairs = columns[is_ordinary], int(rows.sum())
        through_globals = _global_pairs(seq_len, len(global_positions), causal=pattern.causal)
        heads.append(
            {
                "heads": list(group.heads),
                "window": group.window,
                "dilation": group.dilation,
                "pairs": pairs,
                "pairs_by_part": {WINDOW: pairs - through_globals, GLOBAL: through_globals},
                "fewest_keys": int(rows.min()),
                "most_keys": int(rows.max()),
                "longest_column": int(columns.max()),
                "column_skew": float(columns.max() * seq_len / pairs),
                "longest_ordinary_column": int(ordinary.max(initial=0)),
                "ordinary_column_skew": float(ordinary.max() / ordinary.mean()) if ordinary.size else None,
            }
        )
    pairs = sum(len(row["heads"]) * row["pairs"] for row in heads)
    num_heads = len(pattern.window)
    enough = 1 if any(row["pairs"] == dense for row in heads) else 2 if global_positions else None
    return {
        "seq_len": seq_len,
        "num_heads": num_heads,
        "causal": pattern.causal,
        "global": list(global_positions),
        "pairs": pairs,
        "dense_pairs": dense * num_heads,
        "share_of_dense": pairs / (dense * num_heads),
        "reach": alone["reach"],
        "gaps": alone["gaps"],
        "layers_to_all": None if pattern.causal else enough,
        "heads": heads,
    }


def _loads(group, seq_len, global_positions, *, causal):
    """Keys of every row and rows of every column, int64 [T] each."""
    position = np.arange(seq_len)
    window, dilation = group.window, group.dilation
    left = np.minimum(window, position // dilation) + 1
    right = np.minimum(window, (seq_len - 1 - position) // dilation)
    rows = left if causal else left + right
    columns = right + 1 if causal else left + right
    rows, columns = rows.copy(), columns.copy()
    for place in global_positions:
        distance = np.abs(position - place)
        is_far = (distance > window * dilation) | (distance % dilation != 0)
        rows += is_far & (position >= place if causal else True)
        columns += is_far & (position <= place if causal else True)
    for place in global_positions:
        rows[place] = place + 1 if causal else seq_len
        columns[place] = seq_len - place if causal else seq_len
    return rows, columns


def _global_pairs(seq_len, count, *, causal):
    """Pairs in a global row or a global column."""
    return count * (seq_len + 1) - count * (count + 1) // 2 if causal else 2 * count * seq_len - count**2
