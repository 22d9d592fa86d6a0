"""The blocked path as operators that a compiler takes whole, as how it cuts up a text depends on the length.

Only what is traced, by torch.compile or torch.export, goes through here: a call in eager mode is differentiated by
autograd, which keeps what the backward passes below compute again.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.window_attention import blocked
from kernels.window_attention.pattern import WindowPattern

WINDOW_TENSORS, ROWS_TENSORS = 8, 6  # arguments of the operators up to the seed


def window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pattern: WindowPattern,
    scale: float,
    valid: Tensor | None = None,
    global_index: Tensor | None = None,
    position_query: Tensor | None = None,
    position_key: Tensor | None = None,
    query_start: int = 0,
    dropout: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """As `blocked.window_attention`, contiguous [B, T, H, D]."""
    return _window(
        query, key, value, position_query, position_key, valid, global_index, dropout_seed,
        list(pattern.window), list(pattern.dilation), pattern.causal, scale, query_start, dropout,
    )  # fmt: skip


def global_rows_attention(
    query_global: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    global_index: Tensor,
    scale: float,
    valid: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """As `blocked.global_rows_attention`, contiguous [B, G, H, D]."""
    return _rows(query_global, key, value, global_index, valid, dropout_seed, causal, scale, dropout)


@torch.library.custom_op("longspan::window_blocked", mutates_args=())
def _window(
    query: Tensor, key: Tensor, value: Tensor, position_query: Tensor | None, position_key: Tensor | None,
    valid: Tensor | None, global_index: Tensor | None, seed: Tensor | None,
    window: list[int], dilation: list[int], causal: bool, scale: float, query_start: int, dropout: float,
) -> Tensor:  # fmt: skip
    with torch.autocast(query.device.type, enabled=False):
        return blocked.window_attention(
            query, key, value, position_query=position_query, position_key=position_key, valid=valid,
            global_index=global_index, dropout_seed=seed, scale=scale, query_start=query_start, dropout=dropout,
            pattern=WindowPattern(tuple(window), tuple(dilation), causal),
        ).contiguous()  # fmt: skip


@torch.library.custom_op("longspan::window_blocked_backward", mutates_args=())
def _window_backward(
    out_grad: Tensor,
    query: Tensor, key: Tensor, value: Tensor, position_query: Tensor | None, position_key: Tensor | None,
    valid: Tensor | None, global_index: Tensor | None, seed: Tensor | None,
    window: list[int], dilation: list[int], causal: bool, scale: float, query_start: int, dropout: float,
) -> list[Tensor]:  # fmt: skip
    options = {"valid": valid, "global_index": global_index, "dropout_seed": seed, "dropout": dropout}
    options |= {"pattern": WindowPattern(tuple(window), tuple(dilation), causal)}
    options |= {"scale": scale, "query_start": query_start}
    inputs = {"query": query, "key": key, "value": value}
    if position_query is not None and position_key is not None:
        inputs |= {"position_query": position_query, "position_key": position_key}
    return _grads_again(blocked.window_attention, inputs, options, out_grad)


@torch.library.custom_op("longspan::global_rows_blocked", mutates_args=())
def _rows(
    query: Tensor, key: Tensor, value: Tensor, global_index: Tensor, valid: Tensor | None, seed: Tensor | None,
    causal: bool, scale: float, dropout: float,
) -> Tensor:  # fmt: skip
    with torch.autocast(query.device.type, enabled=False):
        return blocked.global_rows_attention(
            query, key, value, global_index=global_index, valid=valid, causal=causal, scale=scale, dropout=dropout,
            dropout_seed=seed,
        ).contiguous()  # fmt: skip


@torch.library.custom_op("longspan::global_rows_blocked_backward", mutates_args=())
def _rows_backward(
    out_grad: Tensor,
    query: Tensor, key: Tensor, value: Tensor, global_index: Tensor, valid: Tensor | None, seed: Tensor | None,
    causal: bool, scale: float, dropout: float,
) -> list[Tensor]:  # fmt: skip
    options = {"global_index": global_index, "valid": valid, "causal": causal, "scale": scale}
    options |= {"dropout_seed": seed, "dropout": dropout}
    inputs = {"query_global": query, "key": key, "value": value}
    return _grads_again(blocked.global_rows_attention, inputs, options, out_grad)


def _grads_again(function: Callable, inputs: dict[str, Tensor], options: dict, out_grad: Tensor) -> list[Tensor]:
    """Gradients of the inputs, by autograd through a second forward pass."""
    # an operator runs where autograd does not look; to leave inference mode is the public way to have it back
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(out_grad.device.type, enabled=False):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
        grads = torch.autograd.grad(function(**leaves, **options), tuple(leaves.values()), out_grad)
    return [grad.contiguous() for grad in grads]


@_window.register_fake
@_rows.register_fake
def _(query, *rest):
    return query.new_empty(query.shape)


@_window_backward.register_fake
def _(out_grad, query, key, value, position_query, position_key, *rest):
    inputs = (query, key, value, position_query, position_key)
    return [tensor.new_empty(tensor.shape) for tensor in inputs if tensor is not None]


@_rows_backward.register_fake
def _(out_grad, query, key, value, *rest):
    return [tensor.new_empty(tensor.shape) for tensor in (query, key, value)]


def _window_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:WINDOW_TENSORS])
    ctx.options = inputs[WINDOW_TENSORS:]


def _window_grads(ctx, out_grad):
    grads = _window_backward(out_grad, *ctx.saved_tensors, *ctx.options)
    return *grads, *[None] * (WINDOW_TENSORS + len(ctx.options) - len(grads))  # the position terms' too, without any


def _rows_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:ROWS_TENSORS])
    ctx.options = inputs[ROWS_TENSORS:]


def _rows_grads(ctx, out_grad):
    grads = _rows_backward(out_grad, *ctx.saved_tensors, *ctx.options)
    return *grads, *[None] * (ROWS_TENSORS + len(ctx.options) - len(grads))


_window.register_autograd(_window_grads, setup_context=_window_setup)
_rows.register_autograd(_rows_grads, setup_context=_rows_setup)
