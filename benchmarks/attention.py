"""Window attention against its peers, in time and memory: `python -m benchmarks.attention --help`.

Three tables. module: query, key and value projections included, with peak memory, against transformers'
LongformerSelfAttention. kernel: attention alone, against dense SDPA and compiled FlexAttention. scaling: our
time from 4K to 64K tokens. On a GPU the cases of `benchmarks.gpu_cases` take their place. Nothing is timed before the
outputs agree.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import gpu, peers
from benchmarks.agreement import Disagreement
from benchmarks.cases import (
    BOTH,
    DENSE,
    FLEX,
    FORWARD,
    LONGFORMER,
    OURS,
    Shape,
    make_call,
    make_module_call,
    random_tensors,
)
from benchmarks.gpu_cases import chosen
from benchmarks.memory import LargestTensor, extra_peak_bytes
from benchmarks.timing import Row, environment, interleave, log_slope, write_csv
from kernels.window_attention import window_attention

TOLERANCE = 1e-4
# what the CPU run is held to, at the full sizes
MIN_RATIO = {FORWARD: 2.5, BOTH: 4.0}
MAX_MEMORY_RATIO = 1 / 3
MAX_SLOPE = 1.05
MAX_SHARE = 0.5  # of T x T elements in the largest tensor: far enough from having made one
MIN_COLUMNS = 130
MIN_GPU_COLUMNS = 200
QUICK = Shape(seq_len=256, num_heads=2, head_dim=16, window=32)
LENGTHS = (4096, 8192, 16384, 32768, 65536)
QUICK_LENGTHS = (256, 512, 1024)


def row_of(table: str, contender: str, passes: str, shape: Shape, **entries) -> Row:
    """An empty row of a case."""
    return Row(table, contender, passes, **asdict(shape), **entries)


def module_rows(shape: Shape, num_rounds: int) -> Iterator[Row]:
    """Both modules, forward and forward + backward: times, their ratio, peak memory of a fresh process."""
    error = _disagreement(
        LONGFORMER, *(make_module_call(side, FORWARD, asdict(shape))() for side in (OURS, LONGFORMER))
    )
    for passes in (FORWARD, BOTH):
        calls = {side: make_module_call(side, passes, asdict(shape)) for side in (OURS, LONGFORMER)}
        seconds = interleave(calls, num_rounds=num_rounds, device=shape.device)
        memory = {side: _module_memory(side, passes, shape) for side in calls}
        for side, times in seconds.items():
            row = row_of("module", side, passes, shape, extra_memory_bytes=memory[side]).time(times)
            if side != OURS:
                row.ratio_to(times, seconds[OURS])
                row.max_error, row.memory_ratio = error, memory[OURS] / max(memory[side], 1)
            yield row


def _module_memory(contender, passes, shape):
    small = replace(shape, seq_len=2 * shape.window)
    order = [{"contender": contender, "passes": passes, "shape": asdict(size)} for size in (shape, small)]
    return extra_peak_bytes(
        "benchmarks.cases:make_module_call",
        *order,
        device=shape.device,
        num_threads=torch.get_num_threads(),
    )


def kernel_rows(shape: Shape, num_rounds: int) -> Iterator[Row]:
    """The attention alone; FlexAttention cannot run backward on CPU."""
    sizes = (shape.batch, shape.seq_len, shape.num_heads, shape.head_dim)
    dtype = getattr(torch, shape.dtype)
    functions: dict[str, Callable] = {OURS: lambda *qkv: window_attention(*qkv, window=shape.window)}
    setup, errors, notes = {}, {}, {}
    qkv = random_tensors(3, sizes, shape, requires_grad=False)
    makers = {
        DENSE: lambda: peers.dense_sdpa(shape.seq_len, shape.window, shape.device, dtype),
        FLEX: lambda: peers.compiled_flex(qkv, shape.window),
    }
    with torch.no_grad():
        expected = functions[OURS](*qkv)
        for name, make in makers.items():
            start = time.perf_counter()
            try:
                function = make()
            except (
                RuntimeError,
                NotImplementedError,
            ) as error:  # no compiler, or a head size it does not take
                notes[name] = f"not available: {str(error).splitlines()[0]}"
                continue
            setup[name] = time.perf_counter() - start
            errors[name] = _disagreement(name, expected, function(*qkv))
            functions[name] = function
    for passes in (FORWARD, BOTH):
        qkv = random_tensors(3, sizes, shape, requires_grad=passes == BOTH)
        skipped = {FLEX} if passes == BOTH and shape.device == "cpu" else set()
        calls = {name: make_call(call, qkv, passes) for name, call in functions.items() if name not in skipped}
        seconds = interleave(calls, num_rounds=num_rounds, device=shape.device)
        for name, times in seconds.items():
            row = row_of("kernel", name, passes, shape, setup_s=setup.get(name), max_error=errors.get(name))
            row.time(times)
            yield row if name == OURS else row.ratio_to(times, seconds[OURS])
        for name in skipped & functions.keys():
            yield row_of("kernel", name, passes, shape, note="not available: no backward on CPU")
        for name, note in notes.items():
            yield row_of("kernel", name, passes, shape, note=note)


def scaling_rows(shape: Shape, lengths: tuple[int, ...], num_rounds: int) -> Iterator[Row]:
    """Our attention alone over lengths, the slope of its cost, and the largest storage it made."""
    for passes in (FORWARD, BOTH):
        calls, largest = {}, {}
        for length in lengths:
            sizes = (shape.batch, length, shape.num_heads, shape.head_dim)
            qkv = random_tensors(3, sizes, shape, requires_grad=passes == BOTH)
            calls[length] = make_call(lambda *qkv: window_attention(*qkv, window=shape.window), qkv, passes)
            with LargestTensor() as seen:
                calls[length]()
            largest[length] = seen.elements
        seconds = interleave(calls, num_rounds=num_rounds, device=shape.device, num_warmup=1)
        for length in lengths:
            row = row_of("scaling", OURS, passes, replace(shape, seq_len=length), largest_tensor=largest[length])
            yield row.time(seconds[length])
        slope = log_slope(list(lengths), seconds)
        yield row_of(
            "scaling",
            OURS,
            passes,
            replace(shape, seq_len=lengths[-1]),
            num_rounds=num_rounds,
            slope=slope.median,
            slope_p20=slope.low,
            slope_p80=slope.high,
            largest_tensor=largest[lengths[-1]],
            largest_share=max(largest[length] / length**2 for length in lengths),
            note=f"slope over {lengths[0]} to {lengths[-1]} tokens",
        )


def _disagreement(name, ours, theirs):
    """Largest absolute difference, refused where it is not that of rounding."""
    error = (ours - theirs).abs().max().item()
    if not error <= TOLERANCE:
        raise Disagreement(f"{name} differs from ours by {error:.3g}, more than {TOLERANCE}: nothing is timed")
    return error


def _targets(rows: list[Row]) -> Iterator[tuple[str, str, str, str]]:
    """(what, measured, target, met) of each target that the rows speak of."""
    for row in rows:
        if row.ratio is not None and row.memory_ratio is not None:
            what = f"{row.passes}, times as fast as {row.contender}"
            yield _target(what, row.ratio, MIN_RATIO[row.passes], at_least=True)
            yield _target(f"{row.passes}, extra peak memory over theirs", row.memory_ratio, MAX_MEMORY_RATIO)
        if row.slope is not None and row.largest_share is not None:
            yield _target(f"{row.passes}, {row.note}", row.slope, MAX_SLOPE)
            yield _target(f"{row.passes}, largest tensor over T x T, at worst", row.largest_share, MAX_SHARE)


def _target(what, value, limit, *, at_least=False):
    met = value >= limit if at_least else value <= limit
    return what, f"{value:.3f}", f"{'>=' if at_least else '<='} {limit:.3g}", "yes" if met else "NO"


def _show(console: Console, rows: list[Row], held: bool) -> None:
    for name in dict.fromkeys(row.table for row in rows):
        table = Table(title=f"{name} table", title_justify="left")
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
            if row.table == name and row.slope is None:
                table.add_row(*_cells(row))
        console.print(table)
    table = Table(title="targets" + ("" if held else " (set for CPU at the full sizes, shown for orientation)"))
    for column in ("what", "measured", "target", "met"):
        table.add_column(column)
    for what, figure, target, met in _targets(rows):
        table.add_row(what, figure, target, met)
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
    if options.device == "cpu" and (options.budget is not None or options.cases is not None):
        parser.error("--budget and --cases go with --device cuda: the CPU has its three tables")
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
        output = Path(f"benchmarks/results/attention_{options.device}.csv")
    console = Console()
    # a log has no width of its own
    console.width = max(console.width, MIN_COLUMNS if options.device == "cpu" else MIN_GPU_COLUMNS)
    if options.device == "cuda":
        given = {"output": output, "budget": options.budget, "num_rounds": num_rounds, "is_quick": options.quick}
        return gpu.run(cases, console=console, **given)
    return _run_on_cpu(QUICK if options.quick else Shape(), options.quick, num_rounds, output, console)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention",
        description="Window attention against its peers, in time and memory. Exit code 1 where results disagree; a "
        "target that is missed is shown, and no error.",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two rounds: shows that it runs")
    parser.add_argument("--rounds", type=int, help="rounds of each timing (default 9)")
    parser.add_argument(
        "--output",
        type=Path,
        help="CSV (default benchmarks/results/attention_DEVICE.csv; quick: none), on a GPU written after every case",
    )
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="cuda: begin no case after so long (default: all)"
    )
    parser.add_argument(
        "--cases", metavar="NAMES", help="cuda: only these, separated by commas, with * and ? (default: all)"
    )
    parser.add_argument("--list", action="store_true", help="print the cases of --device cuda with sizes and purpose")
    return parser


def _run_on_cpu(shape: Shape, is_quick: bool, num_rounds: int, output: Path | None, console: Console) -> int:
    shared = environment()
    rows = []
    tables = (
        module_rows(shape, num_rounds),
        kernel_rows(shape, num_rounds),
        scaling_rows(shape, QUICK_LENGTHS if is_quick else LENGTHS, num_rounds),
    )
    try:
        for table in tables:
            rows += table
            console.print(f"[dim]{rows[-1].table} table measured")
    except Disagreement as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _show(console, rows, held=not is_quick)
    console.print(", ".join(f"{name} {value}" for name, value in shared.items()))
    if output is not None:
        write_csv(output, rows, shared)
        console.print(f"written: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
