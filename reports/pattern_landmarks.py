"""Nystrom attention as a picture: segments of the text, their landmarks, and the three small matrices of scores.

No pair of tokens meets: queries see landmarks of keys, landmarks of queries see keys, and a pseudo-inverse of the
landmarks' own scores stands between (arXiv 2102.03902, section 3.2 and figure 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from reports import style
from reports.pattern_tables import counted

NARROWEST, WIDEST = 0.14, 0.5  # of the sides of matrices with a row a landmark, as shares of the longest side
GAP = 0.24
MAX_RULED = 64  # segments: more lines would be a grey veil


def segment_lengths(seq_len: int, num_landmarks: int) -> np.ndarray:
    """Tokens of each landmark's segment in a text without padding, int64 [N]; `seq_len` above `num_landmarks`."""
    import torch

    from kernels.nystrom_attention.landmarks import cut

    segments = cut(seq_len, num_landmarks, valid=None, dtype=torch.float32, device=torch.device("cpu"))
    return np.diff(segments.start[0].numpy())


def landmark_numbers(lengths: Sequence[int] | np.ndarray) -> dict[str, Any]:
    """Scores of one head, ready for JSON: of queries with landmarks, among landmarks, of landmarks with keys."""
    seq_len, num_landmarks = int(np.sum(lengths)), len(lengths)
    parts = {
        "queries x landmarks": seq_len * num_landmarks,
        "landmarks x landmarks": num_landmarks**2,
        "landmarks x keys": seq_len * num_landmarks,
    }
    pairs = sum(parts.values())
    return {
        "seq_len": seq_len,
        "num_landmarks": num_landmarks,
        "shortest_segment": int(np.min(lengths)),
        "longest_segment": int(np.max(lengths)),
        "pairs": pairs,
        "pairs_by_part": parts,
        "dense_pairs": seq_len**2,
        "share_of_dense": pairs / seq_len**2,
        "layers_to_all": 1,
    }


def landmark_figure(lengths: Sequence[int] | np.ndarray) -> Figure:
    """The square of all scores that is never made, cut into segments, and the three matrices in its place."""
    seq_len, num_landmarks = int(np.sum(lengths)), len(lengths)
    narrow = float(np.clip(num_landmarks / seq_len, NARROWEST, WIDEST))
    ends = np.cumsum([0, *lengths]) / seq_len
    even = np.arange(num_landmarks + 1) / num_landmarks
    with style.drawing():
        width = 2 + 2 * narrow + 3 * GAP
        figure = style.new_figure(3.0 * width + 0.4, 3.0 + 1.0)
        axes = figure.subplots()
        left = _matrix(axes, 0.0, 1.0, 1.0, f"all scores\n{seq_len:,} × {seq_len:,}, never made")
        _shade(axes, ends, (-0.07, -0.02), is_upright=True)
        _shade(axes, ends, (-0.07, -0.02), is_upright=False)
        _rule(axes, ends, (-0.07, 1.0), is_upright=True)
        _rule(axes, ends, (-0.07, 1.0), is_upright=False)
        _sign(axes, left, "≈")
        first = left + GAP
        left = _matrix(axes, first, narrow, 1.0, f"queries × landmarks\n{seq_len:,} × {num_landmarks:,}")
        _shade(axes, first + narrow * even, (0.0, 1.0), is_upright=True)
        _rule(axes, first + narrow * even, (0.0, 1.0), is_upright=True)
        _sign(axes, left, "×")
        first = left + GAP
        left = _matrix(axes, first, narrow, narrow, f"pseudo-inverse\n{num_landmarks:,} × {num_landmarks:,}")
        axes.add_patch(Rectangle((first, 0), narrow, narrow, facecolor=style.ORANGE, edgecolor="none"))
        _sign(axes, left, "×")
        first = left + GAP
        left = _matrix(axes, first, 1.0, narrow, f"landmarks × keys\n{num_landmarks:,} × {seq_len:,}")
        _shade(axes, narrow * even, (first, left), is_upright=False)
        _rule(axes, narrow * even, (first, left), is_upright=False)
        words = "a shade: one landmark,\nand the tokens it is the mean of"
        axes.text(first + 0.5, 0.75, words, ha="center", va="center", fontsize=8, color=style.MUTED)
        axes.set(xlim=(-0.1, left + 0.05), ylim=(1.2, -0.12), aspect="equal")
        axes.axis("off")
        short, long = int(np.min(lengths)), int(np.max(lengths))
        means = counted(short, "token") if short == long else f"{short:,} or {counted(long, 'token')}"
        figure.suptitle(
            f"Nystrom attention, {counted(num_landmarks, 'landmark')}, each the mean of {means}",
            fontsize=11,
            fontweight="bold",
        )
    return figure


def _matrix(axes: Axes, left: float, width: float, height: float, label: str) -> float:
    """The frame of a matrix with its words below; where it ends on the right."""
    axes.add_patch(Rectangle((left, 0), width, height, facecolor="none", edgecolor=style.MUTED, zorder=3))
    axes.text(left + width / 2, height + 0.04, label, ha="center", va="top", fontsize=8)
    return left + width


def _shade(axes: Axes, places: np.ndarray, between: tuple[float, float], *, is_upright: bool) -> None:
    """A stripe for each landmark, from places[j] to places[j + 1]."""
    shades = np.arange(len(places) - 1)[None]
    edges = (places, between) if is_upright else (between, places)
    pale = -len(places) / 3  # the first landmark is a third of the way from white
    axes.pcolormesh(*edges, shades if is_upright else shades.T, cmap=style.VALUE_MAP, vmin=pale, vmax=len(places) - 2)


def _rule(axes: Axes, places: np.ndarray, between: tuple[float, float], *, is_upright: bool) -> None:
    if len(places) <= MAX_RULED:
        draw = axes.vlines if is_upright else axes.hlines
        draw(places, *between, color=style.PALE, linewidth=0.5)


def _sign(axes: Axes, left: float, sign: str) -> None:
    axes.text(left + GAP / 2, 0.07, sign, ha="center", va="center", fontsize=14)
