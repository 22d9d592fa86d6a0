"""What the launches of window kernels take beside their tensors: per-head tables and global keys."""

from functools import cache
from typing import NamedTuple

import torch

from kernels import tile_table
from kernels.window_attention.pattern import WindowPattern

INT32_MAX = 2**31 - 1


class GlobalKeys(NamedTuple):
    """Global keys of each example: positions int64 [B, G], the first counts [B] int32 of them real and different."""

    positions: torch.Tensor
    counts: torch.Tensor


def head_tables(pattern: WindowPattern, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(window, dilation) of each head, int32 [H] on a device, copied there once."""
    return _per_head(pattern.window, device), _per_head(pattern.dilation, device)


# without a limit: a CUDA graph goes on reading what was here when it was captured
@cache
def _per_head(values, device):
    return torch.tensor([min(value, INT32_MAX) for value in values], dtype=torch.int32, device=device)


# called when a call is compiled: made in its first run, the tables would lie in the memory of a CUDA graph
@torch.compiler.assume_constant_result
def prepare_tables(window: tuple[int, ...], dilation: tuple[int, ...], device: torch.device) -> None:
    """Make the tables of a pattern, so that no later call has to."""
    if torch.compiler.is_exporting():  # where they would be no real tensors: the program makes them when it runs
        return
    _per_head(window, device)
    _per_head(dilation, device)


def num_seen(pattern: WindowPattern) -> int:
    """Keys that a query of the widest head sees."""
    return max(pattern.window) * (1 if pattern.causal else 2) + 1


def global_arguments(global_keys: GlobalKeys | None) -> tuple:
    """(positions, counts, G); None, None and 0 without global keys."""
    return (None, None, 0) if global_keys is None else (*global_keys, global_keys.positions.shape[1])


def global_block(num_global: int) -> int:
    """Global keys of one tile, at most 64."""
    return min(64, tile_table.block_dim(max(num_global, 1)))
