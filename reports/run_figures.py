"""Pictures of one run: the loss by phase, and its score beside the baselines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from reports import style
from reports.metrics import Metric, format_score, metric_named, number

MAX_POINTS = 2000  # more than the picture has pixels


def series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the records that have a number under `key`, as float arrays."""
    pairs = [(float(record["step"]), number(record.get(key))) for record in records]
    kept = [(step, value) for step, value in pairs if value is not None and math.isfinite(value)]
    steps, values = zip(*kept, strict=True) if kept else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a fortieth of the points, shorter at the ends so that no end is pulled in."""
    half = len(values) // 80
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    return (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)


def phase_spans(records: Sequence[Mapping[str, Any]]) -> dict[int, tuple[float, float]]:
    """First and last step of every phase in the records (0-based); one begins where the one before ends."""
    ends: dict[int, float] = {}
    for record in records:
        phase = record.get("phase")
        if isinstance(phase, int):
            ends[phase] = max(ends.get(phase, 0.0), float(record["step"]))
    spans, start = {}, 0.0
    for phase in sorted(ends):
        spans[phase] = (start, ends[phase])
        start = ends[phase]
    return spans


def loss_key(records: Sequence[Mapping[str, Any]], split: str) -> str | None:
    """The key of the loss to draw for `split`: bits per character where the run has them, else the loss."""
    names = (f"{split}/bpc", f"{split}/bits_per_token", f"{split}/loss")
    return next((name for name in names if any(name in record for record in records)), None)


def training_figure(
    train: Sequence[Mapping[str, Any]],
    valid: Sequence[Mapping[str, Any]],
    phase_labels: Mapping[int, str] | None = None,
) -> Figure:
    """Training loss (faint, and smoothed) with validation points; phases shaded; the learning rate below."""
    key = loss_key(train, "train") or loss_key(valid, "valid") or "train/loss"
    name = key.partition("/")[2]
    steps, values = series(train, f"train/{name}")
    valid_steps, valid_values = series(valid, f"valid/{name}")
    rate_steps, rates = series(train, "optim/lr")
    with style.drawing():
        figure = style.new_figure(7.6, 4.8)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        thin = slice(None, None, -(-max(len(steps), 1) // MAX_POINTS))
        smoothed = smooth(values)
        top.plot(steps[thin], values[thin], color=style.BLUE, alpha=0.25, linewidth=0.8)
        if len(steps):
            top.plot(steps[thin], smoothed[thin], color=style.BLUE, label="training")
        if len(valid_steps):
            top.plot(valid_steps, valid_values, "o", color=style.RED, markersize=5, label="validation", zorder=4)
            best = int(np.argmin(valid_values))
            point = (valid_steps[best], valid_values[best])
            # left of the point: the best value tends to stand at the right border
            note = {"xytext": (-8, 12), "textcoords": "offset points", "ha": "right", "fontsize": 9}
            top.annotate(f"best {valid_values[best]:.3f}", point, color=style.RED, **note)
        _limit_top(top, smoothed, valid_values)
        top.set_ylabel("loss (nats)" if name == "loss" else metric_named(str(name)).label)
        if len(steps) or len(valid_steps):
            top.legend(loc="upper right")
        bottom.plot(rate_steps, rates, color=style.GREEN)
        bottom.set_ylabel("learning rate")
        bottom.set_ylim(bottom=0)
        bottom.yaxis.set_major_locator(MaxNLocator(3))
        bottom.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
        bottom.set_xlabel("step (weight updates)")
        bottom.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        bottom.xaxis.set_major_formatter(style.POSITIONS)
        _shade_phases(top, bottom, phase_spans([*train, *valid]), phase_labels or {})
    return figure


def _limit_top(axes: Axes, smoothed: np.ndarray, valid: np.ndarray) -> None:
    """Cut off the first steps, far above everything after them, so that the rest of the curve can be read."""
    late = np.concatenate([smoothed[len(smoothed) // 25 :], valid])
    if not len(late):
        return
    low, high = float(late.min()), float(late.max())
    room = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - room, high + 3 * room)


def _shade_phases(top: Axes, bottom: Axes, spans: Mapping[int, tuple[float, float]], labels: Mapping[int, str]) -> None:
    if not spans:
        return
    total = max(end for _, end in spans.values()) or 1.0
    for axes in (top, bottom):
        axes.set_xlim(0, total * 1.01)
    if len(spans) == 1:
        return
    for order, (phase, (start, end)) in enumerate(spans.items()):
        for axes in (top, bottom):
            if order % 2 == 0:
                axes.axvspan(start, end, color="#f1f5f9", zorder=0)
            axes.axvline(end, color=style.PALE, linewidth=1, zorder=0)
        label = labels.get(phase, f"phase {phase + 1}")
        # 7.6 inches hold about 95 of these characters; a phase too short for its label gets its number
        fits = len(label) < 95 * (end - start) / total
        short = f"{phase + 1}" if (end - start) / total > 0.025 else ""
        middle = (start + end) / 2
        top.text(
            middle,
            1.02,
            label if fits else short,
            transform=top.get_xaxis_transform(),
            ha="center",
            fontsize=8,
        )


def baseline_figure(metric: Metric, value: float, baselines: Mapping[str, Any]) -> Figure:
    """The score of the run and of the baselines as bars, the best on top."""
    bars = {style.label_text(baseline_label(name)): number(score) for name, score in baselines.items()}
    bars = {label: score for label, score in bars.items() if score is not None and math.isfinite(score)}
    bars["this model"] = value
    ordered = sorted(bars.items(), key=lambda bar: bar[1], reverse=not metric.lower_is_better)
    with style.drawing():
        figure = style.new_figure(6.4, 0.3 * len(ordered) + 0.8)
        axes = figure.subplots()
        colors = [style.BLUE if label == "this model" else "#c7cdd6" for label, _ in ordered]
        drawn = axes.barh([label for label, _ in ordered], [score for _, score in ordered], color=colors)
        axes.bar_label(drawn, labels=[format_score(score, 3) for _, score in ordered], padding=3, fontsize=9)
        for tick, (label, _) in zip(axes.get_yticklabels(), ordered, strict=True):
            tick.set_fontweight("bold" if label == "this model" else "normal")
        axes.invert_yaxis()
        axes.set_xlim(0, max(score for _, score in ordered) * 1.14 or 1.0)
        better = "lower" if metric.lower_is_better else "higher"
        axes.set_xlabel(f"{metric.label} ({better} is better)")
        axes.grid(axis="y", visible=False)
    return figure


def baseline_label(name: str) -> str:
    """ "markov_2" -> "order-2 Markov"; other names as they are."""
    kind, _, order = name.partition("_")
    return f"order-{order} Markov" if kind == "markov" and order.isdecimal() else name
