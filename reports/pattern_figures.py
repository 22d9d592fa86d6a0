"""Pictures of attention patterns: which keys a query sees, windows and dilation by layer, receptive field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from reports import style
from reports.pattern_numbers import (
    HeadGroup,
    Pattern,
    block_shares,
    head_groups,
    index_label,
    layer_runs,
    reached_positions,
    receptive_field,
)

MAX_BLOCKS = 128  # per side of a panel: more than its pixels can show
SHARES = Normalize(vmin=1e-9, vmax=1.0)


def attention_pattern_figure(patterns: Sequence[Pattern], seq_len: int, *, title: str | None = None) -> Figure:
    """Which keys a query sees, one panel for every distinct head of every distinct layer, from layer 0 on.

    Neighbouring layers with equal patterns share their panels, as do heads with equal window and dilation. A
    row of more than 128 positions is drawn in blocks, shaded by the share of pairs seen; where a head is
    dilated an inset shows the end of the row pair by pair. `seq_len` is in positions.
    """
    panels = [(run, group) for run in layer_runs(patterns) for group in head_groups(patterns[run[0]])]
    block = -(-seq_len // MAX_BLOCKS)
    wanted = 6 if len(panels) > 16 else 3 if len(panels) in (5, 6, 9) else 4  # few cells left empty
    num_columns = min(len(panels), wanted)
    num_rows = -(-len(panels) // num_columns)
    side = min(2.6, max(1.45, 8.4 / num_columns))
    with style.drawing():
        # the extra inches hold two lines of title a panel, tick and axis labels, the note and the colour bar
        width = (side + 0.25) * num_columns + (1.3 if block > 1 else 0.6)
        figure = style.new_figure(max(width, 4.6), (side + 0.5) * num_rows + 1.0, layout="compressed")
        grid = figure.subplots(num_rows, num_columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for index, (run, group) in enumerate(panels):
            axes = grid.flat[index]
            _draw_panel(axes, patterns[run[0]], group, seq_len, block)
            axes.tick_params(
                labelleft=index % num_columns == 0,
                labelbottom=index + num_columns >= len(panels),
                labelsize=7,
            )
            layers = index_label("layer", range(run[0], run[1] + 1))
            all_heads = len(group.heads) == len(patterns[run[0]].window)
            heads = "all heads" if all_heads else index_label("head", group.heads)
            dilation = f", dilation {group.dilation}" if group.dilation > 1 else ""
            axes.set_title(f"{layers}, {heads}\nwindow {group.window:,}{dilation}", fontsize=7.5, fontweight="normal")
        figure.supxlabel("key position\n" + _panel_note(patterns, seq_len, block), fontsize=9)
        figure.supylabel("query position", fontsize=9)
        if title:
            figure.suptitle(title, fontsize=11, fontweight="bold")
        if block > 1:
            shade = ScalarMappable(norm=SHARES, cmap=style.SHARE_MAP)
            height = min(1.0, 2.2 / ((side + 0.5) * num_rows))
            bar = figure.colorbar(shade, ax=grid, aspect=16, shrink=height, pad=0.02)
            bar.set_label("share of pairs seen", fontsize=8)
            bar.ax.tick_params(labelsize=7)
    return figure


def _panel_note(patterns: Sequence[Pattern], seq_len: int, block: int) -> str:
    if block == 1:
        return f"row of {seq_len:,} positions, every pair drawn"
    note = f"row of {seq_len:,} positions in blocks of {block} × {block} pairs"
    if any(dilation > 1 for pattern in patterns for dilation in pattern.dilation):
        note += "\ninsets: the end of the row, pair by pair"
    return note


def _draw_panel(axes: Axes, pattern: Pattern, group: HeadGroup, seq_len: int, block: int) -> None:
    num_blocks = -(-seq_len // block)
    shares = block_shares(group, causal=pattern.causal, block=block, num_blocks=num_blocks)
    size = num_blocks * block
    _draw_mask(axes, shares, extent=(0, size, size, 0))
    ticks = [0, seq_len // 2, seq_len] if seq_len > 1 else [0, 1]
    axes.set(xlim=(0, seq_len), ylim=(seq_len, 0), xticks=ticks, yticks=ticks)
    axes.xaxis.set_major_formatter(style.POSITIONS)
    axes.yaxis.set_major_formatter(style.POSITIONS)
    axes.tick_params(length=2)
    if block > 1 and group.dilation > 1:
        crop = min(6 * group.dilation, 64, seq_len)
        low, size = (0.56, 0.42) if pattern.causal else (0.69, 0.29)  # in the corner that the band leaves free
        inset = axes.inset_axes((low, low, size, size))
        _draw_mask(inset, block_shares(group, causal=pattern.causal, block=1, num_blocks=crop), extent=None)
        inset.set(xticks=[], yticks=[])
        inset.set_xlabel(f"{crop} × {crop}", fontsize=6, labelpad=1)
        for spine in inset.spines.values():
            spine.set(color=style.ORANGE, linewidth=0.8)


def _draw_mask(axes: Axes, shares: np.ndarray, extent: tuple[float, float, float, float] | None) -> None:
    axes.imshow(shares, cmap=style.SHARE_MAP, norm=SHARES, extent=extent, interpolation="nearest", aspect="equal")
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(True)


def _layer_ticks(axes: Axes, num_layers: int) -> None:
    axes.set_yticks(range(0, num_layers, -(-num_layers // 16)))
    axes.set_ylim(-0.55, num_layers - 0.45)


def _side(patterns: Sequence[Pattern]) -> str:
    return "to the left" if all(pattern.causal for pattern in patterns) else "on each side"


def window_figure(patterns: Sequence[Pattern]) -> Figure:
    """Window and dilation of every layer and head, and the reach (window x dilation) of every layer.

    Heads that agree in every layer share a column; layer 0, the first one the input meets, is at the bottom.
    """
    columns = _shared_columns(patterns)
    labels = [", ".join(index_label("head", heads).split(" ")[1:]) for heads in columns]
    if len(columns) == 1:
        labels = ["all"]
    windows = np.array([[pattern.window[heads[0]] for heads in columns] for pattern in patterns])
    dilations = np.array([[pattern.dilation[heads[0]] for heads in columns] for pattern in patterns])
    cell = 0.62 if len(columns) <= 8 else 0.4
    heat_width = max(0.9, cell * len(columns))
    with style.drawing():
        figure = style.new_figure(2 * heat_width + 4.6, max(2.6, 0.25 * len(patterns) + 1.1))
        ratios = [heat_width, heat_width, 3.2]
        left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=ratios)
        _draw_heat(left, windows, labels, f"window\n(keys {_side(patterns)})", log=True)
        _draw_heat(middle, dilations, labels, "dilation", log=False)
        left.set_ylabel("layer (0 meets the input)")
        reach = [pattern.reach for pattern in patterns]
        bars = right.barh(range(len(reach)), reach, color=style.BLUE, height=0.7)
        right.bar_label(bars, labels=[f"{value:,}" for value in reach], padding=3, fontsize=8)
        right.set_xlim(0, max(1, max(reach)) * 1.25)
        right.set_title("reach of the layer")
        right.set_xlabel(f"positions {_side(patterns)}")
        right.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        right.xaxis.set_major_formatter(style.POSITIONS)
        right.grid(axis="y", visible=False)
        _layer_ticks(right, len(patterns))
    return figure


def _shared_columns(patterns: Sequence[Pattern]) -> list[tuple[int, ...]]:
    """The heads that have equal window and dilation in every layer, grouped."""
    groups: dict[tuple, list[int]] = {}
    for head in range(len(patterns[0].window)):
        kind = tuple((pattern.window[head], pattern.dilation[head]) for pattern in patterns)
        groups.setdefault(kind, []).append(head)
    return [tuple(heads) for heads in groups.values()]


def _draw_heat(axes: Axes, values: np.ndarray, labels: Sequence[str], title: str, *, log: bool) -> None:
    shown = np.maximum(values, 1) if log else values
    low, high = float(shown.min()), float(shown.max())
    norm = (LogNorm if log else Normalize)(low, high if high > low else low + 1)
    axes.imshow(shown, cmap=style.VALUE_MAP, norm=norm, aspect="auto", interpolation="nearest")
    for (row, column), value in np.ndenumerate(values):
        dark = norm(shown[row, column]) > 0.6
        axes.text(
            column,
            row,
            f"{value:,}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if dark else style.INK,
        )
    axes.set_title(title, fontsize=9)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlabel("heads")
    axes.grid(False)


def phase_figure(phases: Mapping[str, Sequence[Pattern]]) -> Figure:
    """Windows (and dilation, where there is any) of every layer in every phase, by the phase's label."""
    labels, columns = list(phases), list(phases.values())
    widest = np.array([[max(pattern.window) for pattern in patterns] for patterns in columns]).T
    shown = np.maximum(widest, 1)
    norm = LogNorm(shown.min(), max(shown.max(), shown.min() + 1))
    texts = [[_cell_text(pattern) for pattern in patterns] for patterns in columns]
    length = max(len(text) for column in texts for text in column)
    with style.drawing():
        width = max(1.0, 0.085 * length + 0.25, *(0.08 * len(label) + 0.2 for label in labels))
        figure = style.new_figure(width * len(labels) + 1.2, max(2.4, 0.25 * len(widest) + 1.1))
        axes = figure.subplots()
        axes.imshow(shown, cmap=style.VALUE_MAP, norm=norm, aspect="auto", interpolation="nearest", origin="lower")
        for column, lines in enumerate(texts):
            for row, text in enumerate(lines):
                color = "white" if norm(shown[row, column]) > 0.6 else style.INK
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
        axes.set_xticks(range(len(labels)), labels)
        axes.set_ylabel("layer (0 meets the input)")
        _layer_ticks(axes, len(widest))
        axes.set_title(f"window, keys {_side(columns[0])}\n(×d: dilation d on some or all heads)", fontsize=9)
        axes.grid(False)
    return figure


def _cell_text(pattern: Pattern) -> str:
    def span(values: Sequence[int]) -> str:
        low, high = min(values), max(values)
        return f"{low:,}" if low == high else f"{low:,}–{high:,}"

    dilated = sorted({dilation for dilation in pattern.dilation if dilation > 1})
    return span(pattern.window) + "".join(f" ×{dilation}" for dilation in dilated)


def receptive_field_figure(phases: Mapping[str, Sequence[Pattern]], lengths: Mapping[str, int] | None = None) -> Figure:
    """Receptive field after every layer, a line a phase, with `lengths` (label -> positions) drawn across.

    Open circles mark the layers after which dilation leaves positions inside the field that no path reaches.
    """
    lengths = {label: value for label, value in (lengths or {}).items() if value and value > 0}
    fields = {label: receptive_field(patterns) for label, patterns in phases.items()}
    highest = max([*lengths.values(), *(field[-1] for field in fields.values()), 1])
    num_layers = max(len(field) for field in fields.values())
    with style.drawing():
        figure = style.new_figure(7.0, 3.9)
        axes = figure.subplots()
        shades = style.VALUE_MAP(np.linspace(0.45, 1.0, len(fields)))
        any_dead = False
        for (label, field), shade in zip(fields.items(), shades, strict=True):
            color = style.BLUE if len(fields) == 1 else shade
            axes.plot(range(num_layers)[: len(field)], field, marker="o", markersize=4, color=color, label=label)
            dead = [layer for layer in range(len(field)) if has_dead(phases[label][: layer + 1])]
            any_dead = any_dead or bool(dead)
            hollow = {"marker": "o", "linestyle": "none", "markersize": 4, "markerfacecolor": "white"}
            axes.plot(dead, [field[layer] for layer in dead], color=color, zorder=3, **hollow)
        if any_dead:
            axes.plot([], [], color=style.MUTED, label="with positions no path reaches", **hollow)
        for (label, value), color in zip(lengths.items(), (style.RED, style.GREEN, style.PURPLE), strict=False):
            axes.axhline(value, color=color, linestyle="--", linewidth=1.4, label=f"{label}: {value:,}")
        axes.set_yscale("log", base=2)
        axes.set_ylim(max(0.7, min(max(field[0], 1) for field in fields.values()) * 0.7), highest * 1.6)
        axes.yaxis.set_major_formatter(style.POSITIONS)
        axes.xaxis.set_major_locator(MaxNLocator(min(num_layers, 15), integer=True))
        axes.set_xlabel("after layer")
        axes.set_ylabel(f"positions {_side(next(iter(phases.values())))}")
        axes.set_title("receptive field")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def has_dead(patterns: Sequence[Pattern]) -> bool:
    """Whether positions within the receptive field stay unreached in a row long enough to hold the field."""
    reach = sum(pattern.reach for pattern in patterns)
    # a window meant as "everything" makes a field of any size; what a million positions do not show stays out
    seq_len = min(2 * reach + 1, 2**20)
    causal = all(pattern.causal for pattern in patterns)
    query = seq_len - 1 if causal else seq_len // 2
    reached = reached_positions(patterns, seq_len, query)
    return not reached[max(query - reach, 0) : query + 1].all()
