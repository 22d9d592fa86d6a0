"""What a run prints before its first step and after its last."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


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
            f"test {metric} {result[metric]:.4f} on {result['num_characters']:,} characters "
            f"({result['share']:.0%} of the split); beside it {others}",
            f"{result['train_seconds']:.0f} s of training, {result['tokens_per_second']:,.0f} tokens/s, "
            f"peak {result['peak_memory_bytes'] / 2**30:.2f} GiB",
            f"report {report}",
            "next:",
            f"  python eval.py run_dir={path}",
            "  python train.py --help   # the experiments, and the keys that any override may change",
            "  python train.py model.attention.window=64 seed=1",
            "  python train.py -m seed=0,1,2   # several runs; then python -m reports.compare sweeps/default",
        ]
    )
