"""kill -9 at any moment of training, over and over: the run ends with the metrics and weights of one left alone."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.command import metrics_of, phases, small_run
from tests.helpers import ROOT
from training.checkpoint import newest_sound


def schedule(steps):
    """Two phases; the second has a new optimizer, and dilation beside the windows of the first."""
    first = {"seq_len": 32, "batch_size": 4, "lr": 1e-2, "warmup_steps": 9, "attention": {"window": [4, 12]}}
    second = {"seq_len": 48, "batch_size": 4, "lr": 5e-3, "reset_optimizer": True, "attention": {"dilation": 2}}
    return phases({**first, "steps": steps * 5 // 9}, {**second, "steps": steps - steps * 5 // 9})


EVERY = ("train.log_every=3", "train.checkpoint_every=4", "train.eval_every=40", "model.dropout=0.2", "num_threads=1")
ACCUMULATED = "schedule.micro_batch_tokens=96"


def start(arguments, run_dir, log):
    command = [sys.executable, "train.py", *arguments, f"run_dir={run_dir}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def steps_done(run_dir, before):
    """The step that this process has brought metrics.jsonl to; 0 before it has made the file anew."""
    try:
        file = run_dir / "metrics.jsonl"
        if file.stat().st_ino == before:
            return 0
        return json.loads(file.read_bytes().splitlines()[-1])["step"]
    except (FileNotFoundError, IndexError, ValueError, KeyError):
        return 0


def kill_at(process, run_dir, target, rng, before, resumed):
    """kill -9 once a run has trained beyond where it went on and reached a step; that step, None if it had ended."""
    while process.poll() is None and steps_done(run_dir, before) <= max(target - 1, resumed):
        time.sleep(0.002)
    time.sleep(rng.random() * 0.05)  # anywhere between two log lines
    reached = steps_done(run_dir, before)
    process.send_signal(signal.SIGKILL)
    return reached if process.wait() == -signal.SIGKILL else None


@pytest.mark.slow
@pytest.mark.fault(1)
@pytest.mark.fault(14)
@pytest.mark.timeout(1800)
def test_kills_leave_no_trace(tmp_path, soak):
    num_kills, steps = (30, 600) if soak else (3, 120)
    rng = random.Random(1)
    arguments = [*small_run(tmp_path), *schedule(steps), *EVERY, ACCUMULATED]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    with open(tmp_path / "log", "w+b") as log:
        assert start(arguments, straight, log).wait() == 0, (tmp_path / "log").read_text()
        inside = []
        for number, target in enumerate(sorted(rng.uniform(1, steps) for _ in range(num_kills)), start=1):
            metrics, newest = killed / "metrics.jsonl", newest_sound(killed)
            before = metrics.stat().st_ino if metrics.exists() else None
            resumed = int(newest.name.partition("-")[2]) if newest else 0
            step = kill_at(start(arguments, killed, log), killed, target, rng, before, resumed)
            newest = newest_sound(killed)
            print(
                f"kill {number} of {num_kills}: went on after step {resumed}, meant for step {target:.1f}, "
                f"{'came too late' if step is None else f'after the line of step {step}'}, "
                f"newest checkpoint {newest.name if newest else 'none'}",
                flush=True,
            )
            if step is not None and 0 < step < steps:
                inside.append(step)
        last = start(arguments, killed, log)
        assert last.wait() == 0, (tmp_path / "log").read_text()[-3000:]
    print(f"{len(inside)} of {num_kills} landed between the first and the last step: {inside}")
    assert len(inside) >= num_kills * 5 // 6
    assert metrics_of(killed) == metrics_of(straight)
    for name in ("model", "optimizer", "rng"):
        file = f"checkpoints/step-{steps}/{name}.safetensors"
        assert (killed / file).read_bytes() == (straight / file).read_bytes(), name
    results = [json.loads((folder / "result.json").read_text()) for folder in (straight, killed)]
    for timed in ("tokens_per_second", "train_seconds", "peak_memory_bytes"):
        for result in results:
            result.pop(timed)
    assert results[0] == results[1]
    # nothing half-written is left over
    names = {path.name for path in (killed / "checkpoints").iterdir()}
    assert not [name for name in names if ".tmp-" in name or ".old-" in name]
