"""The public door of window attention: checks the arguments, picks the path, says once which one ran."""

from collections.abc import Sequence

import torch

from kernels import dispatch
from kernels.checks import (
    check_count,
    check_dropout,
    check_flag,
    check_shapes,
    check_tensors,
    empty_result,
    refuse_unbuilt,
    under_autocast,
)
from kernels.window_attention import blocked, reference, traced
from kernels.window_attention.checks import check_global_index, check_positions
from kernels.window_attention.pattern import WindowPattern

KERNELS = (
    "window_forward",
    "window_query_grad",
    "window_key_grad",
    "global_columns",
    "global_rows_forward",
    "global_rows_key_grad",
    "global_rows_query_grad",
)
LACKING = ("position_query", "position_key", "dropout")  # arguments that the kernels do not have


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
        query: [B, T, H, D]; key, value: [B, S, Hkv, D] with H a multiple of Hkv (query head h reads h // (H / Hkv)),
            in one dtype. Under autocast all are cast to its dtype first, as scaled_dot_product_attention does.
        window: keys on each side of the query, itself excluded, in steps of `dilation`; an int or one a head. More
            than the sequence holds means all of it. With `causal` the keys to the right are dropped.
        dilation: distance in tokens between neighbouring keys of a window; an int or one a head.
        valid: [B, S] bool, True = real. Other keys are never seen; rows standing at them are zeros without gradient.
            What stands there must be finite, as nothing times nan or inf is nan.
        global_index: [B, G] int64 or int32, positions of keys that every row of all heads sees beside its window, in
            the same softmax, each once; with `causal` only rows at or after them. Any order. An entry that is
            negative (-1 pads), at or past S, at a key that is not valid, or a repetition means nothing. The row of a
            global token itself is computed as any other: `global_rows_attention` gives what replaces it.
        scale: factor on the scores, D ** -0.5 if None.
        query_start: query row i stands at key position query_start + i, as the newest rows do behind a cache. A row
            may stand past the last key; one that sees no key is zeros. Only keys that some row can reach cost anything.
        position_query, position_key: [B, T, H, D] and [H, C, D] with C = max window + 1 (causal) or 2 max window + 1:
            adds scale * position_query_i . position_key[h, c] to the score of the key at dilated step c - w_h, where
            w_h is the head's own window (Transformer-XL's relative term, arXiv 1901.02860 section 3.3).
        dropout: probability with which a pair of query and key is dropped; the rest is divided by 1 - dropout.
        dropout_seed: int64 of one element on the tensors' device, needed where dropout > 0: the same seed drops the
            same pairs, by their positions as keys count them, on every path.
        impl: "auto" (the kernels on a GPU that can run them, else "blocked"; logged once), "triton", "blocked" or
            "reference"; a named path never falls back.

    Returns:
        [B, T, H, D] in the dtype of `query`, or of autocast.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a window or query_start below 0, a dilation below 1, an
            unknown `impl`, dropout outside of [0, 1) or without a seed, impl="triton" where the kernels cannot run.
        NotImplementedError: an argument or a pair of them that has no implementation yet, by name.
    """
    refuse_unbuilt(
        "window_attention",
        document_start=document_start,
        document_end=document_end,
        distance_bias=distance_bias,
        return_lse=return_lse or None,
    )
    if global_index is not None and position_query is not None:
        raise NotImplementedError("window_attention: global_index together with position_query is not implemented yet")
    check_tensors(query=query, key=key, value=value)
    check_tensors(optional=True, valid=valid, position_query=position_query, position_key=position_key)
    check_flag("causal", causal)
    query, key, value, position_query, position_key = under_autocast(query, key, value, position_query, position_key)
    num_heads = query.shape[2] if query.dim() == 4 else 0
    check_shapes(query, key, value, valid)
    if not torch.compiler.is_compiling():  # where it may be a symbol
        check_count("query_start", query_start, 0)
    pattern = WindowPattern.of(window, dilation, num_heads=num_heads, causal=causal)
    check_positions(position_query, position_key, query, pattern)
    if global_index is not None:
        check_global_index(global_index, query)
    check_dropout(dropout, dropout_seed, query)
    given = {"position_query": position_query, "position_key": position_key, "dropout": dropout or None}
    lacking = tuple(name for name in LACKING if given[name] is not None)
    impl = dispatch.choose_path("window_attention", impl, query, why_not_triton, lacking)
    if query.numel() == 0 or key.numel() == 0:
        return empty_result(query, key, value)
    options = {
        "pattern": pattern,
        "scale": query.shape[-1] ** -0.5 if scale is None else scale,
        "valid": valid,
        # an empty list costs no more than none
        "global_index": global_index if global_index is not None and global_index.shape[1] else None,
        "query_start": query_start,
    }
    if dropout:
        options |= {"dropout": dropout, "dropout_seed": dropout_seed}
    if impl == "triton":
        from kernels.window_attention import ops

        return ops.window_attention(query, key, value, **options)
    return _plain(impl).window_attention(
        query, key, value, position_query=position_query, position_key=position_key, **options
    )


def global_rows_attention(
    query_global: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    global_index: torch.Tensor,
    valid: torch.Tensor | None = None,
    causal: bool = False,
    document_start: torch.Tensor | None = None,
    document_end: torch.Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Softmax attention of the global tokens' rows over all valid keys (Longformer, section 3.1).

    Args:
        query_global: [B, G, H, D]; key, value: [B, S, Hkv, D] with H a multiple of Hkv, in one dtype. Longformer
            projects all three with weights of their own.
        global_index: [B, G] int64 or int32, the position of each row. Where it is negative (-1 pads), at or past S, or
            at a token that is not valid, the row is zeros without gradient. Repeated positions are computed each.
        valid: [B, S] bool, True = real. Other keys are never seen.
        causal: whether a row sees only the keys at or before its position.
        scale: factor on the scores, D ** -0.5 if None.
        dropout, dropout_seed: as in `window_attention`, by the position of a row.
        impl: as in `window_attention`.

    Returns:
        [B, G, H, D] in the dtype of `query_global`, or of autocast.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, dropout outside of [0, 1) or without a seed, an unknown
            `impl`, impl="triton" where the kernels cannot run.
        NotImplementedError: an argument that has no implementation yet, by name.
    """
    refuse_unbuilt(
        "global_rows_attention",
        document_start=document_start,
        document_end=document_end,
    )
    check_tensors(query_global=query_global, key=key, value=value)
    check_tensors(optional=True, valid=valid)
    check_flag("causal", causal)
    query_global, key, value = under_autocast(query_global, key, value)
    check_shapes(query_global, key, value, valid, name="query_global")
    check_global_index(global_index, query_global, num_rows=query_global.shape[1])
    check_dropout(dropout, dropout_seed, query_global)
    lacking = ("dropout",) if dropout else ()
    impl = dispatch.choose_path("global_rows_attention", impl, query_global, why_not_triton, lacking)
    if query_global.numel() == 0 or key.numel() == 0:
        return empty_result(query_global, key, value)
    options = {
        "global_index": global_index,
        "scale": query_global.shape[-1] ** -0.5 if scale is None else scale,
        "valid": valid,
        "causal": bool(causal),
    }
    if dropout:
        options |= {"dropout": dropout, "dropout_seed": dropout_seed}
    if impl == "triton":
        from kernels.window_attention import ops

        return ops.global_rows_attention(query_global, key, value, **options)
    return _plain(impl).global_rows_attention(query_global, key, value, **options)


def _plain(impl):
    """The module of a path in plain PyTorch: the blocked one is an operator to a compiler."""
    if impl == "reference":
        return reference
    return traced if torch.compiler.is_compiling() else blocked


def why_not_triton(
    device: torch.device, *, head_dim: int, dtype: torch.dtype = torch.float32, needs: Sequence[str] = ()
) -> str | None:
    """Why the Triton kernels cannot run for tensors like these, as a clause; None where they can.

    needs: arguments of the call beyond query, key, value and the pattern. Triton is first imported here.
    """
    lacking = [name for name in needs if name in LACKING]
    if lacking:
        return f"the kernels have no {' and '.join(lacking)}"
    return dispatch.why_not_triton(device, head_dim=head_dim, dtype=dtype, kernels=KERNELS)
