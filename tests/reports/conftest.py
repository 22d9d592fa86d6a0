"""Synthetic run folders: the files that train.py writes, without a training."""

import json
from pathlib import Path

import pytest
import yaml


def _config(seed: int, window, **changes) -> dict:
    config = {
        "experiment_name": "tiny",
        "seed": seed,
        "run_dir": f"runs/{seed}",
        "data": {"path": None, "cache_dir": f"cache-{seed}", "workers": seed},
        "model": {"dim": 32, "num_layers": 2, "attention": {"window": window, "dilation": 1}},
        "schedule": {
            "phases": [
                {"seq_len": 64, "batch_size": 4, "steps": 20, "lr": 1e-3, "attention": {"window": [4, 8]}},
                {"seq_len": 128, "batch_size": 4, "steps": 10, "lr": 1e-5, "attention": {"window": [8, 16]}},
            ]
        },
        "eval": {"context": 512, "stride": 64},
        "tracker": {"tensorboard": bool(seed % 2)},
    }
    return {**config, **changes}


def write_run(folder: Path, *, seed: int = 0, bpc: float | None = 2.5, window=4, status="finished", **changes):
    """A run folder of 30 steps in two phases; `bpc` None: no result.json; `changes` go to the config."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(_config(seed, window, **changes)))
    (folder / "overrides.txt").write_text(f"experiment=tiny\nseed={seed}\nrun_dir={folder}\n")
    (folder / "status.json").write_text(json.dumps({"status": status, "step": 30 if bpc else 17}))
    (folder / "env.json").write_text(json.dumps({"python": "3.11.7", "packages": {"torch": "2.13.0"}}))
    lines = []
    for step in range(1, 31):
        phase = int(step > 20)
        lines.append({"step": step, "phase": phase, "train/bpc": 8.0 / step + 2, "optim/lr": 1e-3 / (1 + phase)})
        if step % 10 == 0:
            lines.append({"step": step, "phase": phase, "valid/bpc": 8.0 / step + 2.1, "time/eval_s": 0.1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "samples").mkdir()
    (folder / "samples" / "step-20.txt").write_text("an older text")
    (folder / "samples" / "step-100.txt").write_text("the newest text")
    if bpc is not None:
        baselines = {"gzip": 2.9, "markov_1": 3.4, "train_bytes_used": 90_000, "train_bytes": 90_000}
        result = {
            "task": "char_lm", "dataset": "text8", "split": "test", "step": 30, "bpc": bpc, "share": 0.25,
            "num_characters": 5000, "context": 512, "stride": 64, "receptive_field": 24, "seed": seed,
            "num_parameters": 41_061_376, "tokens_per_second": 1000.0 + seed, "peak_memory_bytes": 2**30,
            "train_seconds": 200.0, "baselines": baselines, "data": {"sha256": "abc123"},
        }  # fmt: skip
        (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture(name="write_run")
def write_run_fixture():
    """The function that writes a synthetic run folder."""
    return write_run
