"""Dense oracle of window attention: every score, one mask, one softmax. Any device, any dtype, differentiable."""

import torch

from kernels.window_attention.pattern import WindowPattern


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    pattern: WindowPattern,
    scale: float,
    valid: torch.Tensor | None = None,
    position_query: torch.Tensor | None = None,
    position_key: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax over the keys `pattern` shows each query; arguments as in `api.window_attention`. Time and memory T * T.

    query, position_query [B, T, H, D], key, value [B, T, Hkv, D], valid [B, T] bool, position_key
    [H, window + 1 or 2 window + 1, D]; result [B, T, H, D]. A row that is not valid is zero.
    """
    seq_len, num_heads = query.shape[1:3]
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))  # [B, H, T, D]
    repeats = num_heads // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2)  # [B, H, T, T]
    if position_query is not None:
        scores = scores + _position_scores(position_query.transpose(1, 2), position_key, pattern)
    seen = pattern.mask(seq_len, device=query.device)  # [H, T, T]
    if valid is not None:
        seen = seen & valid[:, None, None, :] & valid[:, None, :, None]  # [B, H, T, T]
    lowest = torch.finfo(scores.dtype).min
    weights = torch.softmax((scores * scale).masked_fill(~seen, lowest), dim=-1)
    # a row that sees no key spreads its weight evenly under the lowest finite score: it must give zero
    weights = weights.masked_fill(~seen, 0.0)
    return (weights @ value).transpose(1, 2)


def _position_scores(position_query, position_key, pattern):
    """[B, H, T, T] with entry (i, j) = position_query_i . position_key of the column (j - i) / dilation + window."""
    seq_len = position_query.shape[2]
    position = torch.arange(seq_len, device=position_query.device)
    distance = position[None, :] - position[:, None]  # [T, T], key minus query
    columns = []
    for window, dilation in zip(pattern.window, pattern.dilation, strict=True):
        column = torch.div(distance, dilation, rounding_mode="floor") + window
        columns.append(column.clamp(0, position_key.shape[1] - 1))
    columns = torch.stack(columns)  # [H, T, T]
    by_column = position_query @ position_key.transpose(-1, -2)  # [B, H, T, columns]
    return by_column.gather(-1, columns.expand(by_column.shape[0], -1, -1, -1))
