"""The ahead-of-time report reads machine code rightly, knows a defect when it sees one, and covers the tile table."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import compile as report
from benchmarks.assembly import Resources, ctas_per_multiprocessor, parse
from benchmarks.compile import ALLOWED_SPILLS, Row, judge, markdown, record_shared_memory, show
from benchmarks.compile_case import WIDE
from benchmarks.compile_cases import HELPER_KERNELS, KERNELS, MAX_CASES, all_cases, shipped_cases, subset
from benchmarks.compile_window import WindowCase
from benchmarks.timing import environment
from kernels import tile_table
from tests.helpers import run_python

USAGE = """
Resource usage:
 Common:
  GLOBAL:11 CONSTANT[4]:8
 Function some_kernel:
  REG:122 STACK:24 SHARED:1024 LOCAL:0 CONSTANT[0]:664 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
	code for sm_90a
		Function : HMMA_STL_kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;                       /* 0x00000a00ff017b82 */
                                                                                /* 0x000e700000000800 */
        /*0010*/              @!P1 STL.64 [R1+0x8], R2 ;                        /* 0x0ffffffe00027836 */
        /*0020*/               @P0 LDL.LU R3, [R1] ;                            /* 0x0ffffffe00027837 */
        /*0030*/                   LDL R4, [R1] ;                               /* 0x0ffffffe00027838 */
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4] ;    /* 0x0ffffffe00027839 */
        /*0050*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;         /* 0x0ffffffe0002783a */
        /*0060*/             @UP1 UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8] ;   /* 0x0ffffffe0002783b */
        /*1070*/                   UTCBAR [UR4], URZ ;                          /* 0x0ffffffe0002783c */
        /*1080*/                   STG.E desc[UR4][R2.64], R5 ;                 /* 0x0ffffffe0002783d */
.L_x_0:
"""


def good_row(**changes) -> Row:
    """A row with nothing to say about it, but for the changes."""
    sizes = {"block_m": 128, "block_n": 64, "split": True, "num_warps": 8, "num_stages": 3}
    none = {"stack_bytes": 0, "spill_stores": 0, "spill_loads": 0, "hmma": 0, "tcgen05": 0}
    found = {"registers": 122, "shared_bytes": 65536, "ctas": 2, "hgmma": 16, "num_instructions": 1696, "seconds": 3.0}
    row = Row("window_forward", "sm_90", "bfloat16", 64, "plain", 2049, **sizes, **none, **found)
    return dataclasses.replace(row, **changes)


def test_parse_counts_instructions_and_nothing_else():
    assert parse(USAGE, SASS, 4096) == Resources(
        registers=122,
        stack_bytes=24,
        spill_stores=1,
        spill_loads=2,
        shared_bytes=4096,
        hgmma=1,
        hmma=1,
        tcgen05=1,
        num_instructions=9,
    )


@pytest.mark.parametrize("usage, sass", [("", SASS), (USAGE, ""), (USAGE.replace("STACK", "STOCK"), SASS)])
def test_parse_refuses_what_it_cannot_read(usage, sass):
    with pytest.raises(ValueError, match="resource usage|no instruction"):
        parse(usage, sass, 0)


@pytest.mark.parametrize(
    "arch, registers, shared_bytes, num_warps, ctas, limit",
    [
        ("sm_90", 122, 65536, 8, 2, "registers: 65536 / (128 * 256)"),
        ("sm_90", 129, 0, 8, 1, "registers rounded to 136"),
        ("sm_90", 128, 57344, 4, 4, "shared: 228 / (56 + 1)"),
        ("sm_80", 128, 57344, 4, 2, "shared: 164 / (56 + 1)"),
        ("sm_90", 32, 0, 4, 16, "threads: 2048 / 128"),
        ("sm_90", 16, 0, 1, 32, "programs"),
        ("sm_90", 255, 0, 16, 0, "no program fits: 65536 / (256 * 512) is below one"),
    ],
)
def test_programs_of_a_multiprocessor(arch, registers, shared_bytes, num_warps, ctas, limit):
    found = ctas_per_multiprocessor(arch, registers=registers, shared_bytes=shared_bytes, num_warps=num_warps)
    assert found == ctas, limit


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"stack_bytes": 8, "spill_stores": 2, "spill_loads": 2}, "spills (8 bytes of stack, 2 STL, 2 LDL"),
        ({"spill_loads": 1}, "spills (0 bytes of stack"),
        ({"shared_bytes": 227 * 1024 + 1}, "shared memory, above 232,448"),
        ({"arch": "sm_80", "hgmma": 0, "hmma": 8, "shared_bytes": 163 * 1024 + 1}, "shared memory, above 166,912"),
        ({"ctas": 0}, "too many registers"),
        ({"hgmma": 0}, "no tensor-core instruction"),
        ({"hgmma": 0, "dtype": "float16", "arch": "sm_80"}, "no tensor-core instruction"),
        ({"hgmma": 0, "hmma": 64}, "64 mma beside 0 wgmma instructions, with 128 rows"),
        ({"hgmma": 1, "hmma": 60}, "60 mma beside 1 wgmma"),
        ({"hgmma": 0, "hmma": 64, "block_m": 32}, "64 mma beside 0 wgmma instructions, with 32 rows"),
        (
            {"hgmma": 0, "hmma": 64, "kernel": "window_key_grad", "head_dim": 128, "block_m": 32},
            "64 mma beside 0 wgmma instructions, with 64 rows",
        ),
    ],
)
def test_each_defect_is_named(changes, words):
    _, defect = judge(good_row(**changes))
    assert words in defect


@pytest.mark.parametrize(
    "changes, note",
    [
        ({}, ""),
        ({"hgmma": 0, "hmma": 64, "block_m": 32, "head_dim": 256}, "mma, not wgmma: 32 rows, wgmma needs 64"),
        ({"hgmma": 8, "hmma": 64, "head_dim": 256}, "some mma beside wgmma"),
        ({"hgmma": 8, "dtype": "float32", "features": "tf32"}, ""),
        (
            {"hgmma": 0, "hmma": 64, "kernel": "window_key_grad", "block_n": 32, "head_dim": 256},
            "mma, not wgmma: 32 rows, wgmma needs 64",
        ),
        ({"hgmma": 0, "dtype": "float32"}, "no tensor cores: float32 as IEEE has it"),
        ({"hgmma": 0, "hmma": 64, "arch": "sm_80"}, ""),
        ({"hgmma": 0, "tcgen05": 24, "arch": "sm_100"}, ""),
        ({"hgmma": 0, "kernel": "global_table", "block_m": None, "block_n": None}, ""),
    ],
)
def test_what_is_no_defect_is_said(changes, note):
    assert judge(good_row(**changes)) == (note, "")


def test_an_allowed_spill_holds_up_to_its_bytes():
    spilled = good_row(stack_bytes=24, spill_stores=6, spill_loads=6)
    assert judge(spilled, (24, "the reason")) == ("spills, allowed: the reason", "")
    assert "allowed: 16 bytes" in judge(spilled, (16, "the reason"))[1]


def test_allowed_spills_are_where_the_issue_lets_them_be():
    entries = json.loads(ALLOWED_SPILLS.read_text(encoding="utf-8"))
    rows = {(case.kernel, case.arch, case.dtype, case.head_dim) for case in all_cases()}
    for entry in entries:
        assert (entry["kernel"], entry["arch"], entry["dtype"], entry["head_dim"]) in rows, "no row needs it"
        assert entry["arch"] != "sm_90"
        assert entry["dtype"] != "bfloat16" or entry["head_dim"] not in (64, 128)
        assert entry["stack_bytes"] > 0 and entry["reason"]


def test_report_covers_the_tile_table():
    """All rows do; the report by default holds at least those of half precision at head dims 64 and 128."""
    cases, everything = shipped_cases(), all_cases()
    assert len(cases) <= MAX_CASES <= 150 and set(cases) <= set(everything)
    assert len({case.name for case in everything}) == len(everything)
    compiled, more = (
        {(c.kernel, c.arch, c.head_dim, c.dtype == "float32") for c in each} for each in (cases, everything)
    )
    for row in tile_table.rows():
        place = (row["kernel"], row["arch"], row["block_d"], row["element_size"] == 4)
        assert place in more and (place in compiled or row["block_d"] not in (64, 128) or row["element_size"] == 4)
    assert {case.kernel for case in cases} == set(KERNELS)


def test_tuned_rows_make_the_report_no_longer(monkeypatch):
    tuned = [{**row, "arch": "sm_120"} for row in tile_table.rows()]
    monkeypatch.setattr(tile_table, "rows", lambda: tuned + json.loads(tile_table.FILE.read_text()))
    assert len(shipped_cases()) == MAX_CASES < len(all_cases())


def test_subset_is_twenty_rows_of_every_kernel_with_tiles():
    assert len(set(subset())) == 20
    assert {case.kernel for case in subset()} == set(KERNELS) - set(HELPER_KERNELS)


def test_shared_memory_is_recorded_where_the_tiles_came_from(tmp_path):
    path = tmp_path / "tiles.json"
    keys = ("kernel", "arch", "element_size", "block_d", "max_seen", "shared_bytes")
    entries = [
        ("window_forward", "sm_90", 2, 64, 640, 0),
        ("window_forward", "sm_90", 2, 64, None, 0),
        ("window_forward", "sm_80", 2, 64, None, 0),
    ]
    path.write_text(json.dumps([dict(zip(keys, entry, strict=True)) for entry in entries]))
    rows = [
        good_row(num_seen=640, shared_bytes=1),
        good_row(shared_bytes=2),
        good_row(shared_bytes=4, head_dim=48),
        good_row(shared_bytes=3, dtype="float16"),
        good_row(arch="sm_80", shared_bytes=5),
        good_row(dtype="float32", shared_bytes=9),
        good_row(kernel="global_table", shared_bytes=9),
    ]
    record_shared_memory(rows, path)
    assert [entry["shared_bytes"] for entry in json.loads(path.read_text())] == [1, 4, 5]
    with pytest.raises(ValueError, match="no row of the report uses"):
        record_shared_memory(rows[:-3], path)


def test_table_and_markdown_hold_every_row():
    rows = [good_row(), good_row(kernel="window_key_grad", note="a note", features="valid+group 4")]
    console = Console(width=200, record=True, file=None, quiet=False)
    show(console, rows)
    text = console.export_text()
    assert "128x64 w8 s3 split" in text and "valid+group 4" in text and "1 rows: a note" in text
    lines = markdown(rows).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    assert "| 122 | 0/0/0 | 64 | 2 | 16 |" in lines[2]


@pytest.mark.slow
def test_fixed_subset_has_no_defect(tmp_path):
    path = tmp_path / "compile.csv"
    done = run_python("-m", "benchmarks.compile", "--quick", "--output", path, timeout=290)
    assert done.returncode == 0, done.stderr
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {field.name for field in dataclasses.fields(Row)} | set(environment())
    assert [row["kernel"] for row in rows] == [case.kernel for case in subset()]
    for row in rows:
        assert int(row["registers"]) > 0 and int(row["ctas"]) > 0 and not row["defect"]


@pytest.mark.slow
def test_an_absurd_tile_is_found_to_spill():
    code = """
from benchmarks.compile import measure
from benchmarks.compile_window import WindowCase
from kernels import tile_table

tiles = {"BLOCK_M": 128, "BLOCK_N": 64, "SPLIT": False, "num_warps": 4, "num_stages": 2}
with tile_table.trial("window_query_grad", tiles):
    row = measure(WindowCase("window_query_grad", "sm_80", "bfloat16", 128))
print(row.stack_bytes, row.hmma, row.defect)
"""
    done = run_python("-c", code, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    stack_bytes, hmma, defect = done.stdout.split(maxsplit=2)
    assert int(stack_bytes) > 100 and int(hmma) > 0
    assert defect.startswith(f"spills ({stack_bytes} bytes of stack")


@pytest.mark.slow
def test_a_launch_that_does_not_compile_is_a_defect_with_its_reason():
    code = """
from benchmarks.compile import measure
from benchmarks.compile_window import WindowCase
from kernels import tile_table

tiles = {"BLOCK_M": 48, "BLOCK_N": 64, "SPLIT": False, "num_warps": 4, "num_stages": 2}
with tile_table.trial("window_forward", tiles):
    print(measure(WindowCase("window_forward", "sm_80", "bfloat16", 64)).defect)
"""
    done = run_python("-c", code, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("does not compile: ") and "power of 2" in done.stdout


def test_a_pattern_without_a_row_is_an_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main(["--only", "no such kernel"])
    assert stopped.value.code == 2
    assert "no row is called *no such kernel*" in capsys.readouterr().err


def test_the_table_is_updated_from_every_row_alone(capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main(["--update", "--quick"])
    assert stopped.value.code == 2 and "--update needs every row" in capsys.readouterr().err


def test_names_tell_what_a_launch_has():
    case = WindowCase("window_forward", "sm_90", "bfloat16", 64, 640, causal=True, has_valid=True, num_globals=1)
    assert case.name == "window_forward sm_90 bfloat16 D64 seen 640 causal+valid+globals 1"
    assert WindowCase("window_key_grad", "sm_80", "float32", 16).name == "window_key_grad sm_80 float32 D16 plain"


@pytest.mark.parametrize("page", ["kernels.md", "kernels_block_sparse.md", "kernels_nystrom.md"])
def test_documents_show_the_tiles_of_the_table(page):
    """Rows x keys, warps and stages of every row that a page shows are those that a launch takes."""
    lines = [line for line in Path("docs", page).read_text(encoding="utf-8").splitlines() if " | sm_" in line]
    assert len(lines) > 20
    for line in lines:
        kernel, arch, dtype, head_dim, features, seen, shown = [cell.strip() for cell in line.split("|")[1:8]]
        element_size = 4 if dtype == "fp32" else 2
        place = {"arch": arch, "element_size": element_size, "head_dim": int(head_dim)}
        tile = tile_table.choose(kernel, num_seen=int(seen or WIDE), **place)
        split = " split" if tile.get("SPLIT") else ""
        rows, keys = (tile[name] for name in ("BLOCK_M", "BLOCK_N"))
        if features.endswith("globals 1"):  # one token needs no more than 16 of its side
            continue
        assert shown == f"{rows}x{keys} w{tile['num_warps']} s{tile['num_stages']}{split}"
