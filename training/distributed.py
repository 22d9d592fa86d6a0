"""One process or several with the same code: `torchrun` sets the environment, `Distributed` reads it."""

import contextlib
import datetime
import json
import os
from typing import Any

import torch
import torch.distributed as dist

# functions of its have the group of the moment of import as a default argument and would keep that group alive
import torch.distributed.nn.functional
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.errors import ResourceError


class Distributed:
    """The process group and the device of this process, as a context manager.

    Without WORLD_SIZE above 1 in the environment no group is made and every method is the trivial one.
    `device`: "auto" (CUDA where there is one), "cpu" or "cuda"; with CUDA each local rank takes the GPU of
    its number. gloo carries CPU tensors, nccl CUDA ones. `timeout_s`: how long a rank waits for the others.

    Raises ResourceError where CUDA, or a GPU of that number, is asked for and absent.
    """

    def __init__(self, device: str = "auto", *, timeout_s: float = 1800.0):
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0")) if self.world_size > 1 else 0
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0")) if self.world_size > 1 else 0
        self.device = choose_device(device, self.local_rank)
        self._wrapped: list[DistributedDataParallel] = []
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            dist.init_process_group(
                "nccl" if self.device.type == "cuda" else "gloo",
                timeout=datetime.timedelta(seconds=timeout_s),
            )

    def __enter__(self) -> "Distributed":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files."""
        return self.rank == 0

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum of `tensor` over ranks, in place; any shape. Returns `tensor`."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def broadcast_object(self, value: Any) -> Any:
        """The main rank's `value`, JSON only, on every rank; what the others pass is ignored.

        It travels as bytes of JSON, so that no rank unpickles what it received.
        """
        if self.world_size == 1:
            return value
        text = json.dumps(value).encode() if self.is_main else b""
        size = torch.tensor([len(text)], dtype=torch.int64, device=self.device)
        dist.broadcast(size, src=0)
        buffer = torch.zeros(int(size.item()), dtype=torch.uint8, device=self.device)
        if self.is_main:
            buffer.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(buffer, src=0)
        return json.loads(bytes(buffer.tolist()))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier(device_ids=[self.local_rank] if self.device.type == "cuda" else None)

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` with its gradients averaged over ranks, or `model` itself in a single process."""
        if self.world_size == 1:
            return model
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        self._wrapped.append(DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True))
        return self._wrapped[-1]

    def no_sync(self, model: nn.Module) -> contextlib.AbstractContextManager:
        """Backward passes in here keep gradients local: for all micro-batches of a step but the last."""
        return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()

    def close(self) -> None:
        """Leave the process group; a second call does nothing. What `wrap` returned can no longer be called."""
        if self.world_size > 1 and dist.is_initialized():
            # gloo's threads end with the last reference to their group; one that is still letting go of a tensor
            # when the interpreter ends aborts the process
            for model in self._wrapped:
                del model.reducer, model.logger, model.process_group
            self._wrapped.clear()
            dist.destroy_process_group()


def choose_device(device: str, local_rank: int = 0) -> torch.device:
    """The device for "auto", "cpu" or "cuda" and a local rank.

    Raises ResourceError where it is absent, ValueError for another word.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {device!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise ResourceError("device=cuda, but this machine has no usable CUDA GPU; use device=cpu or device=auto")
    if local_rank >= count:
        raise ResourceError(
            f"process {local_rank} of this machine has no GPU of its own: {count} found. Start at most "
            f"{count} processes per machine (torchrun --nproc-per-node), or use device=cpu."
        )
    return torch.device("cuda", local_rank)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile: its names are those of a checkpoint."""
    if isinstance(model, DistributedDataParallel):
        return unwrap(model.module)
    inner = getattr(model, "_orig_mod", None)
    return unwrap(inner) if isinstance(inner, nn.Module) else model
