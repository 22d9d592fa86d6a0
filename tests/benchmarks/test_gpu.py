"""The GPU part of the attention benchmark, run on a CPU: rows, refusals, what fails, the budget, the clock."""

import csv
import time
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from rich.console import Console

from benchmarks import flex, gpu, gpu_window, peers, timing
from benchmarks.agreement import TOLERANCE, Disagreement, check
from benchmarks.cases import BOTH, DENSE, FLEX, FORWARD, LONGFORMER, OURS
from benchmarks.gpu_case import FLEX_BEST, MODULE
from benchmarks.gpu_report import targets
from benchmarks.gpu_window import FLASH, FLASH_PACKAGE, ROWS, UNDILATED, WITHOUT_GLOBALS, WindowCase, WindowProblem
from benchmarks.roofline import Ceilings
from benchmarks.timing import Row, interleave, interleave_on_gpu
from kernels.window_attention import window_attention

SMALL = WindowCase("small", "a test", (FLASH,), seq_len=280, head_dim=16, window=24, num_heads=2, num_kv_heads=2,
             dtype="float32")  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


def session(**options):
    """Everything as on a GPU but the clock and the ceilings."""

    def clock(calls, rounds):
        return interleave(calls, num_rounds=rounds, device="cpu", num_warmup=0)

    return gpu.Session("cpu", Ceilings({"float32": 1e12, "bfloat16": 1e12}, 1e12), clock, 3, **options)


def window_by_ours(batch, seq_len, window, causal, grouped, device):
    """In the place of a peer that needs a GPU."""
    return partial(window_attention, window=window, causal=causal, impl="reference")


def measured(case, on=None):
    return {(row.contender, row.passes): row for row in gpu.measure(case, on or session())}


def test_every_contender_has_a_row_for_each_pass(monkeypatch):
    monkeypatch.setattr(peers, "flash_varlen", window_by_ours)
    monkeypatch.setattr(peers, "dense_flash", lambda *given: partial(window_attention, window=400, impl="reference"))
    on = session()
    rows = measured(replace(SMALL, contenders=(FLEX, FLASH, FLASH_PACKAGE, DENSE)), on)
    assert set(rows) == {(n, p) for n in (OURS, FLEX, FLASH, FLASH_PACKAGE, DENSE) for p in (FORWARD, BOTH)}
    assert on.failures == []
    timed = {key for key, row in rows.items() if row.median_ms is not None}
    # FlexAttention has no backward on a CPU, and the package is not installed
    assert timed == set(rows) - {(FLEX, BOTH), (FLASH_PACKAGE, FORWARD), (FLASH_PACKAGE, BOTH)}
    assert rows[FLEX, BOTH].note.startswith(
        "not available: NotImplementedError: FlexAttention does not support backward"
    )
    assert "No module named 'flash_attn'" in rows[FLASH_PACKAGE, FORWARD].note
    for key in timed:
        row = rows[key]
        assert row.num_rounds == 3 and row.setup_s > 0 and row.note is None and row.case == "small"
        assert row.ceiling_share > 0 and row.roofline_share > 0
        assert (row.ratio is None) == (row.contender == OURS)
        if row.contender != DENSE:
            assert row.reference_error < 1e-5
    seconds = rows[OURS, BOTH].median_ms * 1e-3
    assert rows[OURS, BOTH].tflops == pytest.approx(SMALL.work.useful_flops(BOTH) / seconds / 1e12)
    # the dense yardstick is another function: not compared, and counted with all its pairs
    assert rows[DENSE, FORWARD].reference_error is None and rows[DENSE, FORWARD].window == 280
    dense_seconds = rows[DENSE, FORWARD].median_ms * 1e-3
    assert rows[DENSE, FORWARD].tflops == pytest.approx(4 * 2 * 280 * 280 * 16 / dense_seconds / 1e12)


@pytest.mark.parametrize(
    "case, others",
    [
        (replace(SMALL, dilation=3, contenders=(UNDILATED,)), [UNDILATED]),
        (replace(SMALL, num_globals=7, contenders=(FLEX, WITHOUT_GLOBALS)), [WITHOUT_GLOBALS]),
        (replace(SMALL, kind=ROWS, num_globals=3, contenders=(FLEX,)), []),
    ],
    ids=["dilation", "globals", "global rows"],
)
def test_kinds_of_cases_against_the_reference(case, others):
    on = session()
    rows = measured(case, on)
    assert on.failures == []
    for (contender, passes), row in rows.items():
        if (contender, passes) == (FLEX, BOTH):
            continue
        assert row.median_ms > 0
        assert row.reference_error is None if contender in others else row.reference_error < 1e-5
    for contender in others:
        assert rows[contender, FORWARD].dilation == 1 and rows[contender, FORWARD].num_globals == 0


def test_modules_are_compared_with_each_other():
    case = replace(SMALL, kind=MODULE, seq_len=144, num_globals=4, contenders=(LONGFORMER,))
    on = session()
    rows = measured(case, on)
    assert on.failures == []
    for passes in (FORWARD, BOTH):
        assert rows[LONGFORMER, passes].max_error < 1e-3 and rows[LONGFORMER, passes].ratio > 0
        assert rows[OURS, passes].roofline_share > 0


@pytest.mark.parametrize("passes", [FORWARD, BOTH])
def test_what_disagrees_is_not_timed_and_remembered(monkeypatch, passes):
    def shifted(batch, seq_len, window, causal, grouped, device):
        class Doubled(torch.autograd.Function):
            """The right output with twice the gradient."""

            forward = staticmethod(lambda ctx, out: out.clone())
            backward = staticmethod(lambda ctx, gradient: 2 * gradient)

        if passes == BOTH:
            return lambda *qkv: Doubled.apply(window_attention(*qkv, window=window))
        return partial(window_attention, window=window + 1)

    monkeypatch.setattr(peers, "flash_varlen", shifted)
    on = session()
    rows = measured(SMALL, on)
    assert rows[FLASH, passes].median_ms is None and "it is not timed" in rows[FLASH, passes].note
    assert f"small: {FLASH}: " in on.failures[0] and "differs from the expected one" in on.failures[0]
    assert rows[OURS, passes].median_ms > 0


def test_ours_is_held_to_the_reference(monkeypatch):
    def wrong(*qkv, window, impl="auto", **options):
        return window_attention(*qkv, window=window - (impl == "auto"), impl=impl, **options)

    monkeypatch.setattr(gpu_window, "window_attention", wrong)
    on = session()
    rows = measured(SMALL, on)
    assert all(row.median_ms is None for row in rows.values())
    assert "from the float64 reference" in rows[OURS, FORWARD].note
    assert rows[FLASH, FORWARD].note == "not measured: ours gave no result to compare with"
    assert len(on.failures) == 2


def test_a_failure_of_ours_is_remembered(monkeypatch):
    def broken(*qkv, **options):
        raise RuntimeError("misaligned address")

    monkeypatch.setattr(gpu_window, "window_attention", broken)
    on = session()
    rows = measured(SMALL, on)
    assert rows[OURS, FORWARD].note == "not available: RuntimeError: misaligned address"
    assert on.failures[0] == f"small, forward: ours fails: {rows[OURS, FORWARD].note}"


def test_no_memory_is_a_row(monkeypatch):
    def too_large(*given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB")

    monkeypatch.setattr(peers, "flash_varlen", too_large)
    on = session()
    rows = measured(SMALL, on)
    assert rows[FLASH, FORWARD].note == rows[FLASH, BOTH].note == "out of memory"
    assert rows[OURS, BOTH].median_ms > 0 and on.failures == []
    monkeypatch.setitem(gpu.PROBLEMS, WindowCase, too_large)
    assert {row.note for row in gpu.measure(SMALL, session())} == {"no memory for the inputs"}


def test_no_memory_while_timing_is_a_row(monkeypatch):
    def clock(calls, rounds):
        raise torch.OutOfMemoryError

    on = session()
    on.clock = clock
    rows = measured(SMALL, on)
    assert rows[OURS, FORWARD].note == "out of memory while it was timed beside the others"


def test_best_options_are_the_fastest_that_agree(monkeypatch):
    def attention(mask, *, grouped, options):
        if options.get("fwd_num_warps") == 8:
            raise RuntimeError("out of resource: shared memory")

        def attend(*qkv):
            time.sleep(0.02 if not options else 0.0)
            # the tiles of 64 rows are the fastest, and wrong
            wrong = options.get("fwd_BLOCK_M") == 64 and mask.BLOCK_SIZE == (64, 64)
            return window_attention(*qkv, window=SMALL.window - wrong)

        return attend

    monkeypatch.setattr(flex, "attention", attention)
    on = session()
    rows = measured(replace(SMALL, contenders=(FLEX_BEST,)), on)
    assert on.failures == []
    assert rows[FLEX_BEST, FORWARD].note.startswith("the fastest: ROWS_GUARANTEED_SAFE=True")
    assert "fwd_num_warps=4" in rows[FLEX_BEST, BOTH].note and "mask blocks" not in rows[FLEX_BEST, FORWARD].note
    assert rows[FLEX_BEST, FORWARD].setup_s > 0.02 * (2 + gpu.SEARCH_ROUNDS)

    monkeypatch.setattr(flex, "attention", lambda *given, **options: partial(window_attention, window=3))
    rows = measured(replace(SMALL, contenders=(FLEX_BEST,)))
    assert "no options of FlexAttention ran (" in rows[FLEX_BEST, FORWARD].note
    assert "another result" in rows[FLEX_BEST, FORWARD].note


def test_search_stops_when_time_is_up(monkeypatch):
    tried = []

    def attention(mask, *, grouped, options):
        tried.append(options)
        return partial(window_attention, window=SMALL.window)

    monkeypatch.setattr(flex, "attention", attention)
    rows = measured(replace(SMALL, contenders=(FLEX_BEST,)), session(budget=0))
    assert tried == [{}, {}] and rows[FLEX_BEST, FORWARD].note == "the fastest: the defaults"


def test_run_writes_after_every_case_and_names_what_is_left_out(tmp_path, monkeypatch, capsys):
    output = tmp_path / "rows.csv"
    on = session(budget=1000.0)
    cases = [replace(SMALL, name=name, seq_len=8192, contenders=()) for name in ("first", "second", "third")]

    def measure(case, of):
        if case.name == "second":
            with output.open(encoding="utf-8") as file:
                assert {row["case"] for row in csv.DictReader(file)} == {"first"}
            of.started -= 2000
        row = Row(case.kind, OURS, FORWARD, 1, 8192, 2, 16, 24, "bfloat16", "cuda", case=case.name)
        row.memory_over_needed = 1.05 if case.name == "first" else 1.2
        peer = replace(row, contender=FLEX, ratio=1.0, ratio_p20=0.9, ratio_p80=1.1, target=1.3, note="[1, 2] options")
        return [row, peer]

    monkeypatch.setattr(gpu, "measure", measure)
    given = {"console": Console(width=200), "output": output, "shared": {"gpu": "none"}}
    assert gpu.measure_all(cases, on, **given) == 0
    with output.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == ["first", "first", "second", "second"]
    assert set(rows[0]) == {field.name for field in fields(Row)} | {"gpu"}
    shown = capsys.readouterr().out
    assert "1/3 first (T 8192, D 16, window 24, float32): ours" in shown
    assert "left out after 1000 s: third" in shown and "written: " in shown and "[1, 2] options" in shown
    on.started, on.failures = time.perf_counter(), ["first: it differs"]
    assert gpu.measure_all(cases[:1], on, **given) == 1
    assert "error: first: it differs" in capsys.readouterr().out


@pytest.mark.parametrize("passes", [FORWARD, BOTH])
def test_memory_counts_what_was_there_before_the_call(passes):
    """A call that adds its results alone is at what must exist, one that copies a query above it."""
    case = replace(SMALL, seq_len=4096)
    problem = WindowProblem(case, "cpu")
    query, lse = problem.inputs[0].nbytes, 4 * 4096 * 2
    results = query + lse if passes == FORWARD else 4 * query + lse
    for copies in (0, 1):
        row = Row("window", OURS, passes, 1, 4096, 2, 16, 24, "float32", "cuda")
        gpu._enter_memory(row, problem, results + copies * query)
        held = 3 * query + (query if passes == BOTH else 0)
        assert row.memory_over_needed == pytest.approx(1 + copies * query / (held + results))


def test_targets_are_met_or_not():
    row = Row("window", FLEX, FORWARD, 1, 8192, 2, 16, 24, "bfloat16", "cuda", case="c", ratio=1.4, target=1.3)
    ours = replace(row, contender=OURS, ratio=None, target=None, memory_over_needed=1.2)
    missed = replace(row, ratio=1.2)
    untimed = replace(row, ratio=None)
    others = replace(ours, table="nystrom")  # memory is held to what must exist where a window is measured
    assert [(figure, wanted, met) for _, figure, wanted, met in targets([row, missed, ours, untimed, others])] == [
        ("1.400", ">= 1.3", True),
        ("1.200", ">= 1.3", False),
        ("1.200", "<= 1.1", False),
    ]


@pytest.mark.parametrize("window, is_wrong", [(256, False), (255, True), (257, True)])
def test_tolerance_tells_a_wrong_window_from_rounding(window, is_wrong):
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, 1024, 2, 64, generator=generator).bfloat16() for _ in range(3)]
    expected = window_attention(*(tensor.float() for tensor in qkv), window=256)
    found = window_attention(*qkv, window=window)
    if is_wrong:
        with pytest.raises(Disagreement, match="its output differs"):
            check("peer", [found], [expected], TOLERANCE["bfloat16"][FORWARD])
    else:
        assert 0 < check("peer", [found], [expected], TOLERANCE["bfloat16"][FORWARD]) < 0.05


def test_nan_disagrees():
    with pytest.raises(Disagreement, match="gradient 1 differs"):
        check("peer", [torch.ones(1, 2, 3), torch.full((1, 2, 3), torch.nan)], [torch.ones(1, 2, 3)] * 2, 1e-2)


class FakeGpu:
    """Events, waits and synchronisations in the order in which they were asked for; times from the host's clock."""

    def __init__(self, monkeypatch):
        self.log, self.waits = [], []
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: (self.log.append("wait"), self.waits.append(cycles)))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.log.append("sync"))
        monkeypatch.setattr(timing, "FLUSH_BYTES", 16)
        monkeypatch.setattr(torch.Tensor, "zero_", lambda tensor: self.log.append("flush"))

    def event(self, enable_timing):
        assert enable_timing
        fake = self

        class Event:
            def record(self):
                fake.log.append("event")
                self.at = time.perf_counter()

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        return Event()


def test_gpu_clock_queues_a_turn_without_waiting(monkeypatch):
    fake = FakeGpu(monkeypatch)

    def call(name, seconds):
        fake.log.append(name)
        time.sleep(seconds)

    calls = {"slow": partial(call, "slow", 0.02), "fast": partial(call, "fast", 0.0004)}
    seconds = interleave_on_gpu(calls, num_rounds=3, device="cpu")
    assert {name: times.shape for name, times in seconds.items()} == {"slow": (3,), "fast": (3,)}
    assert seconds["slow"].min() >= 0.02 and seconds["fast"].min() >= 0.0004
    turns = " ".join(fake.log).split("wait ")[1:]
    assert len(turns) == 6
    for turn in turns[::2]:
        assert turn.split() == ["flush", "event", "slow", "event", "sync"]
    for turn in turns[1::2]:
        words = turn.split()
        assert words[-1] == "sync" and words.count("fast") > 1
        assert words[:-1] == ["flush", "event", "fast", "event"] * words.count("fast")
    assert max(fake.waits) <= timing.MAX_WAIT_SECONDS * timing.CLOCK_HZ
