"""A run at work: its model, optimizer and counters, and their way to and from its checkpoints."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.checkpoint import load_checkpoint, newest_sound
from training.checkpoint_writer import CheckpointWriter
from training.distributed import Distributed
from training.errors import ResourceError
from training.meter import Meter
from training.optim import Optimizers
from training.progress import ProgressReporter
from training.run_dir import RunDir
from training.signals import Signals
from training.tracking import Tracker

FIRST = {"step": 0, "tokens": 0, "train_seconds": 0.0, "nonfinite": 0, "rewinds": 0}


@dataclass
class Session:
    """What the loop works on.

    cfg, phases, task: the checked configuration, the phases as they are trained, the task. make_model, make_optimizer:
    build the model anew (on the CPU, from torch's seed) and an optimizer for it. precision: resolved. tracker, writer:
    in the main process only. `model` is the bare one, `forward` what a step calls. `state` holds the counters that
    every checkpoint carries: step, tokens, train_seconds, nonfinite, rewinds, and the data's fingerprint.
    """

    cfg: Any
    phases: list
    task: Any
    folder: RunDir
    dist: Distributed
    signals: Signals
    precision: str
    progress: ProgressReporter
    make_model: Callable[[], nn.Module]
    make_optimizer: Callable[[nn.Module], Optimizers]
    tracker: Tracker | None = None
    writer: CheckpointWriter | None = None
    batches: Iterator | None = None
    meter: Meter = field(default_factory=Meter)
    state: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        torch.manual_seed(self.cfg.seed)
        self.model = self.make_model().to(self.dist.device)
        self.forward = self.dist.wrap(torch.compile(self.model) if self.cfg.compile else self.model)  # type: ignore[arg-type]
        self.optimizer = self.make_optimizer(self.model)

    @property
    def num_steps(self) -> int:
        """Steps of all phases together."""
        return sum(phase.steps for phase in self.phases)

    @property
    def num_parameters(self) -> int:
        """Numbers the model learns, tied ones once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def restore(self) -> tuple[Path, dict[str, Any]] | None:
        """Set everything to the newest sound checkpoint, or to the first step where there is none, and return None.

        Returns the checkpoint and what it holds beside the counters: `data`, `phase`, `attention`. A damaged newer one
        is set aside. Raises CheckpointError where there are checkpoints and none is sound.
        """
        newest = newest_sound(self.folder.path, set_aside=True) if self.dist.is_main else None
        newest = self.dist.broadcast_object(None if newest is None else str(newest))
        self.optimizer, self.meter, self.batches = self.make_optimizer(self.model), Meter(), None
        if newest is None:
            if self.state:  # gone back to the first step
                torch.manual_seed(self.cfg.seed)
                self.model.load_state_dict(self.make_model().state_dict())
            self.state.update(FIRST)
            return None
        saved = load_checkpoint(Path(newest), model=self.model, optimizer=self.optimizer)
        self.meter.load_state_dict(saved.pop("meter"))
        self.state.update({name: saved.pop(name) for name in FIRST})
        return Path(newest), saved

    def save(self, phase: int) -> None:
        """Have a checkpoint of this step written while the next steps run; `phase` is the one this step belongs to."""
        if self.writer is None:
            return
        more = {
            "data": self.task.fingerprint,
            "phase": phase,
            "attention": dict(self.phases[phase].attention),
            "meter": self.meter.state_dict(),
        }
        step = self.state["step"]
        self.writer.save(step, model=self.model, optimizer=self.optimizer, state={**self.state, **more})
        self.folder.status("running", step=step)

    def ensure_saved(self) -> None:
        """Wait for the checkpoint of this step; ResourceError where the disk had no room for it."""
        if self.writer is None:
            return
        self.writer.wait()
        step, saved = self.state["step"], self.writer.last_step
        if saved != step:
            raise ResourceError(
                f"step {step} is trained but not saved, {self.folder.path} has no room for its checkpoint (last saved: "
                f"{'none in this session' if saved is None else f'step {saved}'}). Free some space and run the same "
                "command again."
            )
