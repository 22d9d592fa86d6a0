"""The state of all random generators a run draws from, as tensors and JSON."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.files import json_ready


def step_seed(*numbers: int) -> int:
    """A seed for torch, below 2**64, from numbers such as a run's seed, the step and the rank; equal on any machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def capture() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(byte tensors of torch's CPU and CUDA generators, JSON of Python's and NumPy's)."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors.update({f"cuda-{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())})
    version, words, gauss = random.getstate()
    return tensors, {
        "python": [version, list(words), gauss],
        "numpy": json_ready(np.random.get_state(legacy=False)),
    }


def restore(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Set the generators to what `capture` gave; CUDA devices this machine lacks are left out."""
    torch.set_rng_state(tensors["cpu"])
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        if f"cuda-{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda-{index}"], index)
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(values["numpy"])
