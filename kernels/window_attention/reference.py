"""Dense oracle of window attention: every score, one mask, one softmax. Any device, any dtype, differentiable."""

import torch

from kernels.dropout import keep_mask
from kernels.window_attention.global_tokens import at_real_tokens, canonical_index
from kernels.window_attention.pattern import WindowPattern, valid_rows


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    pattern: WindowPattern,
    scale: float,
    valid: torch.Tensor | None = None,
    global_index: torch.Tensor | None = None,
    position_query: torch.Tensor | None = None,
    position_key: torch.Tensor | None = None,
    query_start: int = 0,
    dropout: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax over the keys `pattern` shows each query and the global ones; arguments as in `api.window_attention`.

    query, position_query [B, T, H, D], key, value [B, S, Hkv, D], valid [B, S] bool, global_index [B, G] int,
    position_key [H, window + 1 or 2 window + 1, D]; result [B, T, H, D]. A row that is not valid or sees no key is
    zero. Time and memory T * S.
    """
    seq_len, num_keys = query.shape[1], key.shape[1]
    scores = _scores(query, key)  # [B, H, T, S]
    if position_query is not None and position_key is not None:
        by_column = position_query.transpose(1, 2) @ position_key.transpose(-1, -2)  # [B, H, T, columns]
        columns = _columns(pattern, seq_len, num_keys, query_start, by_column)
        scores = scores + by_column.gather(-1, columns.expand(len(by_column), -1, -1, -1))
    seen = pattern.mask(seq_len, key_len=num_keys, query_start=query_start, device=query.device)  # [H, T, S]
    if global_index is not None:
        keys = torch.arange(num_keys, device=query.device)
        index = canonical_index(global_index, num_keys, valid)
        seen_global = (index[:, :, None] == keys).any(dim=1)[:, None, None, :]  # [B, 1, 1, S]
        if pattern.causal:
            rows = torch.arange(query_start, query_start + seq_len, device=query.device)
            seen_global = seen_global & (keys <= rows[:, None])
        seen = seen | seen_global  # [B, H, T, S]
    rows_valid = valid_rows(valid, query_start, seq_len)
    if valid is not None and rows_valid is not None:
        seen = seen & valid[:, None, None, :] & rows_valid[:, None, :, None]  # [B, H, T, S]
    rows = torch.arange(query_start, query_start + seq_len, device=query.device)
    return _average(value, scores * scale, seen, _kept(scores, rows, dropout, dropout_seed), dropout)


def global_rows_attention(
    query_global: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    global_index: torch.Tensor,
    scale: float,
    valid: torch.Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax of each global row over all valid keys; arguments as in `api.global_rows_attention`. Memory G * S.

    query_global [B, G, H, D], key, value [B, S, Hkv, D], global_index [B, G]; result [B, G, H, D], zero where a row
    stands at no valid token.
    """
    num_keys = key.shape[1]
    seen = at_real_tokens(global_index, num_keys, valid)[:, None, :, None]  # [B, 1, G, 1]
    if valid is not None:
        seen = seen & valid[:, None, None, :]
    if causal:
        seen = seen & (torch.arange(num_keys, device=key.device) <= global_index[:, None, :, None])
    scores = _scores(query_global, key)
    kept = _kept(scores, global_index.long()[:, None], dropout, dropout_seed)
    return _average(value, scores * scale, seen.expand_as(scores), kept, dropout)


def _scores(query, key):
    """query [B, T, H, D], key [B, S, Hkv, D] -> [B, H, T, S]."""
    key = key.transpose(1, 2).repeat_interleave(query.shape[2] // key.shape[2], dim=1)
    return query.transpose(1, 2) @ key.transpose(-1, -2)


def _kept(scores, rows, dropout, seed):
    """Which probabilities [B, H, T, S] dropout leaves, of rows that stand at positions [..., T]; None for all."""
    if seed is None:
        return None
    batch, num_heads, _, num_keys = scores.shape
    batch_head = torch.arange(batch * num_heads, device=scores.device).view(batch, num_heads, 1, 1)
    return keep_mask(seed, batch_head, rows[..., None], torch.arange(num_keys, device=scores.device), dropout)


def _average(value, scores, seen, kept, dropout):
    """value [B, S, Hkv, D] weighted by the softmax of the scores [B, H, T, S] that are seen -> [B, T, H, D].

    kept: which of the weights stay, to be divided by 1 - dropout.
    """
    weights = torch.softmax(scores.masked_fill(~seen, torch.finfo(scores.dtype).min), dim=-1)
    # a row that sees no key spreads its weight evenly under the lowest finite score: it must give zero
    weights = weights.masked_fill(~seen, 0.0)
    if kept is not None:
        weights = weights * kept / (1 - dropout)
    value = value.transpose(1, 2).repeat_interleave(scores.shape[1] // value.shape[2], dim=1)
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
