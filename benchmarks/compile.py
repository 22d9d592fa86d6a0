"""What the shipped kernels cost, without a GPU: `python -m benchmarks.compile --help`.

Every row of the tile table is compiled as it would be launched, for sm_80, sm_90 and sm_100, and the machine code is
read back: registers, spills, shared memory, programs per multiprocessor, tensor-core instructions.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from unittest import mock

from rich.console import Console
from rich.table import Table

from benchmarks import assembly
from benchmarks.assembly import ctas_per_multiprocessor
from benchmarks.compile_case import WIDE, Case
from benchmarks.compile_cases import HELPER_KERNELS, KERNELS, WGMMA_KERNELS, all_cases, shipped_cases, subset
from benchmarks.timing import environment, write_csv
from kernels import tile_table

OUTPUT = Path("benchmarks/results/compile.csv")
ALLOWED_SPILLS = Path(__file__).with_name("allowed_spills.json")
WGMMA_ROWS = 64  # of the left operand of one wgmma instruction
WGMMA_HEAD_DIMS = (64, 128)
NUM_WORKERS = 2
DEFAULT_WARPS = 4  # of a launch that names none
MIN_COLUMNS = 200


@dataclass
class Row:
    """One compiled launch. Tile sizes are empty where a kernel has none, the rest where the compiler failed."""

    kernel: str
    arch: str
    dtype: str
    head_dim: int
    features: str
    num_seen: int
    block_m: int | None = None
    block_n: int | None = None
    split: bool | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    registers: int | None = None  # of a thread
    stack_bytes: int | None = None  # of a thread, above zero where registers spill
    spill_stores: int | None = None
    spill_loads: int | None = None
    shared_bytes: int | None = None
    ctas: int | None = None  # programs that a multiprocessor holds at once
    hgmma: int | None = None  # wgmma instructions
    hmma: int | None = None  # mma instructions
    tcgen05: int | None = None
    num_instructions: int | None = None
    seconds: float | None = None
    note: str = ""
    defect: str = ""


def row_of(case: Case) -> Row:
    """An empty row of a case."""
    return Row(case.kernel, case.arch, case.dtype, case.head_dim, case.features, case.num_seen)


def measure(case: Case) -> Row:
    """Compile a case in this process, which can launch nothing afterwards."""
    row = row_of(case)
    start = time.perf_counter()
    try:
        (compiled,) = assembly.compile_launches(case.launch, case.arch, wanted=KERNELS[case.kernel])
    except Exception as error:  # whatever the compiler raises is this row's defect, and the others are still of use
        lines = str(error).strip().splitlines() or ["no message"]
        # Triton's begin with a place in the kernel, then show it, and end with what is wrong there
        row.defect = f"does not compile: {type(error).__name__}: {' ... '.join(dict.fromkeys([lines[0], lines[-1]]))}"
        return row
    row.seconds = time.perf_counter() - start
    arguments, resources = compiled.arguments, compiled.resources
    row.block_m, row.block_n = arguments.get("BLOCK_M"), arguments.get("BLOCK_N")
    row.split = arguments.get("SPLIT")
    num_warps = arguments.get("num_warps", DEFAULT_WARPS)
    row.num_warps, row.num_stages = num_warps, arguments.get("num_stages")
    row.registers, row.stack_bytes = resources.registers, resources.stack_bytes
    row.spill_stores, row.spill_loads = resources.spill_stores, resources.spill_loads
    row.shared_bytes, row.num_instructions = resources.shared_bytes, resources.num_instructions
    row.hgmma, row.hmma, row.tcgen05 = resources.hgmma, resources.hmma, resources.tcgen05
    row.ctas = ctas_per_multiprocessor(
        case.arch, registers=resources.registers, shared_bytes=resources.shared_bytes, num_warps=num_warps
    )
    row.note, row.defect = judge(row, allowed_spill(row))
    return row


def allowed_spill(row: Row) -> tuple[int, str]:
    """(bytes of stack that a row may take, why); 0 where it is on no list."""
    for entry in json.loads(ALLOWED_SPILLS.read_text(encoding="utf-8")):
        if all(entry[name] == getattr(row, name) for name in ("kernel", "arch", "dtype", "head_dim")):
            return entry["stack_bytes"], entry["reason"]
    return 0, ""


def judge(row: Row, allowed: tuple[int, str] = (0, "")) -> tuple[str, str]:
    """(what a reader should know, what is wrong) of a row that was compiled; "" for nothing."""
    notes, defects = [], []
    allowed_bytes, reason = allowed
    traffic = f"{row.stack_bytes} bytes of stack, {row.spill_stores} STL, {row.spill_loads} LDL"
    if row.stack_bytes or row.spill_stores or row.spill_loads:
        if 0 < (row.stack_bytes or 0) <= allowed_bytes:
            notes.append(f"spills, allowed: {reason}")
        else:
            defects.append(f"spills ({traffic}; allowed: {allowed_bytes} bytes)")
    limit = tile_table.limit_of(row.arch)
    if (row.shared_bytes or 0) > limit:
        defects.append(f"{row.shared_bytes:,} bytes of shared memory, above {limit:,}")
    elif not row.ctas:
        defects.append("too many registers for one program on a multiprocessor")
    if row.kernel not in HELPER_KERNELS:
        note, defect = _judge_products(row)
        notes += note
        defects += defect
    return "; ".join(notes), "; ".join(defects)


def _judge_products(row):
    """(notes, defects) as lists: whether matrix products are those that the architecture is built for."""
    if row.dtype == "float32" and "tf32" not in row.features:
        return ["no tensor cores: float32 as IEEE has it"], []
    if not (row.hgmma or row.hmma or row.tcgen05):
        return [], ["no tensor-core instruction"]
    if row.arch != "sm_90" or not row.hmma:
        return [], []
    height = left_rows(row)
    must = row.kernel in WGMMA_KERNELS and row.head_dim in WGMMA_HEAD_DIMS and row.dtype != "float32"
    if must:
        return [], [f"{row.hmma} mma beside {row.hgmma} wgmma instructions, with {height} rows"]
    if height < WGMMA_ROWS:
        return [f"mma, not wgmma: {height} rows, wgmma needs {WGMMA_ROWS}"], []
    return ["mma, not wgmma" if not row.hgmma else "some mma beside wgmma"], []


def left_rows(row: Row) -> int:
    """Rows of the left operand of a kernel's products: keys where their gradients are computed, else queries."""
    is_by_keys = row.kernel == "global_columns" or row.kernel.endswith("key_grad")
    return (row.block_n if is_by_keys else row.block_m) or 0


def measure_all(cases: list[Case], num_workers: int) -> Iterator[tuple[Case, Row]]:
    """Each case with its row, as it is done; in processes of their own, with a cache of their own."""
    with tempfile.TemporaryDirectory(prefix="longspan-compile-") as folder:
        # read where the workers import Triton: neither an old cache nor the interpreter may stand in for the compiler
        environment = {"TRITON_CACHE_DIR": folder, "TRITON_INTERPRET": "0"}
        context = multiprocessing.get_context("spawn")
        with (
            mock.patch.dict(os.environ, environment),
            concurrent.futures.ProcessPoolExecutor(num_workers, mp_context=context) as pool,
        ):
            futures = {pool.submit(measure, case): case for case in cases}
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], _result(future, futures[future])


def _result(future, case):
    try:
        return future.result()
    except concurrent.futures.process.BrokenProcessPool:
        row = row_of(case)
        row.defect = "not compiled: the compiler crashed, on this row or on one compiled at the same time"
        return row


HEADINGS = (
    "kernel", "arch", "dtype", "D", "features", "seen", "tiles", "regs", "stack/STL/LDL", "shared KB", "CTAs/SM",
    "HGMMA", "HMMA", "tcgen05", "SASS",
)  # fmt: skip
NUM_LEFT = 5  # columns of text
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def cells(row: Row) -> list[str]:
    """A row as text under HEADINGS; tiles are queries x keys, warps, stages."""
    tiles, spilled, shared = "", "", ""
    if row.block_m is not None:
        tiles = f"{row.block_m}x{row.block_n} w{row.num_warps} s{row.num_stages}{' split' if row.split else ''}"
    if row.registers is not None:
        spilled = f"{row.stack_bytes}/{row.spill_stores}/{row.spill_loads}"
        shared = f"{(row.shared_bytes or 0) / 1024:.0f}"
    seen = row.num_seen if row.num_seen != WIDE else None
    entries = (
        row.kernel, row.arch, SHORT[row.dtype], row.head_dim, row.features, seen, tiles, row.registers, spilled, shared,
        row.ctas, row.hgmma, row.hmma, row.tcgen05, row.num_instructions,
    )  # fmt: skip
    return ["" if entry is None else str(entry) for entry in entries]


def show(console: Console, rows: list[Row]) -> None:
    """Print the table, the notes and the defects."""
    table = Table(title="compiled kernels", title_justify="left")
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if index < NUM_LEFT else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row), style="red" if row.defect else None)
    console.print(table)
    noted: dict[str, int] = {}
    for row in rows:
        if row.note:
            noted[row.note] = noted.get(row.note, 0) + 1
    for note, count in noted.items():
        console.print(f"{count} rows: {note}", highlight=False)


def markdown(rows: list[Row]) -> str:
    """The table for a document."""
    rule = ["---" if index < NUM_LEFT else "---:" for index in range(len(HEADINGS))]
    lines = [HEADINGS, rule, *map(cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def record_shared_memory(rows: list[Row], path: Path = tile_table.FILE) -> None:
    """Write what the rows measured into `shared_bytes` of the tile table, the most over all that use a row of it."""
    table = json.loads(path.read_text(encoding="utf-8"))
    for entry in table:
        found = [row.shared_bytes for row in rows if row.shared_bytes is not None and _entry_of(row, table) is entry]
        if not found:
            raise ValueError(f"no row of the report uses {entry}")
        entry["shared_bytes"] = max(found)
    path.write_text(tile_table.table_text(table), encoding="utf-8")


def _entry_of(row, table):
    """The entry that `tile_table.choose` takes a row's tiles from; None for a kernel that is not in the table."""
    element_size = 4 if row.dtype == "float32" else 2
    found = tile_table.rows_for(row.kernel, row.arch, element_size, tile_table.block_dim(row.head_dim), table)
    return next((entry for entry in found if row.num_seen <= (entry["max_seen"] or row.num_seen)), None)


def main(arguments: list[str] | None = None) -> int:
    """Compile, write the CSV, print the table; 0, or 1 where a row has a defect."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.update and (options.quick or options.only):
        parser.error("--update needs every row: it goes without --quick and --only")
    cases = subset() if options.quick else all_cases() if options.all or options.update else shipped_cases()
    cases = [case for case in cases if fnmatch(case.name, f"*{options.only}*")]
    if not cases:
        parser.error(f"--only: no row is called *{options.only}*")
    shared = environment()
    console = Console()
    console.width = max(console.width, MIN_COLUMNS)  # a log has no width of its own
    start = time.perf_counter()
    measured = {}
    for case, row in measure_all(cases, options.workers):
        measured[case] = row
        progress = f"{len(measured)}/{len(cases)} {time.perf_counter() - start:.0f} s  {case.name}"
        console.print(f"{progress}  {row.defect}", style="red" if row.defect else "dim", highlight=False, markup=False)
    rows = [measured[case] for case in cases]
    show(console, rows)
    console.print(", ".join(f"{name} {value}" for name, value in shared.items()))
    output = options.output or (None if options.quick or options.only else OUTPUT)
    if output is not None:
        write_csv(output, rows, shared)
        console.print(f"written: {output}")
    if options.markdown is not None:
        options.markdown.write_text(markdown(rows), encoding="utf-8")
    if options.update:
        record_shared_memory(rows)
        console.print(f"written: {tile_table.FILE}")
    defects = [f"{case.name}: {row.defect}" for case, row in measured.items() if row.defect]
    for defect in defects:
        print(f"defect: {defect}", file=sys.stderr)
    console.print(f"{len(rows)} rows, {len(defects)} with a defect, {time.perf_counter() - start:.0f} s")
    return 1 if defects else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile",
        description="Compile the shipped kernels for GPUs that need not be there and read their machine code. Exit "
        "code 1 where registers spill, shared memory does not fit, tensor cores lie idle or nothing compiles.",
    )
    parser.add_argument("--quick", action="store_true", help="a fixed subset of 20 rows, as in the tests")
    parser.add_argument("--all", action="store_true", help="every row, where the report has the first 150")
    parser.add_argument("--only", default="", metavar="PATTERN", help="rows whose name holds this, with * and ?")
    parser.add_argument("--workers", type=int, default=NUM_WORKERS, help=f"processes (default {NUM_WORKERS})")
    parser.add_argument("--output", type=Path, help=f"CSV (default {OUTPUT}; none with --quick or --only)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as Markdown, too")
    parser.add_argument("--update", action="store_true", help="write shared_bytes into the tile table, from every row")
    return parser


if __name__ == "__main__":
    sys.exit(main())
