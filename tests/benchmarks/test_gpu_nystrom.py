"""The GPU rows of Nystrom attention, run on a CPU: what is counted, what is compared, the dense pass beside it."""

from dataclasses import replace

import pytest
import torch

from benchmarks import gpu, gpu_nystrom, peers
from benchmarks.agreement import TOLERANCE
from benchmarks.cases import BOTH, DENSE, FORWARD, OURS
from benchmarks.gpu_cases import CASES, chosen
from benchmarks.gpu_nystrom import DENSE_8K, NystromCase, NystromProblem
from benchmarks.roofline import BACKWARD, Ceilings
from benchmarks.timing import interleave
from kernels.nystrom_attention import nystrom_attention

SMALL = NystromCase("small", "a test", (DENSE_8K, DENSE), seq_len=280, head_dim=16, num_landmarks=24, num_heads=2,
                    num_kv_heads=2, dtype="float32", short_tokens=64)  # fmt: skip


def session():
    def clock(calls, rounds):
        return interleave(calls, num_rounds=rounds, device="cpu", num_warmup=0)

    return gpu.Session("cpu", Ceilings({"float32": 1e12, "bfloat16": 1e12}, 1e12), clock, 3)


@pytest.fixture
def lengths(monkeypatch):
    """The lengths that dense attention is called with."""
    seen = []

    def dense(*given):
        def attend(query, key, value):
            seen.append(query.shape[1])
            parts = (tensor.transpose(1, 2) for tensor in (query, key, value))
            return torch.nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2)

        return attend

    monkeypatch.setattr(peers, "dense_flash", dense)
    return seen


def test_rows_of_both_passes(lengths):
    on = session()
    rows = {(row.contender, row.passes): row for row in gpu.measure(SMALL, on)}
    assert on.failures == []
    assert set(rows) == {(name, passes) for name in (OURS, DENSE_8K, DENSE) for passes in (FORWARD, BOTH)}
    assert set(lengths) == {64, 280}
    for (contender, passes), row in rows.items():
        assert row.median_ms > 0 and row.note is None and row.table == "nystrom" and row.window is None
        assert row.seq_len == (64 if contender == DENSE_8K else 280)
        # dense attention is another function: timed beside it, and counted with its own pairs
        assert row.reference_error is None if contender != OURS else row.reference_error < 1e-4
        tokens = 64 if contender == DENSE_8K else 280
        expected = SMALL.work.useful_flops(passes)
        if contender != OURS:
            expected = (4 if passes == FORWARD else 14) * 2 * tokens**2 * 16
        assert row.tflops == pytest.approx(expected / (row.median_ms * 1e-3) / 1e12)


def test_work_is_that_of_the_formulas():
    """Forward 8 T N D and 48 N^3 a head; inputs and output move once, with their gradients."""
    work = replace(SMALL, batch=2).work
    assert work.flops[FORWARD] == 2 * 2 * (8 * 280 * 24 * 16 + 48 * 24**3)
    assert work.flops[BACKWARD] == 2 * work.flops[FORWARD]
    tensor = torch.empty(2, 280, 2, 16).nbytes
    assert work.num_bytes == {FORWARD: 4 * tensor, BACKWARD: 7 * tensor}
    assert work.needed_bytes == {FORWARD: 4 * tensor, BOTH: 8 * tensor}


@pytest.mark.parametrize("num_landmarks", [23, 12])
def test_other_landmarks_are_noticed(num_landmarks, monkeypatch):
    """In bfloat16's tolerance, at a length where each landmark is the mean of many tokens."""

    def wrong(*qkv, impl, **options):
        options["num_landmarks"] = num_landmarks if impl != "reference" else options["num_landmarks"]
        return nystrom_attention(*qkv, impl=impl, **options)

    monkeypatch.setattr(gpu_nystrom, "nystrom_attention", wrong)
    on = session()
    case = replace(SMALL, seq_len=2048, contenders=(), dtype="bfloat16")
    assert all(row.median_ms is None for row in gpu.measure(case, on))
    assert len(on.failures) == 2 and "from the float64 reference" in on.failures[0]


def test_bfloat16_is_far_within_the_tolerance():
    rows = gpu.measure(replace(SMALL, seq_len=2048, contenders=(), dtype="bfloat16"), session())
    for row in rows:
        assert 0 < row.reference_error < 0.2 * TOLERANCE["bfloat16"][row.passes]


def test_queries_and_keys_walk():
    query, key, value = NystromProblem(replace(SMALL, seq_len=1000), "cpu").inputs
    for tensor, is_walk in ((query, True), (key, True), (value, False)):
        assert (tensor.diff(dim=1).std() < 0.3 * tensor.std()) == is_walk


def test_cases_and_targets():
    cases = {case.name: case for case in CASES if isinstance(case, NystromCase)}
    assert {(case.seq_len, case.num_landmarks, case.head_dim) for case in cases.values()} == {
        (4096, 64, 64),
        (16384, 64, 64),
        (65536, 64, 64),
    }
    assert DENSE in cases["nystrom-4k"].contenders and DENSE in cases["nystrom-16k"].contenders
    long = cases["nystrom-64k"]
    assert (long.target(DENSE_8K, BOTH), long.target(DENSE_8K, FORWARD)) == (1.0, None)
    assert long.as_computed_by(DENSE_8K).seq_len == 8192
    assert cases["nystrom-16k"].target(DENSE, BOTH) is None
    assert chosen("nystrom-64k") == [long]
    small = long.quick()
    assert small.seq_len <= 1024 and small.as_computed_by(DENSE_8K).seq_len < small.seq_len
