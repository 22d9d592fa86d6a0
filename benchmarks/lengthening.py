"""A dense encoder made eight times as long: rows of positions copied against random ones, before and after training on.

`python -m benchmarks.lengthening --tokenizer FOLDER --corpus PATH` follows table 5 of arXiv 2004.05150 with a model of
minutes: it trains experiment=mlm_cpu, converts it twice, scores both, trains both on (experiment=mlm_cpu_long) and
scores them again. `--folder` keeps the runs; the same command goes on with what is there.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.timing import environment, write_csv

ROOT = Path(__file__).resolve().parent.parent
ABOUT = "Bits per masked token of a dense encoder, of its long copies, and of those trained on."
SHORT, TIMES, WINDOW = 128, 8, 64  # keys of a window on each side: with it a long row costs what the short one did
QUIET = ("tracker.wandb.mode=disabled", "tracker.tensorboard=false")
NAMES = {
    "dense": "dense, its own length",
    "random": "lengthened, random rows",
    "copy": "lengthened, copied rows",
    "random_on": "random rows, trained on",
    "copy_on": "copied rows, trained on",
}


@dataclass
class Row:
    """A model's score on the test split, and the steps and seconds that were spent on it alone."""

    model: str
    context: int
    bits_per_token: float
    accuracy: float
    num_tokens: int
    steps: int
    seconds: float


def train(folder: Path, arguments: list[str]) -> Row:
    """Run `train.py` into a folder, or on in it; the score of its result."""
    call("train.py", [*arguments, *QUIET, f"run_dir={folder}"])
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return row_of(folder.name, result, result["step"], result["train_seconds"])


def converted(source: Path, target: Path, arguments: list[str]) -> Row:
    """Make a long copy of a model where there is none yet; its score as it is."""
    if not (target / "config.json").is_file():
        sizes = ["--to", "longformer", "--max-positions", SHORT * TIMES, "--window", WINDOW]
        call("-m", ["models.convert", source, target, *sizes, "--positions", target.name])
    scores = target.with_name(f"{target.name}_score")
    score = ["task=masked_lm", f"context={SHORT * TIMES}", f"output={scores}"]
    call("eval.py", [f"checkpoint={target}", *score, *arguments])
    result = json.loads((scores / "test-step-0.json").read_text(encoding="utf-8"))
    return row_of(target.name, result, 0, 0.0)


def row_of(name: str, result: dict, steps: int, seconds: float) -> Row:
    """A row of what a result says."""
    scores = {key: result[key] for key in ("context", "bits_per_token", "accuracy", "num_tokens")}
    return Row(model=NAMES[name], **scores, steps=steps, seconds=seconds)


def call(script: str, arguments: list) -> None:
    """Run a command of the project in a process of its own, its output here; exits with its code where it fails."""
    words = [str(word) for word in arguments]
    print(f"\n$ python {script} {' '.join(words)}", flush=True)
    code = subprocess.run([sys.executable, script, *words], cwd=ROOT).returncode
    if code:
        sys.exit(code)


def measure(folder: Path, tokenizer: str, corpus: str, extra: list[str]) -> list[Row]:
    """A row for each of NAMES, in that order."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = [word for word in extra if word.lstrip("+").startswith("model.")]
    data = [f"data.path={corpus}", *[word for word in extra if word.startswith(("data.", "task.", "device="))]]
    rest = [*data, *[word for word in extra if word not in shape and word not in data]]
    dense = train(folder / "dense", ["experiment=mlm_cpu", f"task.tokenizer={tokenizer}", *shape, *rest])
    published = folder / "dense" / "pretrained"
    long = {name: converted(published, folder / name, data) for name in ("random", "copy")}
    on = {
        name: train(folder / f"{name}_on", ["experiment=mlm_cpu_long", f"model.source={folder / name}", *rest])
        for name in long
    }
    return [dense, long["random"], long["copy"], on["random"], on["copy"]]


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| model | context | bits per masked token | accuracy | updates |", "|---|---|---|---|---|"]
    for row in rows:
        score = f"{row.bits_per_token:.3f} | {row.accuracy:.3f}"
        lines.append(f"| {row.model} | {row.context:,} | {score} | {row.steps:,} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, write the CSV."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lengthening", description=ABOUT)
    parser.add_argument("--tokenizer", required=True, help="folder with tokenizer files")
    parser.add_argument("--corpus", required=True, help="as data.path of train.py")
    parser.add_argument("--folder", type=Path, help="where the runs are kept (default: nowhere)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "lengthening_cpu.csv")
    parser.add_argument(
        "overrides",
        nargs="*",
        help="of train.py; model.… for the dense model alone, data.…, task.…, device=… for the scores, too",
    )
    given = parser.parse_args()
    corpus, tokenizer = (str(Path(path).expanduser().absolute()) for path in (given.corpus, given.tokenizer))
    with tempfile.TemporaryDirectory() as place:
        rows = measure((given.folder or Path(place)).absolute(), tokenizer, corpus, given.overrides)
    write_csv(given.output, rows, environment())
    print(f"\n{table(rows)}\n\nwritten: {given.output}")


if __name__ == "__main__":
    main()
