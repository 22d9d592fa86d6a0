"""The core of Nyström attention, all of it of landmarks: what a query gets for its weight on each of them.

Always in the type of its inputs, float32 or float64, also under autocast: six steps in half precision lose two digits.
"""

import torch
from torch import Tensor

from kernels.nystrom_attention.inverse import pseudo_inverse, pseudo_inverse_grad


def landmark_values(
    query: Tensor, key: Tensor, attended: Tensor, real: Tensor | None, *, scale: float, iterations: int, init: str
) -> Tensor:
    """[B, N, H, D]: the pseudo-inverse of softmax(scale * query key^T) times `attended`. Differentiable.

    query, key: [B, N, H, D], the landmarks; attended: [B, N, H, D], what each query landmark gets from all keys;
    real: [B, N] bool or None, landmarks that are there. The backward pass computes the inverse again.
    """
    return _landmark_values(query, key, attended, real, scale, iterations, init)


# operators, so that a compiler sees one node of each and not every product of every step
@torch.library.custom_op("longspan::landmark_values", mutates_args=())
def _landmark_values(
    query: Tensor, key: Tensor, attended: Tensor, real: Tensor | None, scale: float, iterations: int, init: str
) -> Tensor:
    return core(query, key, attended, real, scale=scale, iterations=iterations, init=init)


@_landmark_values.register_fake
def _(query, key, attended, real, scale, iterations, init):
    return query.new_empty(query.shape)


@torch.library.custom_op("longspan::landmark_values_backward", mutates_args=())
def _landmark_values_backward(
    grad: Tensor, query: Tensor, key: Tensor, attended: Tensor, real: Tensor | None,
    scale: float, iterations: int, init: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return core_grad(query, key, attended, real, grad, scale=scale, iterations=iterations, init=init)


@_landmark_values_backward.register_fake
def _(grad, query, key, attended, real, scale, iterations, init):
    return tuple(query.new_empty(query.shape) for _ in range(3))


def _setup(ctx, inputs, output):
    *tensors, scale, iterations, init = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (scale, iterations, init)


def _grads(ctx, grad):
    return *_landmark_values_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


_landmark_values.register_autograd(_grads, setup_context=_setup)


def core(
    query: Tensor, key: Tensor, attended: Tensor, real: Tensor | None, *, scale: float, iterations: int, init: str
) -> Tensor:
    """`landmark_values` without a gradient, contiguous."""
    with torch.autocast(query.device.type, enabled=False):
        weights = _weights(query, key, real, scale)
        inverse = pseudo_inverse(weights, iterations=iterations, init=init)
        return _from_heads(inverse @ _to_heads(attended), attended)


def core_grad(
    query: Tensor,
    key: Tensor,
    attended: Tensor,
    real: Tensor | None,
    grad: Tensor,
    *,
    scale: float,
    iterations: int,
    init: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and attended [B, N, H, D], contiguous, given that of `landmark_values`."""
    with torch.autocast(query.device.type, enabled=False):
        weights = _weights(query, key, real, scale)
        inverse = pseudo_inverse(weights, iterations=iterations, init=init)
        grad = _to_heads(grad)
        attended_grad = inverse.mT @ grad
        inverse_grad = grad @ _to_heads(attended).mT
        weights_grad = pseudo_inverse_grad(weights, inverse_grad, iterations=iterations, init=init)
        scores_grad = weights * (weights_grad - (weights * weights_grad).sum(dim=-1, keepdim=True)) * scale
        query_grad, key_grad = scores_grad @ _to_heads(key), scores_grad.mT @ _to_heads(query)
        return _from_heads(query_grad, query), _from_heads(key_grad, query), _from_heads(attended_grad, query)


def _weights(query, key, real, scale):
    """[B * H, N, N] softmax of the landmarks' scores; rows and columns of those that are not there are zero."""
    scores = _to_heads(query) @ _to_heads(key).mT * scale
    if real is None:
        return torch.softmax(scores, dim=-1)
    real = real[:, None].expand(-1, query.shape[2], -1).flatten(0, 1)  # [B * H, N]
    scores = scores.masked_fill(~real[:, None, :], torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1) * (real[:, :, None] & real[:, None, :])


def _to_heads(tensor):
    """[B, N, H, D] -> [B * H, N, D]."""
    return tensor.transpose(1, 2).flatten(0, 1)


def _from_heads(tensor, like):
    """[B * H, N, D] -> [B, N, H, D] of `like`."""
    return tensor.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2).contiguous()
