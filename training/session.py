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
from training.progress import ProgressReporter, peak_memory_bytes
from training.rng import step_seed
from training.run_dir import RunDir
from training.schedule import learning_rate
from training.signals import Signals
from training.step import StepNumbers, forward_backward
from training.tracking import Tracker

INITIAL_STATE = {"step": 0, "tokens": 0, "train_seconds": 0.0, "nonfinite": 0, "rewinds": 0}


@dataclass
class Session:
    """What the loop works on.

    cfg, phases, task: the checked configuration, the phases as they are trained, the task. make_model, make_optimizer:
    build the model anew (on the CPU, from torch's seed) and an optimizer for it. precision: resolved. tracker, writer:
    in the main process only. `model` is the bare one, `forward` what a step calls. `state` holds the counters that
    every checkpoint carries: step, tokens, train_seconds, nonfinite, rewinds.
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
        """Set model, a new optimizer, meter and counters to the newest sound checkpoint; None where there is none.

        Then everything is as at the first step. Returns the checkpoint and what it holds beside the counters: `data`,
        `phase`, `attention`, `world_size`. The batches are to be made anew. A damaged newer checkpoint is set aside.
        Raises CheckpointError where there are checkpoints and none is sound.
        """
        newest = newest_sound(self.folder.path, set_aside=True) if self.dist.is_main else None
        newest = self.dist.broadcast_object(None if newest is None else str(newest))
        self.optimizer, self.meter, self.batches = self.make_optimizer(self.model), Meter(), None
        if newest is None:
            if self.state:  # gone back to the first step
                torch.manual_seed(self.cfg.seed)
                self.model.load_state_dict(self.make_model().state_dict())
            if hasattr(self.model, "load_source"):
                self.model.load_source()  # type: ignore[operator]
            self.state.update(INITIAL_STATE)
            return None
        saved = load_checkpoint(Path(newest), model=self.model, optimizer=self.optimizer)
        self.meter.load_state_dict(saved.pop("meter"))
        self.state.update({name: saved.pop(name) for name in INITIAL_STATE})
        return Path(newest), saved

    def compute_gradients(self, batch: Any, index: int, phase_step: int) -> tuple[float, StepNumbers]:
        """(learning rate, numbers) of a step of a phase; its clipped gradient is left in the parameters."""
        cfg, phase = self.cfg, self.phases[index]
        lr = learning_rate(
            phase_step,
            lr=phase.lr,
            steps=phase.steps,
            warmup_steps=phase.warmup_steps,
            decay=phase.decay,
            final_lr_ratio=phase.final_lr_ratio,
            decay_power=phase.decay_power,
        )
        self.optimizer.set_lr(lr)
        # what is dropped is a function of these alone, so that a resumed run drops the same
        torch.manual_seed(step_seed(cfg.seed, self.state["rewinds"], self.state["step"], self.dist.rank))
        numbers = forward_backward(
            self.forward,
            batch,
            self.task.loss,
            rows=max(1, (cfg.schedule.micro_batch_tokens or phase.seq_len * phase.batch_size) // phase.seq_len),
            clip_norm=cfg.optim.clip_norm,
            precision=self.precision,
            dist=self.dist,
            stop=lambda: self.signals.received is not None,
        )
        return lr, numbers

    def log_interval(self, numbers: StepNumbers, index: int, lr: float) -> None:
        """One line of metrics for the steps since the last; `numbers`, `lr` are those of the newest."""
        metrics, seconds = self.meter.report()
        self.state["train_seconds"] += seconds
        metrics |= {
            "step": self.state["step"],
            "phase": index,
            "optim/lr": lr,
            "optim/grad_norm": numbers.grad_norm,
            "progress/tokens": self.state["tokens"],
            "time/train_s": self.state["train_seconds"],
            "mem/peak_gib": peak_memory_bytes(self.dist.device) / 2**30,
        }
        if self.state["nonfinite"]:
            metrics["train/nonfinite"] = self.state["nonfinite"]
        self.progress.update(metrics)
        if self.tracker:
            self.tracker.log(metrics, self.state["step"])

    def save(self, phase: int) -> None:
        """Have a checkpoint of this step written while the next steps run; `phase` is the one this step belongs to."""
        if self.writer is None:
            return
        more = {
            "world_size": self.dist.world_size,
            "data": self.task.fingerprint,
            "phase": phase,
            "attention": dict(self.phases[phase].attention),
            "meter": self.meter.state_dict(),
        }
        self.writer.save(self.state["step"], model=self.model, optimizer=self.optimizer, state={**self.state, **more})
        if self.writer.last_step is not None:
            self.folder.status("running", step=self.writer.last_step)

    def ensure_saved(self) -> None:
        """Wait, all processes, for the checkpoint of this step; ResourceError where the disk had no room for it."""
        if self.writer is not None:
            self._check_saved(self.writer)
        self.dist.barrier()  # a process that left before would have the others killed by their launcher

    def _check_saved(self, writer: CheckpointWriter) -> None:
        writer.wait()
        step, saved = self.state["step"], writer.last_step
        if saved != step:
            raise ResourceError(
                f"step {step} is trained but not saved, {self.folder.path} has no room for its checkpoint (last saved: "
                f"{'none in this session' if saved is None else f'step {saved}'}). Free some space and run the same "
                "command again."
            )
