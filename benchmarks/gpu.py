"""The cases of `benchmarks.gpu_cases`, measured one after the other: rows, problems on the way, what was left out."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from benchmarks import flex
from benchmarks.agreement import Disagreement, in_a_line
from benchmarks.cases import BOTH, FORWARD, OURS
from benchmarks.gpu_block_sparse import BlockCase, BlockProblem
from benchmarks.gpu_case import MODULE, Case
from benchmarks.gpu_nystrom import NystromCase, NystromProblem
from benchmarks.gpu_report import show
from benchmarks.gpu_window import WindowCase, WindowProblem
from benchmarks.memory import peak_on_gpu
from benchmarks.roofline import Ceilings, measure_ceilings
from benchmarks.timing import Row, environment, interleave_on_gpu, synchronize, write_csv

SEARCH_ROUNDS = 3
PROBLEMS: dict[type[Case], Callable] = {
    WindowCase: WindowProblem,
    BlockCase: BlockProblem,
    NystromCase: NystromProblem,
}
QUICK_SIZES = {"size": 1024, "copy_bytes": 2**26}


@dataclass
class Session:
    """What all cases share, and the contenders of ours that failed or disagreed."""

    device: str
    ceilings: Ceilings
    clock: Callable[[Mapping, int], dict]  # (calls, rounds) -> seconds of each round
    num_rounds: int
    budget: float | None = None  # seconds after which no case is begun
    started: float = field(default_factory=time.perf_counter)
    failures: list[str] = field(default_factory=list)

    def elapsed(self) -> float:
        """Seconds since the session began."""
        return time.perf_counter() - self.started

    def out_of_time(self) -> bool:
        """Whether the budget is spent."""
        return self.budget is not None and self.elapsed() >= self.budget


def measure(case: Case, session: Session) -> list[Row]:
    """Both passes of every contender of a case. One that fails becomes a row with a note; nothing is raised for it."""
    flex.forget_compiled()
    try:
        problem = PROBLEMS[type(case)](case, session.device)
    except torch.OutOfMemoryError:
        return [_row(case, OURS, passes, session.device, note="no memory for the inputs") for passes in (FORWARD, BOTH)]
    return [row for passes in (FORWARD, BOTH) for row in _measure_passes(problem, passes, session)]


def _measure_passes(problem, passes, session):
    calls, rows = {}, {}
    for name in (OURS, *problem.case.contenders):
        rows[name] = row = _row(problem.case, name, passes, session.device)
        if calls or name == OURS:
            call = _prepare(problem, name, row, session)
            if call is not None:
                calls[name] = call
        else:
            row.note = "not measured: ours gave no result to compare with"
    if calls:
        _time(problem.case, calls, rows, session)
    return list(rows.values())


def _prepare(problem, name, row, session):
    """The call to time, once its first result was found right; None, with the reason in the row's note."""
    try:
        function, row.note = problem.contender(
            name, row.passes, lambda calls: session.clock(calls, SEARCH_ROUNDS), session.out_of_time
        )
        start = time.perf_counter()
        call = problem.call(name, function, row.passes)
        result = call()
        synchronize(session.device)
        row.setup_s = problem.made_in(name) + time.perf_counter() - start
        row.max_error, row.reference_error = problem.check(name, function, row.passes, result)
        del result
        if session.device != "cpu":
            _enter_memory(row, problem, peak_on_gpu(call))
        return call
    except Disagreement as error:
        row.note = str(error)
        session.failures.append(f"{problem.case.name}: {error}")
    except torch.OutOfMemoryError:
        row.note = "out of memory"
    except Exception as error:  # a peer that is not there, or that its compiler does not take, ends nothing
        row.note = f"not available: {in_a_line(error)}"
        if name == OURS:
            session.failures.append(f"{problem.case.name}, {row.passes}: ours fails: {row.note}")
    _free(session.device)
    return None


def _enter_memory(row, problem, extra):
    row.extra_memory_bytes = extra
    row.needed_bytes = problem.case.as_computed_by(row.contender).work.needed_bytes.get(row.passes)
    if row.needed_bytes is not None and row.seq_len == problem.case.seq_len:
        held = problem.held_bytes + (problem.gradient.nbytes if row.passes == BOTH else 0)
        row.memory_over_needed = (extra + held) / row.needed_bytes


def _time(case, calls, rows, session):
    try:
        seconds = session.clock(calls, session.num_rounds)
    except torch.OutOfMemoryError:
        for name in calls:
            rows[name].note = "out of memory while it was timed beside the others"
        _free(session.device)
        return
    for name, times in seconds.items():
        row = rows[name].time(times)
        _enter_rates(row, case.as_computed_by(name), session.ceilings)
        if name == OURS:
            continue
        row.ratio_to(times, seconds[OURS])
        row.target = case.target(name, row.passes)
        ours = rows[OURS].extra_memory_bytes
        if case.kind == MODULE and ours is not None and row.extra_memory_bytes:
            row.memory_ratio = ours / row.extra_memory_bytes


def _enter_rates(row, computed, ceilings):
    work, seconds = computed.work, row.median_ms * 1e-3
    row.tflops = work.useful_flops(row.passes) / seconds / 1e12
    row.ceiling_share = row.tflops * 1e12 / ceilings.flops[computed.dtype]
    row.roofline_share = work.bound(row.passes, ceilings, computed.dtype) / seconds


def _row(case, contender, passes, device, **entries):
    computed, columns = case.as_computed_by(contender), {column.name for column in fields(Row)}
    sizes = {"window": None}  # the one column without a default that not every mechanism has
    sizes |= {size.name: getattr(computed, size.name) for size in fields(computed) if size.name in columns}
    return Row(case.kind, contender, passes, device=device, case=case.name, **sizes, **entries)


def _free(device):
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def run(
    cases: list[Case],
    *,
    console: Console,
    output: Path | None,
    budget: float | None,
    num_rounds: int,
    is_quick: bool,
) -> int:
    """Measure the cases, the CSV written anew after each, and print tables and targets; 1 where results disagree."""
    if is_quick:
        cases = [case.quick() for case in cases]
    device, dtypes = "cuda", sorted({case.dtype for case in cases})

    def clock(calls, rounds):
        return interleave_on_gpu(calls, num_rounds=rounds)

    started = time.perf_counter()
    ceilings = measure_ceilings(
        dtypes, lambda calls: clock(calls, num_rounds), device=device, **(QUICK_SIZES if is_quick else {})
    )
    console.print(f"[dim]{torch.cuda.get_device_name()}: {ceilings}")
    session = Session(device, ceilings, clock, num_rounds, budget, started)
    shared = {
        **environment(),
        "matmul_tflops": " ".join(f"{dtype}={rate / 1e12:.1f}" for dtype, rate in ceilings.flops.items()),
        "copy_tb_s": f"{ceilings.bytes_a_second / 1e12:.3f}",
    }
    return measure_all(cases, session, console=console, output=output, shared=shared)


def measure_all(
    cases: list[Case], session: Session, *, console: Console, output: Path | None, shared: Mapping[str, object]
) -> int:
    """The loop over the cases and the report at its end; `shared` are the columns that all rows carry."""
    rows: list[Row] = []
    left_out = []
    with flex.compile_settings():
        for number, case in enumerate(cases, 1):
            if session.out_of_time():
                left_out.append(case.name)
                continue
            contenders = ", ".join((OURS, *case.contenders))
            console.print(
                f"[dim]{session.elapsed():4.0f} s  {number}/{len(cases)} {case.name} ({case.sizes}): {contenders}"
            )
            rows += measure(case, session)
            _free(session.device)
            if output is not None:
                write_csv(output, rows, shared)
    show(console, rows)
    console.print(", ".join(f"{name} {value}" for name, value in shared.items()))
    if left_out:
        console.print(f"left out after {session.budget:.0f} s: {', '.join(left_out)}")
    if output is not None and rows:
        console.print(f"written: {output}")
    for failure in session.failures:
        console.print(f"[red]error: {escape(failure)}")
    return 1 if session.failures else 0
