"""The attention benchmark runs, writes every column, times nothing that disagrees, measures what it names."""

import csv
import dataclasses
import os

import numpy as np
import pytest
import torch

from benchmarks import attention, block_sparse, peers, tables, window
from benchmarks.cases import BIGBIRD, BOTH, DENSE, FLEX, FORWARD, LONGFORMER, OURS, random_tensors
from benchmarks.memory import LargestTensor, extra_peak_bytes
from benchmarks.timing import Row, Spread, environment, interleave, log_slope
from kernels.block_sparse_attention import block_sparse_attention
from kernels.window_attention import window_attention
from tests.helpers import run_python

MECHANISMS = [tables.mechanism_of(name) for name in attention.MECHANISMS]
QUICK = window.MECHANISM.quick


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", MECHANISMS, ids=attention.MECHANISMS)
def test_quick_run_fills_every_column(mechanism, tmp_path):
    path = tmp_path / "attention.csv"
    done = run_python("-m", "benchmarks.attention", "--quick", "--mechanism", mechanism.name, "--output", path)
    assert done.returncode == 0, done.stderr
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {field.name for field in dataclasses.fields(Row)} | set(environment())
    assert {(row["table"], row["contender"], row["passes"]) for row in rows} == {
        (table, contender, passes)
        for table, contenders in {
            "module": (OURS, mechanism.module_peer),
            "kernel": (OURS, *mechanism.peers),
            "scaling": (OURS,),
        }.items()
        for contender in contenders
        for passes in (FORWARD, BOTH)
    }
    for row in rows:
        assert row["torch"] == torch.__version__ and row["git_commit"] and row["dirty"] in ("True", "False")
        assert row["mechanism"] == mechanism.name
        assert row["note"] or float(row["median_ms"]) > 0
        if row["table"] == "module":
            assert int(row["extra_memory_bytes"]) > 0
            sizes = dataclasses.asdict(mechanism.quick)
            assert {name: row[name] for name in sizes} == {name: str(size) for name, size in sizes.items()}
    assert sum(bool(row["slope"]) for row in rows) == 2 and sum(bool(row["memory_slope"]) for row in rows) == 1
    assert "theirs / ours" in done.stdout and "targets" in done.stdout


def one_row(name, *, is_quick, num_rounds):
    mechanism = tables.mechanism_of(name)
    return [tables.row_of(mechanism, "module", OURS, FORWARD, mechanism.quick, note=f"process {os.getpid()}")]


def test_all_mechanisms_are_measured_in_processes_of_their_own_unless_one_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(attention, "_measure", one_row)
    for chosen, expected in ((), list(attention.MECHANISMS)), (("--mechanism", "window"), ["window"]):
        path = tmp_path / "attention.csv"
        assert attention.main(["--quick", *chosen, "--output", str(path)]) == 0
        with path.open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [row["mechanism"] for row in rows] == expected
        assert len({row["note"] for row in rows}) == len(expected)


@pytest.mark.gpu
def test_quick_run_on_a_gpu(tmp_path):
    path = tmp_path / "attention.csv"
    names = ["window-d64", "row-1-128k", "module-8k"]
    arguments = ("--device", "cuda", "--quick", "--cases", ",".join(names), "--output", path)
    done = run_python("-m", "benchmarks.attention", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(dict.fromkeys(row["case"] for row in rows)) == names
    for row in rows:
        if row["contender"] in (OURS, FLEX, DENSE, LONGFORMER):
            assert float(row["median_ms"]) > 0, row["note"]
            assert int(row["extra_memory_bytes"]) > 0
            assert row["table"] == "module" or 0 < float(row["roofline_share"]) < 1.05
        else:  # FlashAttention is not everywhere
            assert row["median_ms"] or row["note"].startswith("not available")
    assert "of roofline" in done.stdout and "targets" in done.stdout


def test_disagreeing_peer_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(peers, "longformer_self_attention", _shifted(peers.longformer_self_attention))
    monkeypatch.setattr(tables, "interleave", _must_not_run)
    assert attention.main(["--quick", "--mechanism", "window"]) == 1
    error = capsys.readouterr().err
    assert "transformers Longformer differs from ours by" in error and "nothing is timed" in error


def _shifted(make):
    def build(*sizes):
        module = make(*sizes)
        module.register_forward_hook(lambda module, inputs, out: out + 0.01)
        return module

    return build


def _must_not_run(*args, **kwargs):
    raise AssertionError("timed although the outputs disagree")


def test_unknown_device_is_a_usage_error(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        attention.main(["--device", "cuda"])
    assert stop.value.code == 2 and "torch sees no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "cuda", "--cases", "window-d64,windw"], "--cases: no case matches 'windw' (cases: window-d64"),
        (["--budget", "10"], "--budget and --cases go with --device cuda"),
        (["--device", "cuda", "--mechanism", "window"], "--mechanism goes with --device cpu"),
        (["--mechanism", "windw"], "invalid choice: 'windw'"),
    ],
)
def test_bad_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        attention.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_cases_can_be_listed_without_a_gpu(capsys):
    assert attention.main(["--device", "cuda", "--list", "--cases", "dilation-?,globals-64"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == ["dilation-4", "globals-64", "dilation-2"]
    assert shown[0].endswith("T 16384, D 64, window 256, dilation 4: a dilation costs what none costs")


def test_cuda_is_handed_on_with_its_options(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention.gpu, "run", lambda cases, **given: seen.update(given, cases=cases) or 1)
    output = tmp_path / "rows.csv"
    chosen = ("--device", "cuda", "--budget", "60", "--cases", "reach-*", "--rounds", "3", "--output", str(output))
    assert attention.main([*chosen]) == 1
    assert [case.name for case in seen["cases"]] == ["reach-200"]
    assert (seen["budget"], seen["num_rounds"], seen["output"], seen["is_quick"]) == (60.0, 3, output, False)


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=attention.MECHANISMS)
def test_both_modules_compute_the_same_gradients(mechanism):
    shape = mechanism.quick
    x = random_tensors(1, (1, shape.seq_len, shape.dim), shape, requires_grad=True)[0]
    ours, theirs = (mechanism.module(side, shape) for side in (OURS, mechanism.module_peer))
    weights = torch.randn_like(x)
    grads = []
    for module in (ours, theirs):
        parameters = {name.rpartition("attention.")[2]: value for name, value in module.named_parameters()}
        wanted = {name: value for name, value in parameters.items() if value.requires_grad}
        names = ["x", *sorted(wanted)]
        found = torch.autograd.grad(module(x), [x, *(wanted[name] for name in names[1:])], weights)
        grads.append(dict(zip(names, found, strict=True)))
    # x, weight and bias of query, key and value, and the taps of the convolution
    assert len(grads[0]) == (8 if mechanism.name == "nystrom" else 7)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


def test_dense_peer_sees_the_same_window():
    query, key, value = random_tensors(3, (1, 100, 2, 16), QUICK, requires_grad=False)
    attend = peers.dense_sdpa(100, 7, "cpu", torch.float32)
    torch.testing.assert_close(attend(query, key, value), window_attention(query, key, value, window=7))


def test_block_peer_sees_the_same_blocks():
    """At the sizes of the run as at the quick ones: the pattern of the peer as it trains, in its first layer."""
    shape = block_sparse.BlockShape(num_heads=2, head_dim=8)
    x = random_tensors(1, (1, shape.seq_len, shape.dim), shape, requires_grad=False)[0]
    ours, theirs = (block_sparse.make_module(side, shape) for side in (OURS, BIGBIRD))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_dense_attention_sees_every_key():
    query, key, value = random_tensors(3, (1, 100, 2, 16), QUICK, requires_grad=False)
    everything = block_sparse.BlockPattern.etc(100, 50, 2, 2)
    expected = block_sparse_attention(query, key, value, everything)
    torch.testing.assert_close(peers.dense_attention(query, key, value), expected)


def test_contenders_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "AB"}
    seconds = interleave(calls, num_rounds=3, device="cpu", num_warmup=1)
    assert "".join(order) == "ABABABAB"
    assert seconds["A"].shape == (3,) and (seconds["A"] >= 0).all()


def test_ratio_is_taken_round_by_round():
    row = tables.row_of(window.MECHANISM, "kernel", DENSE, FORWARD, QUICK)
    row.ratio_to(np.array([2.0, 40.0, 6.0]), np.array([1.0, 10.0, 1.0]))
    assert row.ratio == 4.0
    assert row.ratio_p20 is not None and row.ratio_p80 is not None and row.ratio_p20 < 4.0 < row.ratio_p80


def test_targets_are_those_of_the_mechanism():
    """One line for each figure that has a limit, with the limit of its own mechanism."""
    rows = []
    for mechanism in MECHANISMS:
        row = tables.row_of(mechanism, "module", mechanism.module_peer, FORWARD, mechanism.shape)
        row.ratio, row.target, row.memory_ratio = 2.7, mechanism.min_ratio[FORWARD], 0.3
        slope = tables.row_of(mechanism, "scaling", OURS, BOTH, mechanism.shape, slope=1.06, memory_slope=1.0)
        rows += [row, slope]
    found = [(name, measured, target, met) for name, _, measured, target, met in attention._targets(rows)]
    assert found[:4] == [
        ("window", "2.700", ">= 2.5", "yes"),
        ("window", "0.300", "<= 0.333", "yes"),
        ("window", "1.060", "<= 1.05", "NO"),
        ("window", "1.000", "<= 1.05", "yes"),
    ]
    assert found[4] == ("block_sparse", "2.700", ">= 3", "NO")


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_slope_is_the_power_of_the_growth(power):
    lengths = [256, 512, 1024]
    seconds = {length: np.array([1e-6, 3e-6]) * length**power for length in lengths}
    assert log_slope(lengths, seconds).median == pytest.approx(power)


def test_spread_is_median_and_20_to_80_percent():
    assert Spread.of(np.arange(11)) == Spread(5.0, 2.0, 8.0)


def test_largest_tensor_sees_a_square_inside_forward_or_backward():
    x = torch.randn(300, 4, requires_grad=True)
    with LargestTensor() as seen:
        (x @ x.T).softmax(-1).sum().backward()
    assert seen.elements == 300 * 300
    with LargestTensor() as seen:
        torch.zeros(1, 4).expand(1000, 4)  # no memory behind it
    assert seen.elements == 4


@pytest.mark.slow
def test_memory_of_a_call_is_what_it_allocates():
    arguments = {"mebibytes": 96}
    found = extra_peak_bytes(f"{__name__}:allocate", arguments, {"mebibytes": 1}, device="cpu", num_threads=1)
    assert 95 * 2**20 <= found <= 104 * 2**20  # the kernel counts resident pages in batches


def allocate(mebibytes: int):
    """A call that holds that much memory, beside memory of its own that was there before it."""
    held = torch.ones(64 * 2**18)
    return lambda: (held.sum(), torch.ones(mebibytes * 2**18))
