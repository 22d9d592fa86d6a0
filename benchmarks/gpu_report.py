"""Rows from a GPU as tables, and the targets they are held to."""

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.cases import OURS
from benchmarks.gpu_window import MAX_OVER_NEEDED, ROWS, TARGET_TOKENS, WINDOW
from benchmarks.timing import Row

COLUMNS = (
    "case",
    "contender",
    "passes",
    "ms, median (20-80 %)",
    "theirs / ours",
    "TFLOP/s",
    "of product",
    "of roofline",
    "MiB, over needed",
    "error",
    "note",
)
WORDS = {"case", "contender", "passes", "note"}


def targets(rows: list[Row]) -> Iterator[tuple[str, str, str, bool]]:
    """(what, measured, wanted, whether it is met) of each row that a target speaks of."""
    for row in rows:
        if row.target is not None and row.ratio is not None:
            what = f"{row.case}, {row.passes}: time of {row.contender} over ours"
            yield what, f"{row.ratio:.3f}", f">= {row.target:.3g}", row.ratio >= row.target
    for row in rows:
        is_held = row.table in (WINDOW, ROWS) and row.contender == OURS and row.seq_len >= TARGET_TOKENS
        if is_held and row.memory_over_needed is not None:
            what = f"{row.case}, {row.passes}: peak memory over the tensors that must exist"
            share = row.memory_over_needed
            yield what, f"{share:.3f}", f"<= {MAX_OVER_NEEDED:.3g}", share <= MAX_OVER_NEEDED


def show(console: Console, rows: list[Row]) -> None:
    """Print a table for each kind of case and the table of targets."""
    for name in dict.fromkeys(row.table for row in rows):
        table = Table(title=f"{name} table", title_justify="left")
        for column in COLUMNS:
            table.add_column(column, justify="left" if column in WORDS else "right")
        for row in rows:
            if row.table == name:
                table.add_row(*_cells(row))
        console.print(table)
    table = Table(title="targets (set for an H100, bf16)")
    for column in ("what", "measured", "target", "met"):
        table.add_column(column)
    for what, figure, wanted, met in targets(rows):
        table.add_row(what, figure, wanted, "met" if met else "NO")
    console.print(table)


def _cells(row: Row) -> tuple[str, ...]:
    memory = "" if row.extra_memory_bytes is None else f"{row.extra_memory_bytes / 2**20:.0f}"
    over = "" if row.memory_over_needed is None else f", {row.memory_over_needed:.2f}"
    setup = "" if row.setup_s is None else f"set-up {row.setup_s:.1f} s"
    return (
        row.case or "",
        row.contender,
        row.passes,
        "" if row.median_ms is None else f"{row.median_ms:.3f} ({row.p20_ms:.3f}-{row.p80_ms:.3f})",
        "" if row.ratio is None else f"{row.ratio:.2f} ({row.ratio_p20:.2f}-{row.ratio_p80:.2f})",
        "" if row.tflops is None else f"{row.tflops:.0f}",
        _share(row.ceiling_share),
        _share(row.roofline_share),
        memory + over,
        "" if row.reference_error is None else f"{row.reference_error:.1e}",
        escape(", ".join(part for part in (setup, row.note or "") if part)),
    )


def _share(value):
    return "" if value is None else f"{value:.0%}"
