"""What the functions of window attention refuse beyond what all attention functions do."""

import torch

from kernels.window_attention.pattern import WindowPattern


def check_global_index(global_index, query, num_rows: int | None = None) -> None:
    """ValueError where global_index is not an int [B, G], G = `num_rows` if given, beside query [B, T, H, D]."""
    if not isinstance(global_index, torch.Tensor):
        raise ValueError(f"global_index must be an int tensor [B, G], got {type(global_index).__name__}")
    fits = global_index.dim() == 2 and global_index.shape[0] == query.shape[0]
    if not fits or (num_rows is not None and global_index.shape[1] != num_rows):
        expected = f"[{query.shape[0]}, {'G' if num_rows is None else num_rows}]"
        raise ValueError(f"global_index must be {expected} (batch, global tokens), got {tuple(global_index.shape)}")
    if global_index.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"global_index must be int64 or int32, got {global_index.dtype}: it holds positions, which "
            "global_positions(is_global, valid, capacity) makes from a mask"
        )
    if global_index.device != query.device:
        raise ValueError(f"global_index is on {global_index.device}, the other tensors are on {query.device}")


def check_positions(position_query, position_key, query, pattern: WindowPattern) -> None:
    """ValueError where the relative term does not fit: [B, T, H, D] and [H, window columns, D]."""
    if (position_query is None) != (position_key is None):
        raise ValueError("position_query and position_key go together")
    if position_query is None:
        return
    if position_query.shape != query.shape:
        raise ValueError(f"position_query {tuple(position_query.shape)} must be shaped as query {tuple(query.shape)}")
    columns = max(pattern.window) * (1 if pattern.causal else 2) + 1
    expected = (pattern.num_heads, columns, query.shape[-1])
    if tuple(position_key.shape) != expected:
        raise ValueError(
            f"position_key must be {expected} (heads, window columns, head dim), {tuple(position_key.shape)}"
        )
