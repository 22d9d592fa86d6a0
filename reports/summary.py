"""What a run prints before its first step and after its last."""

import contextlib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reports.console import command_path
from reports.metrics import is_number


def opening(name: str, phases: Sequence[Any], num_parameters: int, where: str, path: Path, step: int) -> str:
    """What a person wants to know before the first step; `where`: precision and device, `step`: that of a resume."""
    steps = sum(phase.steps for phase in phases)
    tokens = sum(phase.steps * phase.batch_size * phase.seq_len for phase in phases)
    lines = [
        f"{name}: {num_parameters / 1e6:.2f}M parameters, {where}",
        f"{len(phases)} phase{'s' if len(phases) > 1 else ''}, {steps:,} steps, {tokens:,} tokens",
        f"run folder {path}",
    ]
    return "\n".join([*lines, f"going on after step {step:,}"] if step else lines)


def closing(result: Mapping[str, Any], metric: str, sample: str, path: Path, report: Path) -> str:
    """The result beside what it should be held against, where it lies, and what to try next."""
    better = sorted((bits, name) for name, bits in result["baselines"].items() if not name.startswith("train_bytes"))
    others = ", ".join(f"{name} {bits:.2f}" for bits, name in better)
    return "\n".join(
        [
            f"sample: {sample[-200:]!r}",
            f"test {metric} {result[metric]:.4f} on {scored(result)} "
            f"({result['share']:.0%} of the split); beside it {others}",
            f"{result['train_seconds']:.0f} s of training, {result['tokens_per_second']:,.0f} tokens/s, "
            f"peak {result['peak_memory_bytes'] / 2**30:.2f} GiB",
            f"report {report}",
            "next:",
            *_uses(path, result),
            "  python train.py --help   # the experiments, and the keys that any override may change",
            *_variations(path),
        ]
    )


def finished(path: Path) -> str:
    """What a finished run says when it is started once more."""
    result = {}
    with contextlib.suppress(OSError, ValueError):  # nothing of what follows depends on it
        result = json.loads((path / "result.json").read_text(encoding="utf-8"))
    scores = ", ".join(
        f"{name} {float(result[name]):.4f}" for name in ("bpc", "bits_per_token", "accuracy", "f1") if name in result
    )
    return "\n".join(
        [
            f"finished already: {path} ({result.get('split', 'test')} {scores}; {path / 'report.html'}). "
            "Start anew with another run_dir, or use what it learned:",
            *_uses(path, result),
        ]
    )


def scored(result: Mapping[str, Any]) -> str:
    """How much a score was taken on, in the units of its task; "" where the result does not say."""
    units = {"num_characters": "characters", "num_tokens": "masked tokens"}
    return next((f"{result[name]:,} {unit}" for name, unit in units.items() if is_number(result.get(name))), "")


def prompt_for(result: Mapping[str, Any]) -> str:
    """A text to try a trained model on."""
    return "Paris is the <mask> of France." if result.get("task") == "masked_lm" else "Once upon a time"


def _uses(path: Path, result: Mapping[str, Any]) -> list[str]:
    """Commands that take a trained run."""
    run_dir = shlex.quote(f"run_dir={command_path(path)}")
    return [f'  python predict.py {run_dir} prompt="{prompt_for(result)}"', f"  python eval.py {run_dir}"]


def _variations(path: Path) -> list[str]:
    """Commands for runs like this one: its overrides with a change, and over several seeds."""
    overrides = path / "overrides.txt"
    lines = overrides.read_text(encoding="utf-8").splitlines() if overrides.is_file() else []
    given = [line for line in lines if line and not line.startswith(("run_dir=", "seed="))]
    experiment = next((line.partition("=")[2] for line in given if line.startswith("experiment=")), None)
    # the phases of an experiment set the window themselves
    change = "optim.weight_decay=0.1" if experiment else "model.attention.window=64"
    kept = [line for line in given if line.partition("=")[0] != change.partition("=")[0]]
    return [
        f"  {shlex.join(['python', 'train.py', *kept, change, 'seed=1'])}",
        f"  {shlex.join(['python', 'train.py', '-m', *given, 'seed=0,1,2'])}   # several runs; then "
        f"python -m reports.compare sweeps/{experiment or 'default'}",
    ]
