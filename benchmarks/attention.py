"""Attention mechanisms against their peers, in time and memory: `python -m benchmarks.attention --help`.

Three tables each. module: query, key and value projections included, with peak memory, against transformers' module.
kernel: attention alone, against dense SDPA and compiled FlexAttention. scaling: our time and memory from 4K to 64K
tokens. Each mechanism has a process of its own. On a GPU the cases of `benchmarks.gpu_cases` take their place. Nothing
is timed before the outputs agree.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import gpu
from benchmarks.agreement import Disagreement
from benchmarks.gpu_cases import chosen
from benchmarks.tables import MAX_SHARE, MAX_SLOPE, all_tables, mechanism_of
from benchmarks.timing import Row, environment, write_csv

# each is a file of this folder with a description `MECHANISM`
MECHANISMS = ("window", "block_sparse", "nystrom")
ALL = "all"
MIN_COLUMNS = 130
MIN_GPU_COLUMNS = 200


def _targets(rows: list[Row]) -> Iterator[tuple[str, str, str, str, str]]:
    """(mechanism, what, measured, target, met) of each target that the rows speak of."""
    for row in rows:
        name = str(row.mechanism)
        if row.ratio is not None and row.target is not None:
            what = f"{row.table}, {row.passes}, times as fast as {row.contender}"
            yield name, what, *_target(row.ratio, row.target, at_least=True)
        if row.memory_ratio is not None:
            what = f"{row.table}, {row.passes}, extra peak memory over that of {row.contender}"
            yield name, what, *_target(row.memory_ratio, mechanism_of(name).max_memory_ratio)
        if row.slope is not None:
            yield name, f"{row.passes}, time, {row.note}", *_target(row.slope, MAX_SLOPE)
        if row.memory_slope is not None:
            yield name, f"{row.passes}, extra peak memory, {row.note}", *_target(row.memory_slope, MAX_SLOPE)
        if row.largest_share is not None:
            yield name, f"{row.passes}, largest tensor over T x T, at worst", *_target(row.largest_share, MAX_SHARE)


def _target(value, limit, *, at_least=False):
    met = value >= limit if at_least else value <= limit
    return f"{value:.3f}", f"{'>=' if at_least else '<='} {limit:.3g}", "yes" if met else "NO"


def _show(console: Console, rows: list[Row], held: bool) -> None:
    for mechanism, name in dict.fromkeys((row.mechanism, row.table) for row in rows):
        table = Table(title=f"{mechanism}: {name} table", title_justify="left")
        for column in (
            "contender",
            "passes",
            "tokens",
            "ms, median (20-80 %)",
            "theirs / ours",
            "extra MiB",
            "note",
        ):
            table.add_column(column, justify="left" if column in ("contender", "passes", "note") else "right")
        for row in rows:
            if (row.mechanism, row.table) == (mechanism, name) and row.slope is None:
                table.add_row(*_cells(row))
        console.print(table)
    table = Table(title="targets" + ("" if held else " (set for CPU at the full sizes, shown for orientation)"))
    for column in ("mechanism", "what", "measured", "target", "met"):
        table.add_column(column)
    for cells in _targets(rows):
        table.add_row(*cells)
    console.print(table)


def _cells(row):
    milliseconds = "" if row.median_ms is None else f"{row.median_ms:.1f} ({row.p20_ms:.1f}-{row.p80_ms:.1f})"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f} ({row.ratio_p20:.2f}-{row.ratio_p80:.2f})"
    memory = "" if row.extra_memory_bytes is None else f"{row.extra_memory_bytes / 2**20:.0f}"
    setup = "" if row.setup_s is None else f"set-up {row.setup_s:.1f} s"
    return row.contender, row.passes, str(row.seq_len), milliseconds, ratio, memory, row.note or setup


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the CSV, print the tables; 0, or 1 where outputs disagree."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}, it must be at least 1")
    if options.device == "cpu" and (options.budget is not None or options.cases is not None):
        parser.error("--budget and --cases go with --device cuda: the CPU has three tables of each --mechanism")
    if options.device == "cuda" and options.mechanism != ALL:
        parser.error("--mechanism goes with --device cpu: on a GPU --cases chooses, by name")
    try:
        cases = chosen(options.cases, is_quick=options.quick)
    except ValueError as error:
        parser.error(f"--cases: {error}")
    if options.list:
        print("\n".join(f"{case.name:18} {case.sizes}: {case.purpose}" for case in cases))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    num_rounds = options.rounds or (2 if options.quick else 9)
    output = options.output
    if output is None and not options.quick:
        one = "" if options.mechanism == ALL else f"_{options.mechanism}"
        output = Path(f"benchmarks/results/attention_{options.device}{one}.csv")
    console = Console()
    # a log has no width of its own
    console.width = max(console.width, MIN_COLUMNS if options.device == "cpu" else MIN_GPU_COLUMNS)
    if options.device == "cuda":
        given = {"output": output, "budget": options.budget, "num_rounds": num_rounds, "is_quick": options.quick}
        return gpu.run(cases, console=console, **given)
    mechanisms = MECHANISMS if options.mechanism == ALL else (options.mechanism,)
    return _run_on_cpu(mechanisms, options.quick, num_rounds, output, console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention",
        description="Attention mechanisms against their peers, in time and memory. Exit code 1 where results disagree; "
        "a target that is missed is shown, and no error.",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--mechanism", default=ALL, choices=(*MECHANISMS, ALL), help="cpu: only this one (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two rounds: shows that it runs")
    parser.add_argument("--rounds", type=int, help="rounds of each timing (default 9)")
    parser.add_argument(
        "--output",
        type=Path,
        help="CSV (default benchmarks/results/attention_DEVICE.csv, of one mechanism attention_DEVICE_MECHANISM.csv; "
        "quick: none), on a GPU written after every case",
    )
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="cuda: begin no case after so long (default: all)"
    )
    parser.add_argument(
        "--cases", metavar="NAMES", help="cuda: only these, separated by commas, with * and ? (default: all)"
    )
    parser.add_argument("--list", action="store_true", help="print the cases of --device cuda with sizes and purpose")
    return parser


def _run_on_cpu(
    mechanisms: Sequence[str], is_quick: bool, num_rounds: int, output: Path | None, console: Console
) -> int:
    shared = environment()
    rows: list[Row] = []
    try:
        for found in _measure_each(mechanisms, is_quick=is_quick, num_rounds=num_rounds):
            rows += found
    except Disagreement as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _show(console, rows, held=not is_quick)
    console.print(", ".join(f"{name} {value}" for name, value in shared.items()))
    if output is not None:
        write_csv(output, rows, shared)
        console.print(f"written: {output}")
    return 0


def _measure_each(mechanisms: Sequence[str], **how) -> Iterator[list[Row]]:
    """The rows of each mechanism; of several in processes of their own, as each leaves the heap another state."""
    measure = partial(_measure, **how)
    if len(mechanisms) == 1:
        yield measure(mechanisms[0])
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn, max_tasks_per_child=1) as pool:
        yield from pool.map(measure, mechanisms)


def _measure(name: str, **how) -> list[Row]:
    rows: list[Row] = []
    for table in all_tables(mechanism_of(name), **how):
        rows += table
        Console().print(f"[dim]{name}: {rows[-1].table} table measured")
    return rows


if __name__ == "__main__":
    sys.exit(main())
