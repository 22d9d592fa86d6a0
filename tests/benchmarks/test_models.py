"""The benchmark of whole encoders: both sides are one function, every column is written, targets are judged right."""

import csv
import dataclasses

import pytest
import torch

from benchmarks import encoders, models, peers
from benchmarks.cases import BOTH, FORWARD, LONGFORMER, OURS
from benchmarks.encoders import CASES, PEERS
from benchmarks.timing import Row, environment
from models.pretrained import published_tensors
from tests.helpers import run_python

QUICK = {case.name: case.quick() for case in CASES}


@pytest.mark.slow
def test_quick_run_fills_every_column(tmp_path):
    path = tmp_path / "models.csv"
    done = run_python("-m", "benchmarks.models", "--quick", "--only", "longformer-4k-backward", "--output", path)
    assert done.returncode == 0, done.stderr
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {field.name for field in dataclasses.fields(Row)} | set(environment())
    assert [row["contender"] for row in rows] == [OURS, LONGFORMER]
    for row in rows:
        assert (row["table"], row["case"], row["mechanism"]) == ("encoder", "longformer-4k-backward", "longformer")
        assert (row["passes"], row["num_layers"], row["window"], row["num_globals"]) == (BOTH, "2", "32", "1")
        assert float(row["median_ms"]) > 0 and row["num_rounds"] == "2" and "train()" in row["note"]
        assert int(row["extra_memory_bytes"]) > 0 and int(row["weight_bytes"]) > 0
        assert row["git_commit"] and row["transformers"]
    assert rows[0]["weight_bytes"] == rows[1]["weight_bytes"]
    assert float(rows[1]["ratio"]) > 0 and float(rows[1]["memory_ratio"]) > 0 and float(rows[1]["max_error"]) < 1e-4
    assert "| longformer-4k-backward | transformers Longformer | 2 |" in done.stdout
    assert "longformer-4k-backward: times as fast:" in done.stdout and "(>= 1.35)" in done.stdout


@pytest.mark.parametrize("model", PEERS)
def test_both_sides_have_the_same_states_and_gradients(model):
    # in float64: oneDNN's float32 gradient of transformers' depthwise filter is off by a fifth (torch 2.13, Zen 5)
    case = dataclasses.replace(QUICK[f"{model}-4k-backward"], dtype="float64")
    modules = {side: encoders.build(case, side) for side in (OURS, case.peer)}
    found, expected = (encoders.states(case, module)() for module in modules.values())
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-6)
    ours, theirs = (
        dict(zip(dict(module.named_parameters()), encoders.call_of(case, module)(), strict=True))
        for module in modules.values()
    )
    found, largest = published_tensors(modules[OURS], ours), max(grad.abs().max().item() for grad in theirs.values())
    assert {f"model.{name}" for name in found} == set(theirs)
    for name, grad in found.items():
        torch.testing.assert_close(grad, theirs[f"model.{name}"], rtol=1e-6, atol=1e-8 * largest)


def test_mechanisms_are_at_work_in_the_sizes_that_are_timed():
    """No text is so short that a side falls back to full attention; the old plan of BigBird is drawn for its length."""
    for case in (*CASES, *QUICK.values()):
        config = encoders.config_of(case)
        assert config["max_position_embeddings"] - case.seq_len == (2 if case.model in ("longformer", "roberta") else 0)
        if case.window is not None:
            assert config["attention_window"] == 2 * case.window and case.seq_len % config["attention_window"] == 0
            assert 2 * case.window + 1 < case.seq_len
        if case.block_size is not None:
            assert case.seq_len > (5 + 2 * case.num_random_blocks) * case.block_size and case.in_training
        if case.num_landmarks is not None:
            assert config["segment_means_seq_len"] == case.seq_len > case.num_landmarks


def test_the_claims_are_cases():
    held = {
        (case.model, case.seq_len, case.passes): (case.num_layers, case.min_ratio, case.max_memory_ratio)
        for case in CASES
        if case.max_memory_ratio is not None
    }
    assert held == {
        ("longformer", 4096, FORWARD): (12, 1.2, 1.0),
        ("longformer", 4096, BOTH): (12, 1.35, 1.0),
        ("big_bird", 4096, FORWARD): (12, 1.35, 1.0),
        ("big_bird", 4096, BOTH): (12, 1.35, 1.0),
        ("longformer", 16384, FORWARD): (12, None, 0.5),
        ("longformer", 16384, BOTH): (2, None, 0.5),
        ("big_bird", 16384, FORWARD): (12, None, 0.5),
        ("big_bird", 16384, BOTH): (2, None, 0.5),
    }
    assert all((case.dim, case.num_heads) == (768, 12) for case in CASES)
    assert all(case.num_rounds >= 7 for case in CASES if case.min_ratio)


def rows_of(name, ratio, extra):
    case = next(case for case in CASES if case.name == name)
    ours, theirs = (models._row(case, side) for side in (OURS, case.peer))
    for row, own in zip((ours, theirs), extra, strict=True):
        row.extra_memory_bytes, row.weight_bytes, row.median_ms, row.num_rounds = own, 100, 5.0, 7
    theirs.ratio = theirs.ratio_p20 = theirs.ratio_p80 = ratio
    theirs.memory_ratio = extra[0] / extra[1]
    theirs.target, theirs.max_memory_ratio = case.min_ratio, case.max_memory_ratio
    return [ours, theirs]


def test_targets_name_what_they_judge():
    rows = [
        *rows_of("longformer-4k-forward", 1.19, (50, 100)),
        *rows_of("big_bird-4k-backward", 1.35, (101, 100)),
        *rows_of("big_bird-16k-backward", 0.5, (40, 100)),
        *rows_of("nystromformer-4k-forward", 0.5, (300, 100)),
    ]
    assert list(models.targets(rows)) == [
        ("longformer-4k-forward: times as fast", "1.190", ">= 1.2", "NO"),
        ("longformer-4k-forward: extra peak memory over theirs", "0.500", "<= 1", "yes"),
        ("longformer-4k-forward: the same with the weights", "0.750", "<= 1", "yes"),
        ("big_bird-4k-backward: times as fast", "1.350", ">= 1.35", "yes"),
        ("big_bird-4k-backward: extra peak memory over theirs", "1.010", "<= 1", "NO"),
        ("big_bird-4k-backward: the same with the weights", "1.005", "<= 1", "NO"),
        ("big_bird-16k-backward: extra peak memory over theirs", "0.400", "<= 0.5", "yes"),
        ("big_bird-16k-backward: the same with the weights", "0.700", "<= 0.5", "NO"),
    ]
    table = models.markdown(rows, 1).splitlines()
    assert len({line.count("|") for line in table}) == 1 and len(table) == 6


def test_a_peer_that_disagrees_is_reported_and_not_timed(monkeypatch, capsys, tmp_path):
    make = peers.whole_encoder

    def shifted(*arguments):
        module = make(*arguments)
        module.register_forward_hook(lambda module, inputs, out: out + 0.01)
        return module

    def must_not_run(*args, **kwargs):
        raise AssertionError("timed although the outputs disagree")

    monkeypatch.setattr(peers, "whole_encoder", shifted)
    monkeypatch.setattr(models, "interleave", must_not_run)
    monkeypatch.setattr(models, "extra_peak_bytes", must_not_run)
    monkeypatch.setattr(models, "_in_own_process", models.measure)  # where what is replaced here stands
    path = tmp_path / "models.csv"
    assert models.main(["--quick", "--only", "roberta-4k-forward", "--output", str(path)]) == 1
    shown = capsys.readouterr()
    assert "error: roberta-4k-forward: transformers RoBERTa: its output differs" in shown.err
    assert "| 0 | not measured: transformers RoBERTa: its output differs" in shown.out
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and all(not row["median_ms"] and "differs" in row["note"] for row in rows)


def test_budget_leaves_out_what_does_not_fit(capsys):
    assert models.main(["--quick", "--only", "*-4k-forward", "--budget", "0"]) == 0
    left = "longformer-4k-forward, big_bird-4k-forward, nystromformer-4k-forward, roberta-4k-forward"
    assert f"left out after 0 s: {left}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "longformer-4k-forward,longfrmer"], "--only: no case matches 'longfrmer' (cases: longformer-4k"),
        (["--rounds", "0"], "--rounds is 0, it must be at least 1"),
        (["--device", "cuda"], "torch sees no CUDA device"),
    ],
)
def test_bad_usage(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        models.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.gpu
def test_quick_run_on_a_gpu(tmp_path):
    path = tmp_path / "models.csv"
    arguments = ("--device", "cuda", "--quick", "--only", "longformer-4k-*,big_bird-4k-*", "--output", path)
    done = run_python("-m", "benchmarks.models", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and all(float(row["median_ms"]) > 0 and row["dtype"] == "bfloat16" for row in rows)
