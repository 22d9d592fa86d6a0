"""The public door of window attention: checks the arguments, picks the path, says once which one ran."""

import logging
from collections.abc import Sequence
from functools import cache

import torch

from kernels.window_attention import blocked, reference
from kernels.window_attention.pattern import WindowPattern

log = logging.getLogger(__name__)
IMPLEMENTATIONS = ("auto", "triton", "blocked", "reference")


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    window: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    causal: bool = False,
    valid: torch.Tensor | None = None,
    global_index: torch.Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    query_start: int = 0,
    document_start: torch.Tensor | None = None,
    document_end: torch.Tensor | None = None,
    distance_bias: torch.Tensor | None = None,
    position_query: torch.Tensor | None = None,
    position_key: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """Softmax attention of each query over the keys within `window` dilated steps of it (Longformer, section 3.1).

    Args:
        query: [B, T, H, D]; key, value: [B, S, Hkv, D] with H a multiple of Hkv (query head h reads h // (H / Hkv)).
        window: keys on each side of the query, itself excluded, in steps of `dilation`; an int or one a head. More
            than the sequence holds means all of it. With `causal` the keys to the right are dropped.
        dilation: distance in tokens between neighbouring keys of a window; an int or one a head.
        valid: [B, S] bool, True = real. Other keys are never seen; rows standing at them are zeros without gradient.
        scale: factor on the scores, D ** -0.5 if None.
        query_start: query row i stands at key position query_start + i, as the newest rows do behind a cache. A row
            may stand past the last key; one that sees no key is zeros. Only keys that some row can reach cost anything.
        position_query, position_key: [B, T, H, D] and [H, C, D] with C = max window + 1 (causal) or 2 max window + 1:
            adds scale * position_query_i . position_key[h, c] to the score of the key at dilated step c - w_h, where
            w_h is the head's own window (Transformer-XL's relative term, arXiv 1901.02860 section 3.3).
        impl: "auto", "blocked" or "reference"; a named path never falls back.

    Returns:
        [B, T, H, D] in the dtype of `query`.

    Raises:
        ValueError: shapes that do not fit, a window or query_start below 0, a dilation below 1, an unknown `impl`.
        NotImplementedError: an argument that has no implementation yet, by name.
    """
    _refuse_unbuilt(
        global_index=global_index,
        dropout_seed=dropout_seed,
        document_start=document_start,
        document_end=document_end,
        distance_bias=distance_bias,
    )
    _refuse_unbuilt(dropout=dropout or None, return_lse=return_lse or None)
    num_heads = query.shape[2] if query.dim() == 4 else 0
    _check_shapes(query, key, value, valid)
    if query_start < 0:
        raise ValueError(f"query_start is {query_start}, it must be at least 0")
    pattern = WindowPattern.of(window, dilation, num_heads=num_heads, causal=causal)
    _check_positions(position_query, position_key, query, pattern)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}, it must be one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "triton":
        raise NotImplementedError("impl='triton': the window kernels are not built yet, use 'auto' or 'blocked'")
    if impl == "auto":
        impl = "blocked"
        if not torch.compiler.is_compiling():
            _say_once(impl, "the fastest path on this device that has every feature asked for")
    if query.numel() == 0 or key.numel() == 0:
        return torch.zeros_like(query)
    compute = reference.window_attention if impl == "reference" else blocked.window_attention
    return compute(
        query,
        key,
        value,
        pattern=pattern,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        valid=valid,
        position_query=position_query,
        position_key=position_key,
        query_start=query_start,
    )


@cache
def _say_once(impl, reason):
    log.info("window_attention runs on the %s path: %s", impl, reason)


def _refuse_unbuilt(**arguments):
    for name, argument in arguments.items():
        if argument is not None:
            raise NotImplementedError(f"window_attention: the argument {name} is not implemented yet")


def _check_shapes(query, key, value, valid):
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(f"query and key must be [B, T, H, D], got {tuple(query.shape)} and {tuple(key.shape)}")
    if key.shape != value.shape:
        raise ValueError(f"key and value must share one shape: {tuple(key.shape)}, {tuple(value.shape)}")
    batch, _, num_heads, head_dim = query.shape
    if key.shape[0] != batch or key.shape[3] != head_dim:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} differ in batch or head dim")
    if num_heads % key.shape[2]:
        raise ValueError(f"{num_heads} query heads are no multiple of {key.shape[2]} key heads")
    if valid is not None and (valid.shape != key.shape[:2] or valid.dtype != torch.bool):
        raise ValueError(f"valid must be bool [{batch}, {key.shape[1]}], got {valid.dtype} {tuple(valid.shape)}")


def _check_positions(position_query, position_key, query, pattern):
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
