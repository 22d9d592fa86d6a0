"""What a metric of `result.json` is called, which way is better, and how numbers are written for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Metric(NamedTuple):
    """A score by its name in `result.json`."""

    name: str
    label: str
    lower_is_better: bool


# in the order in which one is picked as the headline of a run
_KNOWN = (
    Metric("bpc", "bits per character", True),
    Metric("bits_per_token", "bits per masked token", True),
    Metric("f1", "F1", False),
    Metric("exact_match", "exact match", False),
    Metric("rouge1", "ROUGE-1", False),
    Metric("rouge2", "ROUGE-2", False),
    Metric("rougeL", "ROUGE-L", False),
    Metric("accuracy", "accuracy", False),
    Metric("auc", "area under the ROC curve", False),
    Metric("loss", "loss (nats)", True),
    Metric("tokens_per_second", "tokens per second", False),
)
_BY_NAME = {metric.name: metric for metric in _KNOWN}


def metric_named(name: str) -> Metric:
    """The metric called `name`; one we do not know counts as lower is better."""
    return _BY_NAME.get(name, Metric(name, name.replace("_", " "), True))


def headline_metric(result: Mapping[str, Any]) -> Metric | None:
    """The score a run is known by: the first metric of our list that `result` has, finite or not."""
    return next((metric for metric in _KNOWN if number(result.get(metric.name)) is not None), None)


def is_number(value: Any) -> bool:
    """Whether `value` is an int or a float (a bool is not)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(value: Any) -> float | None:
    """A number of a run's JSON files, where infinities and not-a-number are strings; None for anything else."""
    if is_number(value):
        return float(value)
    return float(value) if value in ("nan", "inf", "-inf") else None


def format_score(value: float | None, digits: int = 4) -> str:
    """2.91341 -> "2.9134"; large values lose the decimals nobody reads; None -> "-"."""
    if value is None:
        return "-"
    if isinstance(value, int) or (abs(value) >= 1000 and value == value):
        return f"{value:,.0f}"
    return f"{value:.{digits}f}"


def format_count(value: float) -> str:
    """41061376 -> "41.1 M", 820 -> "820"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 999.5 * size else f"{value / size:,.0f} {unit}"
    return f"{value:,.0f}"


def format_bytes(value: float) -> str:
    """1288490189 -> "1.20 GiB"."""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def format_seconds(value: float) -> str:
    """200 -> "3 min 20 s", 7300 -> "2 h 1 min"."""
    seconds = round(value)
    if seconds < 60:
        return f"{value:.1f} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
