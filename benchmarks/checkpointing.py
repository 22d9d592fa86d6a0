"""What checkpoints cost a run: the default experiment with one every 20 steps against one at its end alone.

`python -m benchmarks.checkpointing`: pairs of runs in turn, each a process of its own; the time is that of the steps
(`time/train_s` of metrics.jsonl: with the copies taken and every wait for the disk, without start and evaluation).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.timing import Spread, environment, write_csv

ROOT = Path(__file__).resolve().parent.parent
ABOUT = "What checkpoints cost the default experiment, in pairs of runs with and without them."
MAX_COST = 0.05
NEVER = 10**9
QUIET = ("tracker.wandb.mode=disabled", "tracker.tensorboard=false", "task.sample_chars=0", "eval.share=0.001")


@dataclass
class Row:
    """A pair of runs, or the median over all pairs."""

    pair: str
    steps: int
    every: int
    seconds: float
    seconds_without: float
    cost: float  # seconds / seconds_without - 1
    cost_p20: float | None = None
    cost_p80: float | None = None


def run_seconds(folder: Path, steps: int, every: int, extra: list[str]) -> float:
    """Seconds that the steps of a run took, a checkpoint every so many."""
    # the step after the last checkpoint waits for nothing, but the time of its line holds that of the checkpoint
    options = [
        f"schedule.cap.steps={steps + 1}",
        f"train.checkpoint_every={every}",
        f"run_dir={folder}",
        *QUIET,
        *extra,
    ]
    done = subprocess.run([sys.executable, "train.py", *options], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"a run ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["time/train_s"] for line in lines if "time/train_s" in line][-1]


def measure(num_pairs: int, steps: int, every: int, extra: list[str]) -> list[Row]:
    """A row for each pair, which of the two comes first changing from pair to pair, and a last one over all."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for pair in range(num_pairs):
            seconds = {}
            for saves in (every, NEVER) if pair % 2 == 0 else (NEVER, every):
                seconds[saves] = run_seconds(Path(place) / f"{pair}-{saves}", steps, saves, extra)
            cost = seconds[every] / seconds[NEVER] - 1
            rows.append(Row(str(pair), steps, every, seconds[every], seconds[NEVER], cost))
            print(f"pair {pair + 1} of {num_pairs}: {seconds[every]:.2f} s against {seconds[NEVER]:.2f} s, {cost:+.1%}")
    cost = Spread.of([row.cost for row in rows])
    seconds, without = (Spread.of([getattr(row, name) for row in rows]) for name in ("seconds", "seconds_without"))
    rows.append(Row("median", steps, every, seconds.median, without.median, cost.median, cost.low, cost.high))
    return rows


def main() -> None:
    """Measure, print, write the CSV; exit code 1 where the median cost is over the limit."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpointing", description=ABOUT)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="steps between two checkpoints")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "checkpointing_cpu.csv")
    parser.add_argument("overrides", nargs="*", help="of train.py, for both runs of a pair")
    given = parser.parse_args()
    rows = measure(given.pairs, given.steps, given.every, given.overrides)
    write_csv(given.output, rows, environment())
    last = rows[-1]
    met = last.cost < MAX_COST
    print(
        f"a checkpoint every {given.every} of {given.steps} steps costs {last.cost:+.1%} "
        f"({last.cost_p20:+.1%} to {last.cost_p80:+.1%}), limit {MAX_COST:.0%}: {'met' if met else 'NOT MET'}\n"
        f"written: {given.output}"
    )
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
