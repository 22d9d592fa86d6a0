"""A loss that is not finite: the run stops before the update, passes over it, or goes back."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import predict
import tasks.char_lm
from tests.command import _run, metrics_of, phases, run_eval, run_train, small_run

STEPS = 10
SCHEDULE = phases(
    {"seq_len": 32, "batch_size": 4, "steps": 6, "lr": 1e-2, "attention": {"window": [4, 12]}},
    {"seq_len": 48, "batch_size": 4, "steps": 4, "lr": 5e-3, "attention": {"dilation": 2}},
)
EVERY = ("train.log_every=2", "train.checkpoint_every=4", "train.eval_every=100", "train.keep_checkpoints=20")
LOSS = tasks.char_lm.CharLMTask.loss

pytestmark = pytest.mark.fault(32)


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("reports.run.write_report", lambda path, patterns: path / "report.html")


@pytest.fixture
def seen(monkeypatch):
    """The batches that the losses were computed of, in order."""
    batches = []

    def loss(self, model, batch):
        batches.append(batch)
        return LOSS(self, model, batch)

    monkeypatch.setattr(tasks.char_lm.CharLMTask, "loss", loss)
    return batches


def poison(monkeypatch, *bad, value=math.nan):
    """The loss of these batches becomes `value`, whenever they come."""

    def loss(self, model, batch):
        total, count, metrics = LOSS(self, model, batch)
        if any(batch.shape == one.shape and torch.equal(batch, one) for one in bad):
            total = total * value
        return total, count, metrics

    monkeypatch.setattr(tasks.char_lm.CharLMTask, "loss", loss)


@pytest.fixture
def straight(tmp_path, seen):
    """(arguments, run folder, batches) of a run without a fault."""
    arguments = [*small_run(tmp_path), *SCHEDULE, *EVERY]
    ended = run_train(*arguments, "train.checkpoint_every=1", f"run_dir={tmp_path / 'straight'}", cwd=tmp_path)
    assert ended.code == 0, ended.err
    return arguments, tmp_path / "straight", list(seen)


def status_of(run_dir):
    return json.loads((run_dir / "status.json").read_text())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_stop_comes_before_the_update_and_loses_nothing(straight, tmp_path, monkeypatch, value):
    arguments, whole, batches = straight
    run_dir = tmp_path / "run"
    poison(monkeypatch, batches[6], value=value)
    ended = run_train(*arguments, f"run_dir={run_dir}", cwd=tmp_path)
    assert ended.code == 5 and "Traceback" not in ended.err and "at step 7 (lr 0.005)" in ended.err
    assert ended.err.count("\n") == 1 and str(run_dir / "nonfinite" / "step-6") in ended.err
    assert torch.equal(load_file(run_dir / "nonfinite" / "step-6" / "batch-rank-0.safetensors")["batch"], batches[6])
    assert json.loads((run_dir / "nonfinite" / "step-6" / "facts.json").read_text())["phase"] == 1
    for name in ("model", "optimizer"):
        file = f"checkpoints/step-6/{name}.safetensors"
        assert (run_dir / file).read_bytes() == (whole / file).read_bytes()
    assert status_of(run_dir)["status"] == "failed" and "NumericsError" in status_of(run_dir)["reason"]
    # the same batch comes again, and can be passed over
    assert run_train(*arguments, f"run_dir={run_dir}", cwd=tmp_path).code == 5
    again = run_train(*arguments, "train.nonfinite=skip", f"run_dir={run_dir}", cwd=tmp_path)
    assert again.code == 0 and "going on after step 6" in again.out


def test_skip_leaves_out_the_update_and_counts_it(straight, tmp_path, monkeypatch):
    arguments, whole, batches = straight
    run_dir = tmp_path / "run"
    poison(monkeypatch, batches[4], batches[5], batches[8])
    ended = run_train(*arguments, "train.nonfinite=skip", f"run_dir={run_dir}", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert "step 5: loss nan, gradient norm nan; no update (1 of 10)" in ended.out
    lines = {line["step"]: line for line in metrics_of(run_dir) if "phase" in line}
    unharmed = {line["step"]: line for line in metrics_of(whole) if "phase" in line}
    assert lines[4] == unharmed[4]
    assert "train/loss" not in lines[6] and lines[6]["train/nonfinite"] == 2
    assert math.isfinite(lines[10]["train/loss"]) and lines[10]["train/nonfinite"] == 3
    assert math.isfinite(json.loads((run_dir / "result.json").read_text())["bpc"])


def test_a_run_that_skipped_goes_on_exactly(straight, tmp_path, monkeypatch):
    arguments, _, batches = straight
    poison(monkeypatch, batches[2], batches[7])
    arguments = [*arguments, "train.nonfinite=skip", "model.dropout=0.1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_train(*arguments, f"run_dir={whole}", cwd=tmp_path).code == 0
    # phases of other lengths are another schedule, so the first part ends by a failure
    loss = tasks.char_lm.CharLMTask.loss

    def failing(self, model, batch):
        if torch.equal(batch, batches[5]):
            raise MemoryError("as if")
        return loss(self, model, batch)

    monkeypatch.setattr(tasks.char_lm.CharLMTask, "loss", failing)
    assert run_train(*arguments, f"run_dir={cut}", cwd=tmp_path).code == 1
    monkeypatch.setattr(tasks.char_lm.CharLMTask, "loss", loss)
    assert run_train(*arguments, f"run_dir={cut}", cwd=tmp_path).code == 0
    assert metrics_of(cut) == metrics_of(whole)


@pytest.mark.parametrize("every", [4, 100])
def test_rewind_goes_back_and_reads_on_in_another_order(straight, tmp_path, monkeypatch, every):
    """To the last checkpoint, or to the first step where there is none yet; the same twice."""
    arguments, whole, batches = straight
    poison(monkeypatch, batches[6])
    arguments = [*arguments, "train.nonfinite=rewind", f"train.checkpoint_every={every}", "model.dropout=0.1"]
    back = 4 if every == 4 else 0
    for name in ("run", "twin"):
        ended = run_train(*arguments, f"run_dir={tmp_path / name}", cwd=tmp_path)
        assert ended.code == 0, ended.err
        assert f"step 7: loss nan, gradient norm nan; back to step {back} (1 of 10)" in ended.out
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "twin")
    steps = [line["step"] for line in metrics_of(tmp_path / "run") if "train/loss" in line]
    assert steps == [2, 4, 6, 8, 10]
    weights = [f"checkpoints/step-{STEPS}/model.safetensors", f"checkpoints/step-{STEPS}/optimizer.safetensors"]
    for file in weights:
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "twin" / file).read_bytes()
        assert (tmp_path / "run" / file).read_bytes() != (whole / file).read_bytes()


def test_a_final_score_that_is_not_finite_fails_the_run_and_all_that_use_it(tmp_path):
    run_dir = tmp_path / "run"
    arguments = (*small_run(tmp_path), "schedule.phases.0.lr=1e30", "train.nonfinite=skip", f"run_dir={run_dir}")
    for _ in range(2):  # the same command tries the test again
        ended = run_train(*arguments, cwd=tmp_path)
        assert ended.code == 5 and "error: test bpc is nan at step 3: these weights give no finite score" in ended.err
        assert f"kept in {run_dir / 'checkpoints'}" in ended.err and ended.err.count("\n") == 1
        assert (status_of(run_dir)["status"], status_of(run_dir)["step"]) == ("failed", 3)
    assert (run_dir / "checkpoints" / "step-3" / "manifest.json").exists()
    assert json.loads((run_dir / "result.json").read_text())["bpc"] == "nan"
    scored = run_eval(f"run_dir={run_dir}", cwd=tmp_path)
    assert scored.code == 5 and "test bpc nan at step 3" in scored.out
    assert scored.err.startswith("error: test bpc is nan at step 3: ") and scored.err.count("\n") == 1
    for temperature in (0.8, 0):
        arguments = (f"run_dir={run_dir}", "prompt=the", f"temperature={temperature}", "length=3")
        asked = _run("predict", predict.main, arguments, tmp_path)
        assert asked.code == 5 and asked.out == "the\n" and asked.err.count("\n") == 1
        assert asked.err.startswith(f"error: {run_dir}/checkpoints/step-3 cannot continue this text: what the model ")


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_the_limit_ends_it(straight, tmp_path, monkeypatch, policy):
    arguments, _, _ = straight

    def loss(self, model, batch):
        total, count, metrics = LOSS(self, model, batch)
        return total * math.nan, count, metrics

    monkeypatch.setattr(tasks.char_lm.CharLMTask, "loss", loss)
    options = (f"train.nonfinite={policy}", "train.nonfinite_limit=3")
    ended = run_train(*arguments, *options, f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert ended.code == 5 and "Traceback" not in ended.err
    assert f"not finite 4 times, train.nonfinite={policy} allows 3" in ended.err
