"""Runs side by side: mean and spread of a score over seeds.

    python -m reports.compare sweeps/ablation
    python -m reports.compare runs/a runs/b --metric bpc --by model.dim,optim.name --output results.md

RUN is a run folder, or a folder that holds run folders (a sweep). Runs whose configs differ in the seed alone
are one line; the columns are the settings that differ. Unfinished runs are listed with
their state (running, preempted, failed, or interrupted: its process is gone) and not averaged;
a score that is not finite stands on a line of its own.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.markup import escape
from rich.table import Table

from reports import style
from reports.compare_runs import MISSING, Comparison, Row, compare_runs
from reports.console import console, run_command
from reports.errors import ReportError
from reports.metrics import format_score, metric_named
from training.files import to_json, write_text

__all__ = ["Comparison", "Row", "compare_runs", "main"]

MAX_CELL = 44  # characters of one setting in a table


def value_text(value: Any) -> str:
    """A setting on one short line: [32, 32, 64] -> "32×2, 64"."""
    if not isinstance(value, list):
        return str(value)
    runs: list[tuple[str, int]] = []
    for entry in value:
        text = f"[{value_text(entry)}]" if isinstance(entry, list) else str(entry)
        if runs and runs[-1][0] == text:
            runs[-1] = (text, runs[-1][1] + 1)
        else:
            runs.append((text, 1))
    return ", ".join(f"{text}×{count}" if count > 1 else text for text, count in runs)


def _cell(value: Any) -> str:
    text = value_text(value)
    return text if len(text) <= MAX_CELL else f"{text[: MAX_CELL - 1]}…"


def table_lines(comparison: Comparison) -> list[list[str]]:
    """The table as text, its header first."""
    header = [_column(key, comparison) for key in comparison.keys]
    header += [f"{comparison.metric} mean", "std", "min – max", "runs", "seeds", "tokens/s", "status"]
    lines = [header]
    for row in comparison.rows:
        between = f"{format_score(row.low)} – {format_score(row.high)}" if row.num_runs > 1 else "-"
        speed = f"{row.tokens_per_second:,.0f}" if row.tokens_per_second is not None else "-"
        lines.append(
            [
                *(_cell(row.settings.get(key, MISSING)) for key in comparison.keys),
                format_score(row.mean),
                format_score(row.std),
                between,
                str(row.num_runs) if row.num_runs else "-",
                ", ".join(map(str, row.seeds)),
                speed,
                row.status,
            ]
        )
    return lines


def _column(key: str, comparison: Comparison) -> str:
    """The shortest ending of a dotted key that no other column shares."""
    parts = key.split(".")
    for length in range(1, len(parts) + 1):
        short = ".".join(parts[-length:])
        if not any(other != key and f".{other}".endswith(f".{short}") for other in comparison.keys):
            return short
    return key


def notes(comparison: Comparison) -> list[str]:
    """What the table does not show, in sentences."""
    better = "lower" if metric_named(comparison.metric).lower_is_better else "higher"
    said = [f"{comparison.metric}: {better} is better; std over runs (n - 1)."]
    for key, others in comparison.together.items():
        shown = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
        said.append(f"{key} stands also for {shown}, which change with it.")
    if comparison.averaged:
        said.append(f"Averaged over runs that differ in {', '.join(comparison.averaged)}.")
    return [*said, *comparison.problems]


def markdown(comparison: Comparison) -> str:
    """The table and its notes as Markdown."""
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in table_lines(comparison)]
    rule = ["---" if index < len(comparison.keys) else "---:" for index in range(len(lines[0]))]
    rows = [f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:])]
    return "\n".join(rows) + "\n\n" + "\n".join(f"- {note}" for note in notes(comparison)) + "\n"


def csv_text(comparison: Comparison) -> str:
    """The groups as CSV with full settings and unrounded numbers."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    keys = [key for shown in comparison.keys for key in (shown, *comparison.together.get(shown, ()))]
    numbers = ("mean", "std", "low", "high", "spread", "num_runs", "tokens_per_second")
    writer.writerow([*keys, "metric", *numbers, "seeds", "status", "runs"])
    for row in comparison.rows:
        settings = [value_text(row.settings.get(key, MISSING)) for key in keys]
        values = [getattr(row, name) for name in numbers]
        listed = [" ".join(map(str, row.seeds)), row.status, " ".join(row.runs)]
        writer.writerow([*settings, comparison.metric, *values, *listed])
    return buffer.getvalue()


def compare_figure(comparison: Comparison) -> Figure:
    """Means as points on bars from the lowest to the highest run, every run a small dot; the best on top."""
    rows = [row for row in comparison.rows if row.values]
    metric = metric_named(comparison.metric)
    with style.drawing():
        labels = [_row_label(row, comparison) for row in rows]
        num_lines = max(label.count("\n") + 1 for label in labels)
        figure = style.new_figure(7.6, max(0.34, 0.16 * num_lines + 0.1) * len(rows) + 0.9)
        axes = figure.subplots()
        for index, row in enumerate(rows):
            low, mean, high = (float(value) for value in (row.low, row.mean, row.high) if value is not None)
            axes.plot([low, high], [index, index], color=style.SKY, linewidth=5, solid_capstyle="round")
            axes.plot(row.values, [index] * row.num_runs, "o", color="white", markeredgecolor=style.MUTED, markersize=4)
            axes.plot([mean], [index], "D", color=style.BLUE, markersize=6)
        axes.set_yticks(range(len(rows)), labels, fontsize=8)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.margins(x=0.08)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        better = "lower" if metric.lower_is_better else "higher"
        axes.set_xlabel(f"{metric.label} ({better} is better)\ndiamond: mean; bar: lowest to highest run")
    return figure


def _row_label(row: Row, comparison: Comparison) -> str:
    """What tells the row apart, in lines of about 50 characters."""
    names = {key: "" if key == "experiment_name" else f"{_column(key, comparison)} " for key in comparison.keys}
    parts = [f"{name}{_cell(row.settings.get(key, MISSING))}" for key, name in names.items()]
    parts.append(f"{row.num_runs} runs" if row.num_runs > 1 else "1 run")
    return textwrap.fill(", ".join(map(style.label_text, parts)), 50)


def write_output(comparison: Comparison, output: Path) -> list[Path]:
    """Write the table to a .md or .csv file and, where a run has finished, the picture beside it as .png."""
    text = markdown(comparison) if output.suffix.lower() == ".md" else csv_text(comparison)
    written = [output]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        if any(row.values for row in comparison.rows):
            written.append(style.save_figure(compare_figure(comparison), output.with_suffix(".png")))
            if output.suffix.lower() == ".md":
                text += f"\n![{comparison.metric} by setting]({output.stem}.png)\n"
        write_text(output, text)
    except OSError as error:
        raise ReportError(f"--output {output} cannot be written: {error}") from error
    return written


def _print(comparison: Comparison) -> None:
    header, *lines = table_lines(comparison)
    table = Table()
    for index, name in enumerate(header):
        table.add_column(escape(name), justify="left" if index < len(comparison.keys) else "right")
    for line in lines:
        table.add_row(*map(escape, line))
    out = console()
    out.print(table)
    for note in notes(comparison):
        out.print(escape(note))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ReportError(f"{message}; see python -m reports.compare --help")


def main(arguments: Sequence[str]) -> None:
    """The command; raises errors with an `exit_code` for what the user can mend."""
    parser = _Parser(
        prog="python -m reports.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or a folder that holds some")
    parser.add_argument("--metric", help="a number of result.json (default: the headline score)")
    parser.add_argument("--by", metavar="KEY,KEY", help="group by these config keys alone")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--output", type=Path, metavar="FILE.md|.csv", help="write the table, a picture beside it")
    options = parser.parse_args(list(arguments))
    if options.output and options.output.suffix.lower() not in (".md", ".csv"):
        raise ReportError(f"--output {options.output}: the table is a .md or a .csv file")
    by = [key.strip() for key in options.by.split(",") if key.strip()] if options.by else None
    comparison = compare_runs(options.runs, options.metric, by)
    written = write_output(comparison, options.output) if options.output else []
    if options.json:
        rows = [row.as_json() for row in comparison.rows]
        shown = {"metric": comparison.metric, "keys": comparison.keys, "together": comparison.together}
        print(to_json({**shown, "averaged": comparison.averaged, "problems": comparison.problems, "rows": rows}))
        return
    _print(comparison)
    for path in written:
        print(f"written: {path}")
    if not written:
        print("a file and a picture: add --output results.md")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
