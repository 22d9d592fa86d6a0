"""Exact numbers about attention patterns: reach, receptive field, visible pairs, positions nobody reaches.

A query position of layer l sees `{i - d t}` for t = 0..window (causal) or t = -window..window, per head with
dilation d (Longformer, section 3.1). Stacked layers add their steps up; which positions the sums hit is
found by moving a bit set of positions through the layers, so the answers are exact at any length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np


class Pattern(Protocol):
    """What the reports read of a `kernels.window_attention.pattern.WindowPattern`."""

    window: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: bool

    @property
    def reach(self) -> int: ...

    def num_pairs(self, seq_len: int) -> Sequence[int]: ...


class HeadGroup(NamedTuple):
    """Heads of one layer that see the same keys."""

    heads: tuple[int, ...]
    window: int
    dilation: int


def head_groups(pattern: Pattern) -> list[HeadGroup]:
    """The distinct heads of one layer, in the order of their first head."""
    groups: dict[tuple[int, int], list[int]] = {}
    for head, kind in enumerate(zip(pattern.window, pattern.dilation, strict=True)):
        groups.setdefault(kind, []).append(head)
    return [HeadGroup(tuple(heads), *kind) for kind, heads in groups.items()]


def layer_runs(patterns: Sequence[Pattern]) -> list[tuple[int, int]]:
    """First and last layer of every run of neighbouring layers with equal patterns."""
    kinds = [(pattern.window, pattern.dilation, pattern.causal) for pattern in patterns]
    starts = [layer for layer, kind in enumerate(kinds) if layer == 0 or kind != kinds[layer - 1]]
    return [(start, end - 1) for start, end in zip(starts, [*starts[1:], len(kinds)], strict=True)]


def index_label(noun: str, indices: Sequence[int]) -> str:
    """("head", (0, 1, 2, 6)) -> "heads 0–2, 6"; `indices` ascending."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    spans = ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"{noun}{'s' if len(indices) > 1 else ''} {spans}"


def receptive_field(patterns: Sequence[Pattern]) -> list[int]:
    """Positions to the left of a query, itself excluded, that can reach it through layers 0..l, for every l.

    A bidirectional pattern reaches as far to the right. The row's ends are not taken into account.
    """
    return np.cumsum([pattern.reach for pattern in patterns], dtype=np.int64).tolist()


def _spread(bits: int, window: int, dilation: int, *, left: bool) -> int:
    """The OR of `bits` moved by t * dilation places for t = 0..window, in log2(window) steps."""
    covered = 1
    while covered <= window:
        step = min(covered, window + 1 - covered)
        bits |= bits >> step * dilation if left else bits << step * dilation
        covered += step
    return bits


def reached_positions(patterns: Sequence[Pattern], seq_len: int, query: int) -> np.ndarray:
    """Which positions of a row can change the output at position `query`: bool [T], T = `seq_len`."""
    row = (1 << seq_len) - 1
    bits = 1 << query
    for pattern in reversed(patterns):
        seen = 0
        for group in head_groups(pattern):
            window = min(group.window, (seq_len - 1) // group.dilation)
            seen |= _spread(bits, window, group.dilation, left=True)
            if not pattern.causal:
                seen |= _spread(bits, window, group.dilation, left=False) & row
        bits = seen
    packed = np.frombuffer(bits.to_bytes(-(-seq_len // 8), "little"), dtype=np.uint8)
    return np.unpackbits(packed, bitorder="little")[:seq_len].astype(bool)


def unreached(patterns: Sequence[Pattern], seq_len: int, query: int) -> int:
    """How many positions within the receptive field of `query` no path through the layers reaches."""
    reach = sum(pattern.reach for pattern in patterns)
    last = query if all(pattern.causal for pattern in patterns) else min(query + reach, seq_len - 1)
    inside = reached_positions(patterns, seq_len, query)[max(query - reach, 0) : last + 1]
    return int(inside.size - inside.sum())


def block_shares(group: HeadGroup, *, causal: bool, block: int, num_blocks: int) -> np.ndarray:
    """The share of visible pairs in every block of `block` x `block` pairs: float [num_blocks, num_blocks].

    Rows are queries. Exact away from the row's ends: the share depends on the distance of the blocks alone,
    and an offset between query and key touches two neighbouring distances.
    """
    window = min(group.window, block * num_blocks // group.dilation)
    offsets = group.dilation * np.arange(0 if causal else -window, window + 1)
    distance, rest = np.divmod(offsets, block)
    counts = np.zeros(2 * num_blocks + 3)  # index = distance in blocks + num_blocks + 1
    for shift, weight in ((0, block - rest), (1, rest)):
        index = distance + shift + num_blocks + 1
        kept = (index >= 0) & (index < counts.size)
        np.add.at(counts, index[kept], weight[kept])
    rows, columns = np.indices((num_blocks, num_blocks))
    return counts[rows - columns + num_blocks + 1] / block**2


def pattern_numbers(patterns: Sequence[Pattern], seq_len: int) -> dict[str, Any]:
    """Everything the command prints, ready for JSON; `pairs` and `dense_pairs` count all heads together.

    `gaps` are positions within one layer's reach that none of its heads sees, `dead` those within the
    receptive field of layers 0..l that no path reaches; both at `query`, the last position of a causal row
    or the middle of a bidirectional one.
    """
    causal = all(pattern.causal for pattern in patterns)
    query = seq_len - 1 if causal else seq_len // 2
    layers = []
    for layer, (pattern, field) in enumerate(zip(patterns, receptive_field(patterns), strict=True)):
        dense = len(pattern.window) * (seq_len * (seq_len + 1) // 2 if pattern.causal else seq_len**2)
        pairs = sum(pattern.num_pairs(seq_len))
        layers.append(
            {
                "layer": layer,
                "window": list(pattern.window),
                "dilation": list(pattern.dilation),
                "reach": pattern.reach,
                "receptive_field": field,
                "pairs": pairs,
                "dense_pairs": dense,
                "share_of_dense": pairs / dense,
                "gaps": unreached([pattern], seq_len, query),
                "dead": unreached(patterns[: layer + 1], seq_len, query),
            }
        )
    pairs, dense = (sum(layer[key] for layer in layers) for key in ("pairs", "dense_pairs"))
    return {
        "seq_len": seq_len,
        "causal": causal,
        "query": query,
        "num_layers": len(layers),
        "num_heads": len(patterns[0].window),
        "pairs": pairs,
        "dense_pairs": dense,
        "share_of_dense": pairs / dense,
        "receptive_field": layers[-1]["receptive_field"],
        "dead": layers[-1]["dead"],
        "layers": layers,
    }
