"""Signals to a run: the step in hand is finished and saved, the exit code tells which, and the run goes on exactly."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import tasks.char_lm
from tests.command import metrics_of, phases, run_train, small_run
from tests.helpers import ROOT

STEPS = 10
SCHEDULE = phases(
    {"seq_len": 32, "batch_size": 4, "steps": 6, "lr": 1e-2, "attention": {"window": [4, 12]}},
    {"seq_len": 48, "batch_size": 4, "steps": 4, "lr": 5e-3},
)
EVERY = ("train.log_every=4", "train.checkpoint_every=8", "train.eval_every=5", "model.dropout=0.2")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """(arguments, run folder) of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("straight")
    arguments = [*small_run(folder), *SCHEDULE, *EVERY]
    with pytest.MonkeyPatch.context() as patch:
        no_report(patch)
        ended = run_train(*arguments, f"run_dir={folder / 'run'}", cwd=folder)
    assert ended.code == 0, ended.err
    return arguments, folder / "run"


def no_report(patch):
    patch.setattr("reports.run.write_report", lambda path, patterns: path / "report.html")


@pytest.fixture
def strike(monkeypatch):
    """strike("loss", number, signal): that call of the task's function sends the signal to this process."""
    no_report(monkeypatch)

    def plan(function, number, which):
        calls = 0
        original = getattr(tasks.char_lm.CharLMTask, function)

        def struck(self, *args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), which)
                time.sleep(0.01)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(tasks.char_lm.CharLMTask, function, struck)

    return plan


def same_as(straight, run_dir):
    """Metrics, result and last checkpoint of a run against those of the straight one."""
    assert metrics_of(run_dir) == metrics_of(straight)
    for name in ("model", "optimizer", "rng"):
        file = f"checkpoints/step-{STEPS}/{name}.safetensors"
        assert (run_dir / file).read_bytes() == (straight / file).read_bytes(), name


@pytest.mark.fault(12)
@pytest.mark.fault(13)
@pytest.mark.parametrize("which", SIGNALS)
@pytest.mark.parametrize("step", [2, 6])
def test_the_step_is_finished_and_saved(straight, strike, tmp_path, which, step):
    arguments, folder = straight
    run_dir = tmp_path / "run"
    strike("loss", step, which)
    ended = run_train(*arguments, f"run_dir={run_dir}", cwd=tmp_path)
    assert ended.code == (130 if which == signal.SIGINT else 143)
    assert ended.err == f"error: stopped by {which.name}; the same command with run_dir={run_dir} goes on\n"
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["status"], status["reason"], status["step"]) == ("preempted", which.name, step)
    assert (run_dir / "checkpoints" / f"step-{step}" / "manifest.json").exists()
    again = run_train(*arguments, f"run_dir={run_dir}", cwd=tmp_path)
    assert again.code == 0 and f"going on after step {step}" in again.out
    same_as(folder, run_dir)


@pytest.mark.fault(12)
@pytest.mark.parametrize(("number", "step"), [(1, 5), (2, STEPS)])
def test_an_evaluation_is_left_at_once_and_done_again(straight, strike, tmp_path, number, step):
    """The first evaluation is that of the validation split after five steps, the second the final test."""
    arguments, folder = straight
    run_dir = tmp_path / "run"
    strike("evaluate", number, signal.SIGTERM)
    ended = run_train(*arguments, f"run_dir={run_dir}", cwd=tmp_path)
    assert ended.code == 143
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["status"], status["step"]) == ("preempted", step)
    assert not (run_dir / "result.json").exists()
    again = run_train(*arguments, f"run_dir={run_dir}", cwd=tmp_path)
    assert again.code == 0 and f"going on after step {step}" in again.out
    same_as(folder, run_dir)


@pytest.mark.fault(12)
def test_two_data_workers_leave_the_saving_to_the_loop(tmp_path):
    """The signal goes to the whole process group, as a scheduler or a terminal sends it."""
    long = [*small_run(tmp_path), *phases({"seq_len": 32, "batch_size": 4, "steps": 2000, "lr": 1e-3})]
    arguments = [*long, "train.log_every=1", "train.checkpoint_every=100000", "data.workers=2", "num_threads=1"]
    run_dir = tmp_path / "run"
    code, out = stop_from_outside([sys.executable, "train.py", *arguments, f"run_dir={run_dir}"], run_dir)
    assert code == 143 and "Traceback" not in out, out
    assert "error: stopped by SIGTERM" in out
    status = json.loads((run_dir / "status.json").read_text())
    assert status["status"] == "preempted" and status["step"] >= 3
    assert (run_dir / "checkpoints" / f"step-{status['step']}" / "manifest.json").exists()
    assert metrics_of(run_dir)[-1]["step"] == status["step"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.fault(13)
@pytest.mark.parametrize(
    ("which", "one_worker"), [(signal.SIGTERM, False), (signal.SIGUSR1, False), (signal.SIGUSR2, True)]
)
def test_processes_of_torchrun_stop_after_the_same_step(tmp_path, which, one_worker):
    """Whether the launcher gets the signal and passes it on, or one worker alone."""
    long = [*small_run(tmp_path), *phases({"seq_len": 32, "batch_size": 4, "steps": 2000, "lr": 1e-3})]
    arguments = [*long, "train.log_every=1", "train.checkpoint_every=100000", "num_threads=1"]
    run_dir = tmp_path / "run"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launcher.append("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2")
    command = [sys.executable, *launcher, "train.py", *arguments, f"run_dir={run_dir}"]
    code, out = stop_from_outside(command, run_dir, which, group=False, one_worker=one_worker)
    assert code != 0
    assert f"error: stopped by {which.name}" in out, out
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["status"], status["reason"]) == ("preempted", which.name)
    assert (run_dir / "checkpoints" / f"step-{status['step']}" / "manifest.json").exists()


def stop_from_outside(command, run_dir, which=signal.SIGTERM, group=True, one_worker=False):
    """Start a command, send it (its group, the holder of its run folder) a signal after its third step.

    Returns the exit code and what it printed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams)
    try:
        metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 120
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.02)
        pid = json.loads((run_dir / "run.lock").read_text())["pid"] if one_worker else process.pid
        (os.killpg if group else os.kill)(pid, which)
        out, _ = process.communicate(timeout=90)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out
