"""One step's gradients: micro-batches forward and backward, sums over processes, clipping, one look from the host."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from training.distributed import Distributed, unwrap
from training.precision import autocast


@dataclass(frozen=True)
class StepNumbers:
    """What a step gave: `sums` over its `num_targets` targets, the gradient's norm before clipping, whether to stop."""

    sums: dict[str, float]
    num_targets: int
    grad_norm: float
    stop: bool

    @property
    def loss(self) -> float:
        """Mean over the targets of all processes."""
        return self.sums["loss"] / self.num_targets

    @property
    def is_finite(self) -> bool:
        """Whether an update may be made of it."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def forward_backward(
    forward: nn.Module,
    batch: Any,
    loss: Callable[..., tuple],
    *,
    rows: int,
    clip_norm: float,
    precision: str,
    dist: Distributed,
    stop: Callable[[], bool],
) -> StepNumbers:
    """Leave the clipped gradient of the mean loss in the parameters; `rows` examples of the batch at a time.

    forward: the model as it is called, in DDP or compiled. loss: a task's, (model, batch) -> (sum, number of targets,
    {name: sum}). clip_norm: 0 clips nothing. stop: says whether this process has been asked to; one is enough for all.
    """
    micro_batches = batch.split(rows)
    sums: dict[str, Any] = {}
    num_targets = 0
    for number, part in enumerate(micro_batches, start=1):
        with nullcontext() if number == len(micro_batches) else dist.no_sync(forward):
            with autocast(precision, dist.device):
                loss_sum, count, metrics = loss(forward, part.to(dist.device, non_blocking=True))
            (loss_sum * dist.world_size).backward()  # DDP averages over processes, this is a sum
        num_targets += count
        for name, value in {"loss": loss_sum, **metrics}.items():
            sums[name] = sums.get(name, 0.0) + value.detach().double()
    # page-locked, or a GPU would be waited for here
    counts = torch.tensor([num_targets, stop()], dtype=torch.float64, pin_memory=dist.device.type == "cuda")
    counts = counts.to(dist.device, non_blocking=True)
    totals = dist.all_reduce_sum(torch.cat([counts, torch.stack(list(sums.values()))]))
    parameters = list(unwrap(forward).parameters())
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(1 / totals[0])
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm or math.inf)
    # the one place where the host waits for the device: nothing is updated that has not been looked at
    targets, stops, *values, norm = torch.cat([totals, grad_norm.double()[None]]).tolist()
    return StepNumbers(dict(zip(sums, values, strict=True)), int(targets), norm, stops > 0)
