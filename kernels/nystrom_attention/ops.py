"""The Triton kernels as operators that PyTorch knows: shapes for the compiler, gradients, no synchronisation.

Only this module and what it imports need Triton; `api` imports it where a call asks for the kernels.
"""

import torch
from torch import Tensor

from kernels.launch import interpreted_inputs
from kernels.nystrom_attention import band, passes
from kernels.nystrom_attention.key_grad import softmax_key_grad
from kernels.nystrom_attention.launch import Pass
from kernels.nystrom_attention.query_grad import softmax_query_grad
from kernels.nystrom_attention.softmax_forward import softmax_fwd


def nystrom_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_landmarks: int,
    scale: float,
    valid: Tensor | None = None,
    pinv_iterations: int = 6,
    pinv_init: str = "exact",
    conv_weight: Tensor | None = None,
    published: bool = False,
) -> Tensor:
    """As `reference.nystrom_attention`, by the Triton kernels: [B, T, H, D]."""
    # the kernels take the largest score first, which a factor that is not positive would turn round
    query, scale = (query, scale) if scale > 0 else (query * scale, 1.0)
    dtype = query.dtype
    query, key, value = interpreted_inputs(query, key, value)
    counted = None if published else valid
    if query.shape[1] <= num_landmarks:
        out, _ = _softmax_forward(query, key, value, valid, counted, scale)
    else:
        out, *_ = _nystrom_forward(query, key, value, valid, counted, num_landmarks, scale, pinv_iterations, pinv_init)
    if conv_weight is not None:
        taps = conv_weight.to(_sums_type(query)).contiguous()
        out = _convolve_forward(out, value, taps, counted)
    return out.to(dtype)


@torch.library.custom_op("longspan::nystrom_attention", mutates_args=())
def _nystrom_forward(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, counted: Tensor | None,
    num_landmarks: int, scale: float, iterations: int, init: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    options = {"iterations": iterations, "init": init}
    out, saved = passes.nystrom_fwd(query, key, value, valid, counted, num_landmarks, scale, options)
    return out, *saved  # type: ignore[return-value]


@_nystrom_forward.register_fake
def _(query, key, value, valid, counted, num_landmarks, scale, iterations, init):
    batch, seq_len, num_heads, head_dim = query.shape
    landmarks = (batch, num_landmarks, num_heads, head_dim)
    shapes = (
        landmarks,
        landmarks,
        landmarks,
        (batch, num_heads, num_landmarks),
        landmarks,
        (batch, num_heads, seq_len),
    )
    return _like(query), *(query.new_empty(shape, dtype=_sums_type(query)) for shape in shapes)


@torch.library.custom_op("longspan::nystrom_attention_backward", mutates_args=())
def _nystrom_backward(
    out_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, counted: Tensor | None,
    out: Tensor, saved: list[Tensor], scale: float, iterations: int, init: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    options = {"iterations": iterations, "init": init}
    inputs = (query, key, value, valid, counted)
    return passes.nystrom_grad(out_grad, *inputs, out, passes.Saved(*saved), scale, options)


@_nystrom_backward.register_fake
def _(out_grad, query, key, value, valid, counted, out, saved, scale, iterations, init):
    return _like(query), _like(key), _like(value)


def _nystrom_setup(ctx, inputs, output):
    query, key, value, valid, counted, _, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, valid, counted, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _nystrom_grads(ctx, out_grad, *others):
    none = [None] * 6
    if out_grad is None:
        return None, None, None, *none
    saved = ctx.saved_tensors
    return *_nystrom_backward(out_grad, *saved[:6], list(saved[6:]), *ctx.options), *none


_nystrom_forward.register_autograd(_nystrom_grads, setup_context=_nystrom_setup)


@torch.library.custom_op("longspan::softmax_attention", mutates_args=())
def _softmax_forward(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, counted: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return softmax_fwd(Pass("queries", query, key, value, valid, counted, scale), query.dtype)


@_softmax_forward.register_fake
def _(query, key, value, valid, counted, scale):
    batch, seq_len, num_heads, _ = query.shape
    return _like(query), query.new_empty((batch, num_heads, seq_len), dtype=_sums_type(query))


@torch.library.custom_op("longspan::softmax_attention_backward", mutates_args=())
def _softmax_backward(
    out_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, counted: Tensor | None,
    out: Tensor, lse2: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = Pass("queries", query, key, value, valid, counted, scale)
    key_grad, value_grad, delta = softmax_key_grad(inputs, out_grad, lse2, out=out)
    return softmax_query_grad(inputs, out_grad, lse2, delta), key_grad, value_grad


@_softmax_backward.register_fake
def _(out_grad, query, key, value, valid, counted, out, lse2, scale):
    return _like(query), _like(key), _like(value)


def _softmax_setup(ctx, inputs, output):
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _softmax_grads(ctx, out_grad, lse2_grad):
    if out_grad is None:
        return (None,) * 6
    return *_softmax_backward(out_grad, *ctx.saved_tensors, ctx.scale), None, None, None


_softmax_forward.register_autograd(_softmax_grads, setup_context=_softmax_setup)


@torch.library.custom_op("longspan::convolve_heads", mutates_args=())
def _convolve_forward(base: Tensor, value: Tensor, taps: Tensor, valid: Tensor | None) -> Tensor:
    return band.convolve(value, taps, valid, base)


@_convolve_forward.register_fake
def _(base, value, taps, valid):
    return _like(value)


@torch.library.custom_op("longspan::convolve_heads_backward", mutates_args=())
def _convolve_backward(out_grad: Tensor, value: Tensor, taps: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    value_grad = band.convolve(out_grad, taps.flip(1), valid)
    return value_grad, band.convolve_taps_grad(out_grad, value, taps.shape[1], valid)


@_convolve_backward.register_fake
def _(out_grad, value, taps, valid):
    return _like(value), taps.new_empty(taps.shape)


def _convolve_setup(ctx, inputs, output):
    _, value, taps, valid = inputs
    ctx.save_for_backward(value, taps, valid)
    ctx.set_materialize_grads(False)


def _convolve_grads(ctx, out_grad):
    if out_grad is None:
        return (None,) * 4
    # the base is zero where a token is not valid, and whoever made it passes no gradient on there
    return out_grad, *_convolve_backward(out_grad, *ctx.saved_tensors), None


_convolve_forward.register_autograd(_convolve_grads, setup_context=_convolve_setup)


def _like(tensor):
    return tensor.new_empty(tensor.shape)


def _sums_type(tensor):
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
