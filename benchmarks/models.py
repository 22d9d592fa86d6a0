"""Whole encoders beside transformers' same models, in time and peak memory: `python -m benchmarks.models --help`.

Each case of `benchmarks.encoders` has a process of its own, and nothing is timed before the outputs agree. At 16,384
tokens memory is what is asked for, and the rounds are few; every row says how many.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import encoders
from benchmarks.agreement import TOLERANCE, Disagreement, check, in_a_line
from benchmarks.cases import FORWARD, OURS, matching
from benchmarks.encoders import CASES, EncoderCase
from benchmarks.memory import extra_peak_bytes, peak_on_gpu
from benchmarks.timing import Row, environment, interleave, interleave_on_gpu, write_csv

TABLE = "encoder"
MAX_ERROR = 1e-4  # of a row of states on a CPU, relative: other keys give more, rounding in float32 some 1e-6
MIN_COLUMNS = 130
HEADINGS = ("case", "against", "layers", "threads", "pairs", "ours, ms", "theirs, ms", "theirs / ours (20-80 %)",
            "extra peak, MiB", "over theirs", "with weights")  # fmt: skip


def measure(case: EncoderCase, num_threads: int) -> tuple[list[Row], str | None]:
    """A row for each side, and what went wrong if anything did: their times, the ratio, peak memory of each."""
    torch.set_num_threads(num_threads)
    rows = {side: _row(case, side) for side in (OURS, case.peer)}
    try:
        _measure(case, rows, num_threads)
    except Disagreement as error:
        failure = str(error)
    except Exception as error:  # one case that does not run here leaves the others their rows
        failure = in_a_line(error, limit=300)
    else:
        return list(rows.values()), None
    for row in rows.values():
        row.note = f"not measured: {failure}"
    return list(rows.values()), f"{case.name}: {failure}"


def _measure(case, rows, num_threads):
    modules = {side: encoders.build(case, side) for side in rows}
    with torch.no_grad():
        ours, theirs = (encoders.states(case, module)() for module in modules.values())
    tolerance = MAX_ERROR if case.device == "cpu" else TOLERANCE[case.dtype][FORWARD]
    error = check(case.peer, [ours], [theirs], tolerance)
    del ours, theirs
    calls = {side: encoders.call_of(case, module) for side, module in modules.items()}
    for side, row in rows.items():
        row.weight_bytes = sum(value.nbytes for value in modules[side].parameters())
        row.extra_memory_bytes = _extra_memory(case, side, calls[side], num_threads)
    if case.device == "cpu":  # the calls that were compared have warmed up both sides
        seconds = interleave(calls, num_rounds=case.num_rounds, device=case.device, num_warmup=0)
    else:
        seconds = interleave_on_gpu(calls, num_rounds=case.num_rounds, device=case.device)
    for side, row in rows.items():
        row.time(seconds[side])
        row.note = f"both sides in {'train' if case.in_training else 'eval'}(), dropout 0"
    row = rows[case.peer].ratio_to(seconds[case.peer], seconds[OURS])
    row.max_error, row.target, row.max_memory_ratio = error, case.min_ratio, case.max_memory_ratio
    row.memory_ratio = rows[OURS].extra_memory_bytes / max(row.extra_memory_bytes, 1)


def _extra_memory(case, side, call, num_threads):
    if case.device != "cpu":
        return peak_on_gpu(call)
    small = replace(case.quick(), seq_len=128)  # the libraries are ready after it
    orders = ({"contender": side, "sizes": asdict(one)} for one in (case, small))
    return extra_peak_bytes("benchmarks.encoders:encoder_call", *orders, device=case.device, num_threads=num_threads)


def _row(case, side):
    columns = {column.name for column in fields(Row)} - {"table", "contender", "num_rounds", "max_memory_ratio"}
    sizes = {name: size for name, size in asdict(case).items() if name in columns}
    return Row(TABLE, side, case=case.name, mechanism=case.model, num_globals=case.window and 1, **sizes)


def targets(rows: Sequence[Row]) -> Iterator[tuple[str, str, str, str]]:
    """(what, measured, target, met) of each target that the rows speak of."""
    for ours, theirs in pairs(rows):
        if theirs.ratio is not None and theirs.target is not None:
            met = "yes" if theirs.ratio >= theirs.target else "NO"
            yield f"{theirs.case}: times as fast", f"{theirs.ratio:.3f}", f">= {theirs.target:.3g}", met
        if theirs.memory_ratio is not None and theirs.max_memory_ratio is not None:
            limit = theirs.max_memory_ratio
            for what, share in (
                ("extra peak memory over theirs", theirs.memory_ratio),
                ("the same with the weights", _with_weights(ours, theirs)),
            ):
                yield f"{theirs.case}: {what}", f"{share:.3f}", f"<= {limit:.3g}", "yes" if share <= limit else "NO"


def pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """(ours, theirs) of each case."""
    return list(zip(rows[::2], rows[1::2], strict=True))


def _with_weights(ours, theirs):
    held = [row.extra_memory_bytes + row.weight_bytes for row in (ours, theirs)]
    return held[0] / held[1]


def markdown(rows: Sequence[Row], num_threads: int) -> str:
    """The table of docs/results.md."""
    lines = [_line(HEADINGS), _line(["---"] * len(HEADINGS))]
    return "\n".join(lines + [_line(_cells(ours, theirs, num_threads)) for ours, theirs in pairs(rows)])


def _line(cells):
    return f"| {' | '.join(cells)} |"


def _cells(ours, theirs, num_threads):
    cells = [theirs.case, theirs.contender, str(theirs.num_layers), str(num_threads)]
    if theirs.ratio is None:
        return [*cells, "0", theirs.note, *[""] * (len(HEADINGS) - len(cells) - 2)]
    memory = [f"{row.extra_memory_bytes / 2**20:,.0f}" for row in (ours, theirs)]
    return [
        *cells,
        str(theirs.num_rounds),
        f"{ours.median_ms:,.0f}",
        f"{theirs.median_ms:,.0f}",
        f"{theirs.ratio:.2f} ({theirs.ratio_p20:.2f}-{theirs.ratio_p80:.2f})" if theirs.num_rounds > 1 else "one pair",
        f"{memory[0]} against {memory[1]}",
        f"{theirs.memory_ratio:.2f}",
        f"{_with_weights(ours, theirs):.2f}",
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the CSV after every case, print table and targets; 0, or 1 where outputs disagree or one fails."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for name, value in (("rounds", options.rounds), ("threads", options.threads)):
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}, it must be at least 1")
    try:
        cases = list(CASES) if options.only is None else matching(CASES, options.only)
    except ValueError as error:
        parser.error(f"--only: {error}")
    if options.list:
        print("\n".join(f"{case.name:26} T {case.seq_len}, {case.num_layers} layers, {case.passes}" for case in cases))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if options.quick:  # all lengths are one
        cases = [case.quick() for case in cases if options.only or case.seq_len == min(one.seq_len for one in CASES)]
    if options.device == "cuda":
        cases = [replace(case, device="cuda", dtype=_gpu_dtype(case), num_rounds=7) for case in cases]
    if options.rounds is not None:
        cases = [replace(case, num_rounds=options.rounds) for case in cases]
    output = options.output
    if output is None and not options.quick:
        output = Path(f"benchmarks/results/models_{options.device}.csv")
    torch.set_num_threads(options.threads or torch.get_num_threads())
    return _run(cases, output=output, budget=options.budget, held=not options.quick)


def _gpu_dtype(case):
    # transformers' pseudo-inverse adds a float32 identity and refuses other dtypes
    return "float32" if case.model == "nystromformer" else "bfloat16"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models",
        description="Whole encoders of base size beside transformers' same models, in time and peak memory. Exit code "
        "1 where outputs disagree or a case fails; a target that is missed is shown, and no error.",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda: bf16 (default: cpu)")
    parser.add_argument("--only", metavar="NAMES", help="cases, separated by commas, with * and ? (default: all)")
    parser.add_argument("--list", action="store_true", help="print the cases")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and two rounds: shows that it runs")
    parser.add_argument("--rounds", type=int, help="pairs of each timing (default: what the case says)")
    parser.add_argument("--threads", type=int, help="of each process (default: PyTorch's choice)")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no case after so long (default: all)")
    parser.add_argument("--output", type=Path, help="CSV (default benchmarks/results/models_DEVICE.csv; quick: none)")
    return parser


def _run(cases: Sequence[EncoderCase], *, output: Path | None, budget: float | None, held: bool) -> int:
    console = Console()
    console.width = max(console.width, MIN_COLUMNS)  # a log has no width of its own
    started, shared, num_threads = time.perf_counter(), environment(), torch.get_num_threads()
    rows: list[Row] = []
    failures, left_out = [], []
    for number, case in enumerate(cases, 1):
        elapsed = time.perf_counter() - started
        if budget is not None and elapsed >= budget:
            left_out.append(case.name)
            continue
        console.print(f"[dim]{elapsed:4.0f} s  {number}/{len(cases)} {case.name}: {OURS}, {case.peer}")
        found, failure = _in_own_process(case, num_threads)
        rows += found
        failures += [failure] if failure else []
        if output is not None:
            write_csv(output, rows, shared)
    print(markdown(rows, num_threads))
    console.print("targets" + ("" if held else " (set for CPU at the full sizes, shown for orientation)"))
    for what, measured, target, met in targets(rows):
        console.print(f"  {what}: {measured} ({target}): {met}", highlight=False)
    console.print(", ".join(f"{name} {value}" for name, value in shared.items()))
    if left_out:
        console.print(f"left out after {budget:.0f} s: {', '.join(left_out)}")
    if output is not None and rows:
        console.print(f"written: {output}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _in_own_process(case, num_threads):
    """`measure` in a fresh process; one that dies, as for want of memory, is a failure of its case alone."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        try:
            return pool.submit(measure, case, num_threads).result()
        except RuntimeError as error:  # BrokenProcessPool
            failure = in_a_line(error)
            rows = [_row(case, side) for side in (OURS, case.peer)]
            for row in rows:
                row.note = f"not measured: {failure}"
            return rows, f"{case.name}: {failure}"


if __name__ == "__main__":
    sys.exit(main())
