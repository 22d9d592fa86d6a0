"""The Triton kernels as operators that PyTorch knows: shapes for the compiler, gradients, no synchronisation.

Only this module and what it imports need Triton; `api` imports it where a call asks for the kernels.
"""

import torch
from torch import Tensor

from kernels.launch import interpreted_inputs
from kernels.window_attention import global_columns, global_rows, global_rows_grad
from kernels.window_attention.forward import window_attention_fwd
from kernels.window_attention.key_grad import window_attention_key_grad
from kernels.window_attention.launch import GlobalKeys, prepare_tables
from kernels.window_attention.pattern import WindowPattern
from kernels.window_attention.query_grad import window_attention_query_grad


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pattern: WindowPattern,
    scale: float,
    valid: Tensor | None = None,
    global_index: Tensor | None = None,
    query_start: int = 0,
) -> Tensor:
    """As `reference.window_attention`, by the Triton kernels: [B, T, H, D]."""
    query, scale = _positive_scale(query, scale)
    dtype = query.dtype
    query, key, value = interpreted_inputs(query, key, value)
    prepare_tables(pattern.window, pattern.dilation, query.device)
    table = None
    if global_index is not None and global_index.shape[1]:
        table = _global_table(global_index, valid, key.shape[1])
    positions, counts = (None, None) if table is None else table
    out, _ = _window_forward(
        query, key, value, valid, positions, counts,
        list(pattern.window), list(pattern.dilation), pattern.causal, scale, query_start,
    )  # fmt: skip
    return out.to(dtype)


def global_rows_attention(
    query_global: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    global_index: Tensor,
    scale: float,
    valid: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """As `reference.global_rows_attention`, by the Triton kernels: [B, G, H, D]."""
    query, scale = _positive_scale(query_global, scale)
    dtype = query.dtype
    query, key, value = interpreted_inputs(query, key, value)
    out, _ = _global_rows_forward(query, key, value, global_index.long().contiguous(), valid, scale, causal)
    return out.to(dtype)


def _positive_scale(query, scale):
    """The kernels take the largest score first, which a factor that is not positive would turn round."""
    return (query, scale) if scale > 0 else (query * scale, 1.0)


def _pattern(window, dilation, causal):
    return WindowPattern(tuple(window), tuple(dilation), causal)


@torch.library.custom_op("longspan::global_table", mutates_args=())
def _global_table(global_index: Tensor, valid: Tensor | None, num_keys: int) -> tuple[Tensor, Tensor]:
    return tuple(global_columns.global_table(global_index, valid, num_keys))  # type: ignore[return-value]


@_global_table.register_fake
def _(global_index, valid, num_keys):
    return global_index.new_empty(global_index.shape, dtype=torch.int64), global_index.new_empty(
        global_index.shape[0], dtype=torch.int32
    )


@torch.library.custom_op("longspan::window_attention", mutates_args=())
def _window_forward(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, positions: Tensor | None, counts: Tensor | None,
    window: list[int], dilation: list[int], causal: bool, scale: float, query_start: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    keys = None if positions is None or counts is None else GlobalKeys(positions, counts)
    pattern = _pattern(window, dilation, causal)
    return window_attention_fwd(query, key, value, valid, keys, pattern, scale, query_start)


@_window_forward.register_fake
def _(query, key, value, valid, positions, counts, window, dilation, causal, scale, query_start):
    return _like(query), _statistics(query, query.shape[1])


@torch.library.custom_op("longspan::window_attention_backward", mutates_args=())
def _window_backward(
    out_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse2: Tensor,
    valid: Tensor | None, positions: Tensor | None, counts: Tensor | None,
    window: list[int], dilation: list[int], causal: bool, scale: float, query_start: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    keys = None if positions is None or counts is None else GlobalKeys(positions, counts)
    pattern = _pattern(window, dilation, causal)
    query_grad, delta = window_attention_query_grad(
        out_grad, query, key, value, out, lse2, valid, keys, pattern, scale, query_start
    )
    rest = (out_grad, query, key, value, lse2, delta)
    key_grad, value_grad = window_attention_key_grad(*rest, valid, pattern, scale, query_start)
    if keys is not None:
        global_columns.global_columns_grad(key_grad, value_grad, *rest, keys, pattern, scale, query_start)
    return query_grad, key_grad, value_grad


@_window_backward.register_fake
def _(out_grad, query, key, value, out, lse2, valid, positions, counts, window, dilation, causal, scale, query_start):
    return _like(query), _like(key), _like(key)


def _window_setup(ctx, inputs, output):
    query, key, value, valid, positions, counts, *options = inputs
    out, lse2 = output
    ctx.save_for_backward(query, key, value, out, lse2, valid, positions, counts)
    ctx.options = options
    ctx.mark_non_differentiable(lse2)
    ctx.set_materialize_grads(False)


def _window_grads(ctx, out_grad, lse2_grad):
    none = [None] * (3 + len(ctx.options))
    if out_grad is None:
        return None, None, None, *none
    return *_window_backward(out_grad, *ctx.saved_tensors, *ctx.options), *none


_window_forward.register_autograd(_window_grads, setup_context=_window_setup)


@torch.library.custom_op("longspan::global_rows_attention", mutates_args=())
def _global_rows_forward(
    query: Tensor, key: Tensor, value: Tensor, global_index: Tensor, valid: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    return global_rows.global_rows_fwd(query, key, value, global_index, valid, scale, causal)


@_global_rows_forward.register_fake
def _(query, key, value, global_index, valid, scale, causal):
    return _like(query), _statistics(query, query.shape[1])


@torch.library.custom_op("longspan::global_rows_attention_backward", mutates_args=())
def _global_rows_backward(
    out_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse2: Tensor,
    global_index: Tensor, valid: Tensor | None, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return global_rows_grad.global_rows_grad(out_grad, query, key, value, out, lse2, global_index, valid, scale, causal)


@_global_rows_backward.register_fake
def _(out_grad, query, key, value, out, lse2, global_index, valid, scale, causal):
    return _like(query), _like(key), _like(key)


def _global_rows_setup(ctx, inputs, output):
    query, key, value, global_index, valid, ctx.scale, ctx.causal = inputs
    out, lse2 = output
    ctx.save_for_backward(query, key, value, out, lse2, global_index, valid)
    ctx.mark_non_differentiable(lse2)
    ctx.set_materialize_grads(False)


def _global_rows_grads(ctx, out_grad, lse2_grad):
    if out_grad is None:
        return (None,) * 7
    grads = _global_rows_backward(out_grad, *ctx.saved_tensors, ctx.scale, ctx.causal)
    return *grads, None, None, None, None


_global_rows_forward.register_autograd(_global_rows_grads, setup_context=_global_rows_setup)


def _like(tensor):
    return tensor.new_empty(tensor.shape)


def _statistics(query, num_rows):
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((query.shape[0], query.shape[2], num_rows), dtype=dtype)
