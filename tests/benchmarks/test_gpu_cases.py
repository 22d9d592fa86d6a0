"""The cases of the GPU benchmark: what is counted, what is covered, which targets apply."""

from dataclasses import replace

import pytest
import torch

from benchmarks.cases import BOTH, DENSE, FLEX, FORWARD, LONGFORMER
from benchmarks.gpu_case import FLEX_BEST, MODULE
from benchmarks.gpu_cases import CASES, QUICK_NAMES, chosen
from benchmarks.gpu_window import FLASH, PREFIX, ROWS, SCATTERED, UNDILATED, WINDOW, WITHOUT_GLOBALS, WindowCase
from benchmarks.roofline import Ceilings, Work, measure_ceilings, window_pairs

PLAIN = WindowCase("plain", "", ())


def seen_by_hand(case):
    """[H, T, T] of what each row sees, from the words of the pattern."""
    rows, keys = torch.arange(case.seq_len)[:, None], torch.arange(case.seq_len)
    distance = (rows - keys).abs()
    seen = (distance <= case.window * case.dilation) & (distance % case.dilation == 0)
    seen[:, case.global_positions] = True
    return (seen & (rows >= keys) if case.causal else seen).expand(case.num_heads, -1, -1)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("spread", [SCATTERED, PREFIX])
@pytest.mark.parametrize("dilation, window", [(1, 5), (3, 4), (2, 40), (1, 0), (50, 2)])
def test_pairs_are_those_of_the_mask(dilation, window, spread, causal):
    case = replace(PLAIN, seq_len=41, window=window, dilation=dilation, causal=causal, num_globals=6, spread=spread)
    case = replace(case, num_heads=2, num_kv_heads=2)
    assert window_pairs(case.pattern, case.seq_len, case.global_positions) == seen_by_hand(case).sum()
    assert case.work.flops[FORWARD] == 4 * seen_by_hand(case).sum() * case.head_dim


def test_work_and_bound_are_those_of_the_table():
    """spec: n 16384, H 12, D 64, causal, 512 keys: 25.4 GFLOP, 101 MB, 33.8 us forward; backward 80.3 us."""
    work = replace(PLAIN, causal=True, window=511).work
    h100 = Ceilings({"bfloat16": 790e12}, 3.0e12)
    assert work.flops[FORWARD] / 1e9 == pytest.approx(25.4, abs=0.05)
    assert work.num_bytes[FORWARD] / 1e6 == pytest.approx(101, abs=0.5)
    assert work.bound(FORWARD, h100, "bfloat16") * 1e6 == pytest.approx(33.8, abs=0.05)
    assert (work.bound(BOTH, h100, "bfloat16") - work.bound(FORWARD, h100, "bfloat16")) * 1e6 == pytest.approx(
        80.3, 2e-3
    )
    assert work.useful_flops(BOTH) == 14 / 4 * work.useful_flops(FORWARD)


def test_bytes_are_those_of_the_tensors():
    case = replace(PLAIN, batch=2, seq_len=7, num_heads=6, num_kv_heads=2, head_dim=8)
    query, key = torch.empty(2, 7, 6, 8, dtype=torch.bfloat16), torch.empty(2, 7, 2, 8, dtype=torch.bfloat16)
    lse = torch.empty(2, 6, 7)
    forward = [query, key, key, query, lse]
    both = [*forward, query, query, key, key]
    work = case.work
    assert work.num_bytes[FORWARD] == work.needed_bytes[FORWARD] == sum(tensor.nbytes for tensor in forward)
    assert work.needed_bytes[BOTH] == sum(tensor.nbytes for tensor in both)
    assert work.num_bytes["backward"] == sum(tensor.nbytes for tensor in [*both, lse])


def test_work_of_global_rows():
    work = replace(PLAIN, kind=ROWS, seq_len=100, num_globals=3, num_heads=2, num_kv_heads=2, head_dim=16).work
    assert work.useful_flops(FORWARD) == 4 * 2 * 3 * 100 * 16
    assert work.num_bytes[FORWARD] == 2 * 16 * 2 * (2 * 3 + 2 * 100) + 4 * 2 * 3


def test_work_of_a_module_has_its_projections():
    case = replace(PLAIN, kind=MODULE, batch=2, seq_len=50, window=4, num_globals=3, num_heads=2, num_kv_heads=2)
    attention = [replace(case, kind=kind).work for kind in (WINDOW, ROWS)]
    weight = 128 * 128
    tokens = [2 * 50, 2 * 50, 2 * 50, 2 * 3, 2 * 50, 2 * 50]  # query, key, value, then those of the global tokens
    forward = sum(2 * count * weight for count in tokens)
    assert case.work.useful_flops(FORWARD) == sum(work.useful_flops(FORWARD) for work in attention) + forward
    assert case.work.useful_flops(BOTH) == sum(work.useful_flops(BOTH) for work in attention) + 3 * forward
    text, weights = 2 * 2 * 50 * 128, 2 * 6 * (weight + 128)
    assert case.work.num_bytes == {FORWARD: 2 * text + weights, "backward": 3 * text + 2 * weights}


def test_bound_is_the_slower_of_arithmetic_and_memory():
    work = Work.of(10, rows=1, keys=1, head_dim=1, item_bytes=2)
    assert work.bound(FORWARD, Ceilings({"float16": 1.0}, 1e9), "float16") == 40
    assert work.bound(FORWARD, Ceilings({"float16": 1e9}, 1.0), "float16") == work.num_bytes[FORWARD]


def test_ceilings_are_operations_and_bytes_over_the_median_time():
    ceilings = measure_ceilings(["float32"], lambda calls: {name: [9.0, 2.0, 1.0] for name in calls}, device="cpu",
                                size=8, copy_bytes=64)  # fmt: skip
    assert ceilings == Ceilings({"float32": 2 * 8**3 / 2.0}, 2 * 64 / 2.0)


def test_cases_cover_what_is_asked_for():
    windows = [case for case in CASES if case.kind == "window"]
    assert len({case.name for case in CASES}) == len(CASES)
    assert {2**power for power in range(11, 18)} <= {case.seq_len for case in windows}
    assert {case.head_dim for case in windows} == {64, 128}
    assert {128, 200, 256, 512, 1024} == {case.window for case in windows}
    assert {case.dilation for case in windows} == {1, 2, 4}
    scattered = {case.num_globals for case in windows if case.spread == SCATTERED}
    assert scattered == {0, 1, 64} and any(case.num_globals == 64 and case.spread == PREFIX for case in windows)
    assert {case.causal for case in windows} == {True, False}
    assert {case.dtype for case in windows} == {"bfloat16", "float16", "float32"}
    assert {(case.num_globals, case.seq_len) for case in CASES if case.kind == ROWS} >= {(1, 131072), (64, 131072)}
    assert any(case.seq_len % 128 for case in windows)
    assert all(case.purpose and case.contenders for case in CASES)


def test_targets_are_those_that_were_set():
    def of(name, contender):
        (case,) = chosen(name)
        assert contender in case.contenders
        return case.target(contender, FORWARD), case.target(contender, BOTH)

    assert of("window-d64", FLEX) == of("window-d128", FLEX) == (1.3, 1.4)
    assert of("options-d64", FLEX_BEST) == (1.15, 1.2)
    assert of("window-d64", FLASH) == (1.2, 1.1)
    assert of("reach-200", FLEX) == of("length-odd", FLEX) == (1.5, 1.5)
    assert of("dilation-4", FLEX) == (3.2, 3.2) and of("dilation-2", FLEX) == (1.6, 1.6)
    assert of("dilation-4", UNDILATED) == (0.95, 0.95)
    assert of("globals-64", FLEX) == (5, 5)
    assert of("globals-64", WITHOUT_GLOBALS) == (1 / 1.15, 1 / 1.15)
    assert of("row-1-128k", FLEX) == (3, 3)
    assert of("module-8k", LONGFORMER) == (10, 10)
    for name, contender in {"window-d64": DENSE, "length-2k": FLASH, "float16": FLEX, "globals-1": FLEX}.items():
        assert of(name, contender) == (None, None)


def test_scattered_globals_are_spread_evenly():
    positions = replace(PLAIN, num_globals=64).global_positions
    assert len(set(positions)) == 64 and positions[0] > 0 and positions[-1] < PLAIN.seq_len
    assert {after - before for before, after in zip(positions, positions[1:], strict=False)} == {PLAIN.seq_len // 64}
    assert replace(PLAIN, num_globals=3, spread=PREFIX).global_positions == [0, 1, 2]


def test_contenders_that_compute_something_else_are_counted_as_that():
    case = replace(PLAIN, seq_len=64, window=4, dilation=2, num_globals=3)
    assert case.as_computed_by(FLEX) is case
    assert case.as_computed_by(UNDILATED) == replace(case, dilation=1)
    assert case.as_computed_by(WITHOUT_GLOBALS) == replace(case, num_globals=0)
    assert case.as_computed_by(DENSE).work.flops[FORWARD] == 4 * 12 * 64 * 64 * 64
    rows = replace(case, kind=ROWS)
    assert rows.as_computed_by(DENSE) is rows


def test_chosen_cases():
    assert [case.name for case in chosen("row-*,window-d64")] == [
        case.name for case in CASES if case.name.startswith("row-") or case.name == "window-d64"
    ]
    assert chosen(None) == list(CASES)
    assert {case.name for case in chosen(None, is_quick=True)} == set(QUICK_NAMES)
    with pytest.raises(ValueError, match=r"no case matches 'windw\*' \(cases: window-d64, "):
        chosen("window-d64,windw*")


def test_quick_cases_stay_odd():
    small = {case.name: case.quick() for case in CASES}
    assert all(case.seq_len < 1200 for case in small.values())
    assert small["reach-200"].window % 128 and small["length-odd"].seq_len % 128
    assert small["key-heads"].num_kv_heads < small["key-heads"].num_heads
