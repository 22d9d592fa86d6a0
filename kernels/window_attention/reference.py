"""Dense oracle of window attention: every score, one mask, one softmax. Any device, any dtype, differentiable."""

import torch

from kernels.window_attention.pattern import WindowPattern, valid_rows


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
    query_start: int = 0,
) -> torch.Tensor:
    """Softmax over the keys `pattern` shows each query; arguments as in `api.window_attention`. Time and memory T * S.

    query, position_query [B, T, H, D], key, value [B, S, Hkv, D], valid [B, S] bool, position_key
    [H, window + 1 or 2 window + 1, D]; result [B, T, H, D]. A row that is not valid or sees no key is zero.
    """
    seq_len, num_heads = query.shape[1:3]
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))  # [B, H, T or S, D]
    repeats = num_heads // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    num_keys = key.shape[2]
    scores = query @ key.transpose(-1, -2)  # [B, H, T, S]
    if position_query is not None and position_key is not None:
        by_column = position_query.transpose(1, 2) @ position_key.transpose(-1, -2)  # [B, H, T, columns]
        columns = _columns(pattern, seq_len, num_keys, query_start, by_column)
        scores = scores + by_column.gather(-1, columns.expand(len(by_column), -1, -1, -1))
    seen = pattern.mask(seq_len, key_len=num_keys, query_start=query_start, device=query.device)  # [H, T, S]
    rows = valid_rows(valid, query_start, seq_len)
    if valid is not None and rows is not None:
        seen = seen & valid[:, None, None, :] & rows[:, None, :, None]  # [B, H, T, S]
    lowest = torch.finfo(scores.dtype).min
    weights = torch.softmax((scores * scale).masked_fill(~seen, lowest), dim=-1)
    # a row that sees no key spreads its weight evenly under the lowest finite score: it must give zero
    weights = weights.masked_fill(~seen, 0.0)
    return (weights @ value).transpose(1, 2)


def _columns(pattern, seq_len, num_keys, query_start, by_column):
    """[H, T, S]: column (j - query_start - i) / dilation + window of row i and key j; any where it is not seen."""
    rows = torch.arange(query_start, query_start + seq_len, device=by_column.device)[:, None]
    distance = torch.arange(num_keys, device=by_column.device) - rows  # [T, S]
    columns = []
    for window, dilation in zip(pattern.window, pattern.dilation, strict=True):
        column = torch.div(distance, dilation, rounding_mode="floor") + window
        columns.append(column.clamp(0, by_column.shape[-1] - 1))
    return torch.stack(columns)
