"""The staged schedule as pure functions: step -> phase, step in phase -> learning rate."""

import math
from collections.abc import Sequence

DECAYS = ("constant", "linear", "cosine", "polynomial")


def learning_rate(
    phase_step: int,
    *,
    lr: float,
    steps: int,
    warmup_steps: int,
    decay: str,
    final_lr_ratio: float,
    decay_power: float = 1.0,
) -> float:
    """Learning rate of the update number `phase_step` (from 0) of a phase of `steps` updates.

    Linear warm-up lr/warmup_steps, 2 lr/warmup_steps, ... up to `lr`, then `decay` from `lr` at step
    `warmup_steps` towards `final_lr_ratio * lr`, which would be reached at step `steps`, one past the last
    update: no update is spent at a final rate of zero. "polynomial" falls with the part of the way that is left to the
    power `decay_power`, "linear" with that part itself; "constant" ignores `final_lr_ratio`.

    Raises ValueError for a step outside [0, steps], an unknown decay, or a warm-up longer than the phase.
    """
    if decay not in DECAYS:
        raise ValueError(f"decay must be one of {', '.join(DECAYS)}, got {decay!r}")
    if not 0 <= warmup_steps <= steps:
        raise ValueError(f"warmup_steps must lie in 0..{steps} (the steps of the phase), got {warmup_steps}")
    if not 0 <= phase_step <= steps:
        raise ValueError(f"phase_step must lie in 0..{steps}, got {phase_step}")
    if phase_step < warmup_steps:
        return lr * (phase_step + 1) / warmup_steps
    if decay == "constant" or steps == warmup_steps:
        return lr
    progress = (phase_step - warmup_steps) / (steps - warmup_steps)
    if decay == "cosine":
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        remaining = (1.0 - progress) ** (decay_power if decay == "polynomial" else 1.0)
    return lr * (final_lr_ratio + (1.0 - final_lr_ratio) * remaining)


def locate(step: int, phase_steps: Sequence[int]) -> tuple[int, int]:
    """(index of the phase, step in that phase) of the update number `step` (from 0) of the whole run.

    A phase begins at the sum of the steps before it; phases of 0 steps are never located. `step` equal to the
    total is the end of the run: the last phase that has steps, with all of its steps done.

    Raises ValueError for a step outside [0, total] or a schedule without steps.
    """
    total = sum(phase_steps)
    if total < 1 or min(phase_steps) < 0:
        raise ValueError(f"phases need steps >= 0 and at least one step in all, got {list(phase_steps)}")
    if not 0 <= step <= total:
        raise ValueError(f"step must lie in 0..{total} (all phases together), got {step}")
    start = 0
    for index, steps in enumerate(phase_steps):
        if step < start + steps or (steps and start + steps == step == total):
            return index, step - start
        start += steps
    raise AssertionError("unreachable: step lies in 0..total")
