"""Where the global tokens are: from a mask to positions, from a user's list of positions to a canonical one."""

import torch
import torch.nn.functional as F


def global_positions(is_global: torch.Tensor, valid: torch.Tensor | None, capacity: int) -> torch.Tensor:
    """Positions of the tokens that are global and valid, ascending, -1 pads: int64 [B, capacity].

    is_global [B, T] bool, True = global; valid [B, T] bool, True = real, or None. Nothing waits for the device: shapes
    come from `capacity` alone.

    Raises:
        ValueError: shapes or dtypes that do not fit; on the CPU a row with more global tokens than `capacity`, where
            other devices, and compiled code, fail an assertion on the device.
    """
    if is_global.dim() != 2 or is_global.dtype != torch.bool:
        raise ValueError(f"is_global must be bool [B, T], got {is_global.dtype} {tuple(is_global.shape)}")
    if valid is not None and (valid.shape != is_global.shape or valid.dtype != torch.bool):
        raise ValueError(
            f"valid must be bool {tuple(is_global.shape)} as is_global, got {valid.dtype} {tuple(valid.shape)}"
        )
    if capacity < 0:
        raise ValueError(f"capacity is {capacity}, it must be at least 0")
    chosen = is_global if valid is None else is_global & valid
    rank = chosen.cumsum(dim=1) - 1  # of each chosen token among those of its row
    _refuse_overflow(chosen.sum(dim=1), capacity)
    # a last column, dropped afterwards, takes the tokens that are not chosen
    column = torch.where(chosen, rank, capacity).clamp(max=capacity)
    positions = torch.arange(is_global.shape[1], device=is_global.device).expand_as(column)
    index = torch.full((is_global.shape[0], capacity + 1), -1, device=is_global.device)
    return index.scatter(1, column, positions)[:, :capacity].contiguous()


def _refuse_overflow(counts, capacity):
    """counts [B]: global tokens a row. Only on the CPU, where reading them waits for nothing, is the row named."""
    if counts.device.type != "cpu" or torch.compiler.is_compiling():
        message = f"a row has more global tokens than the capacity {capacity}: raise max_global_tokens"
        torch.ops.aten._assert_async.msg((counts <= capacity).all(), message)
        return
    for row, count in enumerate(counts.tolist()):
        if count > capacity:
            raise ValueError(
                f"row {row} has {count} global tokens, the capacity is {capacity}: raise max_global_tokens to at least "
                f"{int(counts.max())}"
            )


def at_real_tokens(index: torch.Tensor, num_keys: int, valid: torch.Tensor | None) -> torch.Tensor:
    """[B, G] bool: which positions of an index [B, G] hold a token; valid [B, S] bool or None, S = num_keys > 0."""
    real = (index >= 0) & (index < num_keys)
    return real if valid is None else real & valid.gather(1, index.long().clamp(0, num_keys - 1))


def canonical_index(global_index: torch.Tensor, num_keys: int, valid: torch.Tensor | None) -> torch.Tensor:
    """The global keys that a user's index means, each once: ascending int64 [B, G], -1 in place of the others.

    An entry that is negative, at or past S = num_keys, at a key that is not valid, or a repetition means nothing.
    """
    real = at_real_tokens(global_index, num_keys, valid)
    index = global_index.long().masked_fill(~real, num_keys).sort(dim=1).values
    repeated = F.pad(index[:, 1:] == index[:, :-1], (1, 0))
    return index.masked_fill(repeated | (index == num_keys), -1)


def gather_tokens(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[B, S, H, D] at a canonical index [B, G] -> [B, G, H, D], zeros without gradient where it is -1."""
    taken = torch.take_along_dim(tensor, index.clamp(min=0)[:, :, None, None], dim=1)
    return taken.masked_fill((index < 0)[:, :, None, None], 0.0)
