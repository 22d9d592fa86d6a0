"""The same score by three protocols, timed: `python -m benchmarks.evaluation run_dir=DIR --help`.

streaming reads each character once with a rolling cache, windowed gives every 512 characters a window cut to what the
model can see, uncut the paper's whole window. Nothing is timed before the scores agree.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import Spread, environment, interleave, write_csv
from eval import open_run
from training.precision import autocast

STREAMING, WINDOWED, UNCUT = "streaming", "windowed", "uncut"
# bits per character between two protocols: rounding, far under what a comparison of models prints
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-3}


class Disagreement(Exception):
    """Scores that should be equal are not: their times would mean nothing."""


@dataclass
class Row:
    """One protocol on one part of a split."""

    protocol: str
    split: str
    share: float
    num_characters: int
    reads: float  # characters given to the model, a scored one
    bpc: float
    bpc_difference: float  # from streaming
    num_rounds: int
    median_s: float
    p20_s: float
    p80_s: float
    characters_per_second: float
    ratio: float  # the protocol's time over that of streaming, median over the rounds
    ratio_p20: float
    ratio_p80: float
    num_parameters: int
    receptive_field: int
    context: int
    stride: int
    batch_tokens: int
    precision: str
    device: str
    step: int


def measure(run: Any, split: str, settings: dict[str, Any], protocols: list[str], num_rounds: int) -> list[Row]:
    """A row a protocol, streaming first; Disagreement where their scores differ by more than rounding."""
    device = next(run.model.parameters()).device
    num_read = [0]
    counting = run.model.register_forward_pre_hook(lambda module, given: _count(num_read, given[0]))

    def score(protocol):
        with autocast(run.precision, device):
            return run.task.evaluate(run.model, split, protocol=protocol, **settings)

    names, results, reads = list(dict.fromkeys([STREAMING, *protocols])), {}, {}
    for name in names:
        num_read[0] = 0
        results[name] = score(name)
        reads[name] = num_read[0]
    counting.remove()
    ours = results[STREAMING]
    for name in names:
        difference = abs(results[name]["bpc"] - ours["bpc"])
        if not difference <= TOLERANCE[run.precision]:
            raise Disagreement(
                f"{name} gives {results[name]['bpc']:.6f} bpc, streaming {ours['bpc']:.6f}: nothing is timed. They are "
                f"one score where the receptive field ({ours['receptive_field']:,}) is at most context - stride "
                f"({ours['context'] - ours['stride']:,})"
            )
    calls = {name: lambda name=name: score(name) for name in names}
    seconds = interleave(calls, num_rounds=num_rounds, device=device.type, num_warmup=0)
    num_parameters = sum(parameter.numel() for parameter in run.model.parameters())
    rows = []
    for name in names:
        result, times, ratio = results[name], Spread.of(seconds[name]), Spread.of(seconds[name] / seconds[STREAMING])
        rows.append(
            Row(
                protocol=name,
                split=split,
                share=settings["share"],
                num_characters=result["num_characters"],
                reads=reads[name] / result["num_characters"],
                bpc=result["bpc"],
                bpc_difference=result["bpc"] - ours["bpc"],
                num_rounds=num_rounds,
                median_s=times.median,
                p20_s=times.low,
                p80_s=times.high,
                characters_per_second=float(np.median(result["num_characters"] / seconds[name])),
                ratio=ratio.median,
                ratio_p20=ratio.low,
                ratio_p80=ratio.high,
                num_parameters=num_parameters,
                receptive_field=result["receptive_field"],
                context=result["context"],
                stride=result["stride"],
                batch_tokens=settings["batch_tokens"],
                precision=run.precision,
                device=device.type,
                step=run.state["step"],
            )
        )
    return rows


def _count(total, ids):
    total[0] += ids.numel()


def _show(console: Console, rows: list[Row]) -> None:
    first = rows[0]
    table = Table(title=f"{first.split}, {first.num_characters:,} characters", title_justify="left")
    for column in ("protocol", "bpc", "read a character", "s, median (20-80 %)", "characters/s", "time / streaming"):
        table.add_column(column, justify="left" if column == "protocol" else "right")
    for row in rows:
        table.add_row(
            row.protocol,
            f"{row.bpc:.6f}",
            f"{row.reads:.2f}",
            f"{row.median_s:.2f} ({row.p20_s:.2f}-{row.p80_s:.2f})",
            f"{row.characters_per_second:,.0f}",
            f"{row.ratio:.2f} ({row.ratio_p20:.2f}-{row.ratio_p80:.2f})",
        )
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, write the CSV; 0, 1 where scores disagree, else the code of what is wrong."""
    about = "One score of a run by streaming and by windows: bits per character, time, characters a second."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=about)
    parser.add_argument("source", help="run_dir=DIR or checkpoint=DIR/checkpoints/step-N")
    parser.add_argument("--split", default="test", help="default test")
    parser.add_argument("--share", type=float, default=0.02, help="part of the split, from its start (default 0.02)")
    parser.add_argument("--protocols", default=f"{WINDOWED},{UNCUT}", help=f"peers (default {WINDOWED},{UNCUT})")
    parser.add_argument("--context", type=int, help="default as in the run")
    parser.add_argument("--stride", type=int, help="default as in the run")
    parser.add_argument("--batch-tokens", type=int, help="default as in the run")
    parser.add_argument("--data-path", help="file of the corpus, where it is not where the run found it")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of the timing (default 7)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", type=Path, help="CSV (default benchmarks/results/evaluation_DEVICE.csv)")
    options = parser.parse_args(arguments)
    key, _, value = options.source.partition("=")
    protocols = options.protocols.split(",")
    if key not in ("run_dir", "checkpoint") or not value:
        parser.error(f"{options.source}: give run_dir=DIR or checkpoint=PATH")
    if not set(protocols) <= {WINDOWED, UNCUT}:
        parser.error(f"--protocols {options.protocols}: choose from {WINDOWED},{UNCUT}")
    if not 0 < options.share <= 1 or options.rounds < 1:
        parser.error("--share must be above 0 and at most 1, --rounds at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")

    console = Console()
    console.width = max(console.width, 100)  # a log has no width of its own
    source = {"run_dir": None, "checkpoint": None, key: value}
    try:
        run = open_run(**source, device=torch.device(options.device), data={"path": options.data_path})
        if options.split not in run.task.splits:
            parser.error(f"--split {options.split}: choose from {', '.join(run.task.splits)}")
        given = {name: getattr(options, name) for name in ("context", "stride", "batch_tokens")}
        settings = {name: run.config.eval[name] if entry is None else entry for name, entry in given.items()}
        rows = measure(run, options.split, {**settings, "share": options.share}, protocols, options.rounds)
    except Exception as error:
        code = 1 if isinstance(error, Disagreement) else getattr(error, "exit_code", None)
        if code is None:
            raise
        print(f"error: {error}", file=sys.stderr)
        return code
    _show(console, rows)
    output = options.output or Path(f"benchmarks/results/evaluation_{options.device}.csv")
    write_csv(output, rows, environment())
    console.print(f"written: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
