"""Patterns as squares of coloured cells, a colour for each part, as in figure 2 of Longformer and 1 of Big Bird."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from reports import style
from reports.pattern_blocks import GLOBAL, RANDOM, REPEATED, SEEN, WINDOW, block_parts

if TYPE_CHECKING:
    from kernels.block_sparse_attention import BlockPattern

MAX_CELLS = 128  # per side of a panel: more than its pixels can show
MAX_RULED = 64  # per side: more lines between cells would be a grey veil
PALEST = 0.4  # the shade of a cell hardly any of whose pairs are seen
COLOURS = {WINDOW: style.BLUE, GLOBAL: style.GREEN, RANDOM: style.ORANGE, SEEN: style.SKY, REPEATED: style.RED}
# what covers what where parts meet in one cell: the rarer is drawn
ORDER = (RANDOM, SEEN, WINDOW, GLOBAL, REPEATED)


@dataclass(frozen=True)
class Panel:
    """One square: by part the share of each cell's pairs that are seen, float [cells, cells]."""

    title: str
    shares: Mapping[str, np.ndarray]


def mosaic_figure(panels: Sequence[Panel], seq_len: int, cell: int, *, title: str, note: str) -> Figure:
    """The panels side by side, at most four in a row; a cell is `cell` x `cell` of the `seq_len` positions."""
    num_columns = min(len(panels), 4)
    num_rows = -(-len(panels) // num_columns)
    side = {1: 4.2, 2: 3.2, 3: 2.9, 4: 2.6}[num_columns]
    with style.drawing():
        figure = style.new_figure((side + 0.2) * num_columns + 2.2, (side + 0.4) * num_rows + 0.9, layout="compressed")
        grid = figure.subplots(num_rows, num_columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for index, panel in enumerate(panels):
            axes = grid.flat[index]
            _draw(axes, panel, seq_len, cell)
            axes.tick_params(labelleft=index % num_columns == 0, labelbottom=index + num_columns >= len(panels))
        figure.supxlabel(f"key position\n{note}", fontsize=9)
        figure.supylabel("query position", fontsize=9)
        figure.suptitle(title, fontsize=11, fontweight="bold")
        shown = [name for name in reversed(ORDER) if any((_covering(panel.shares) == name).any() for panel in panels)]
        handles = [Patch(facecolor=COLOURS[name], label=name) for name in shown]
        figure.legend(handles=handles, loc="outside right center", handlelength=1, handleheight=1)
    return figure


def _draw(axes: Axes, panel: Panel, seq_len: int, cell: int) -> None:
    image = _colours(panel.shares)
    size = len(image) * cell
    axes.imshow(image, extent=(0, size, size, 0), interpolation="nearest", aspect="equal")
    axes.grid(False)
    if len(image) <= MAX_RULED:
        between = np.arange(1, len(image)) * cell
        axes.hlines(between, 0, size, color=style.PALE, linewidth=0.5)
        axes.vlines(between, 0, size, color=style.PALE, linewidth=0.5)
    for spine in axes.spines.values():
        spine.set_visible(True)
    ticks = [0, seq_len // 2, seq_len] if seq_len > 1 else [0, 1]
    axes.set(xlim=(0, seq_len), ylim=(seq_len, 0), xticks=ticks, yticks=ticks)
    axes.xaxis.set_major_formatter(style.POSITIONS)
    axes.yaxis.set_major_formatter(style.POSITIONS)
    axes.tick_params(length=2, labelsize=7)
    axes.set_title(panel.title, fontsize=9, fontweight="normal")


def _covering(shares: Mapping[str, np.ndarray]) -> np.ndarray:
    """The part that is drawn in each cell, str [cells, cells], empty where nothing is seen."""
    found = np.full(next(iter(shares.values())).shape, "", dtype=object)
    for name in ORDER:
        if name in shares:
            found[shares[name] > 0] = name
    return found


def _colours(shares: Mapping[str, np.ndarray]) -> np.ndarray:
    """float [cells, cells, 3]: white where nothing is seen, else the covering part's colour, paler for a part of it."""
    covering = _covering(shares)
    image = np.ones((*covering.shape, 3))
    for name, share in shares.items():
        is_drawn = covering == name
        shade = PALEST + (1 - PALEST) * share[is_drawn][:, None]
        image[is_drawn] = 1 - shade * (1 - np.array(to_rgb(COLOURS[name])))
    return image


def block_panels(pattern: BlockPattern, counts: np.ndarray, listed: str) -> tuple[list[Panel], int]:
    """A panel for each part of the counts [N, N] of one head and one for all of them, and the blocks a cell holds."""
    parts = block_parts(pattern, counts, listed)
    blocks = -(-len(counts) // MAX_CELLS)
    panels = []
    for name in (listed, WINDOW, GLOBAL):
        if name in parts and len(parts) > 1:
            panels.append(Panel(name, _pooled({name: parts[name]}, parts[name], blocks)))
    panels.append(Panel("together" if panels else "", _pooled(parts, counts, blocks)))
    return panels, blocks


def _pooled(parts, counts, blocks):
    """Of each part the share of blocks seen in cells of `blocks` x `blocks`; what counts twice is a part of its own."""
    seen = {name: part > 0 for name, part in parts.items()}
    if (counts > 1).any():
        seen[REPEATED] = counts > 1
    extra = -len(counts) % blocks
    cells = (len(counts) + extra) // blocks
    return {
        name: np.pad(part, (0, extra)).reshape(cells, blocks, cells, blocks).mean((1, 3)) for name, part in seen.items()
    }
