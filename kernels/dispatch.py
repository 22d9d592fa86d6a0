"""Which path a call takes: the one that `impl` names, or the fastest one that can do what is asked for."""

import logging
from collections.abc import Callable
from functools import cache

import torch

from kernels import tile_table
from kernels.tile_table import INTERPRETED

log = logging.getLogger(__name__)
IMPLEMENTATIONS = ("auto", "triton", "blocked", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def choose_path(
    function: str, impl: str, query: torch.Tensor, why_not: Callable[..., str | None], lacking: tuple[str, ...] = ()
) -> str:
    """The path of `function` that `impl` stands for; "auto" is said once, with the reason.

    Args:
        why_not: called with a device and the keywords head_dim, dtype and needs: why the Triton kernels cannot run.
        lacking: arguments of the call that the kernels do not have.

    Raises:
        ValueError: an unknown `impl`, or "triton" where the kernels cannot run.
        NotImplementedError: "triton" although they lack an argument.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}, it must be one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "triton" and lacking:
        raise NotImplementedError(
            f"{function}: impl='triton' has no {' and '.join(lacking)} yet, use impl='auto' or 'blocked'"
        )
    if impl == "triton":
        reason = why_not(query.device, head_dim=query.shape[-1], dtype=query.dtype)
        if reason is not None:
            raise ValueError(f"{function}: impl='triton': {reason}")
    if impl != "auto":
        return impl
    reason = "the fastest one outside of GPUs"
    if query.is_cuda:
        reason = why_not(query.device, head_dim=query.shape[-1], dtype=query.dtype, needs=lacking)
    impl = "triton" if reason is None else "blocked"
    if not torch.compiler.is_compiling():
        say_once(function, impl, reason or "the fastest one on this device, with every feature asked for")
    return impl


@cache
def say_once(function: str, impl: str, reason: str) -> None:
    """Log which path a function takes and why, the first time."""
    log.info("%s runs on the %s path: %s", function, impl, reason)


def why_not_triton(device: torch.device, *, head_dim: int, dtype: torch.dtype, kernels: tuple[str, ...]) -> str | None:
    """Why kernels of the tile table cannot run for tensors like these, as a clause; None where they can.

    Triton is first imported here.
    """
    try:
        from kernels import launch
    except ImportError as error:
        if (error.name or "").split(".")[0] != "triton":
            raise
        return "the package triton is not installed"
    if dtype not in DTYPES and not (INTERPRETED and dtype == torch.float64):
        return f"the kernels take float32, float16 and bfloat16, not {dtype}"
    if head_dim > tile_table.MAX_HEAD_DIM:
        return f"the kernels take a head dim of at most {tile_table.MAX_HEAD_DIM}, not {head_dim}"
    if device.type == "cpu":
        advice = "move the tensors to a GPU, or set TRITON_INTERPRET=1 before Python starts"
        return None if INTERPRETED else f"the kernels run on CUDA, the tensors are on the CPU: {advice}"
    if device.type != "cuda":
        return f"the kernels run on CUDA, the tensors are on {device.type}"
    if INTERPRETED:
        return "TRITON_INTERPRET=1 is set, which takes tensors on the CPU"
    # by comparison, as a compiler may know the head dim as a symbol alone
    padded = min(block for block in tile_table.BLOCK_DIMS if head_dim <= block)
    return launch.device_lacks(device, dtype.itemsize, padded, kernels)
