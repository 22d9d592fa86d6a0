"""The core of Nyström attention, all of it of landmarks: what a query gets for its weight on each of them.

Always in the type of its inputs, float32 or float64, also under autocast: six steps in half precision lose two digits.
"""

import torch

from kernels.nystrom_attention.inverse import pseudo_inverse, pseudo_inverse_grad


def landmark_values(
    query: torch.Tensor,
    key: torch.Tensor,
    attended: torch.Tensor,
    real: torch.Tensor | None,
    *,
    scale: float,
    iterations: int,
    init: str,
) -> torch.Tensor:
    """[B, N, H, D]: the pseudo-inverse of softmax(scale * query key^T) times `attended`. Differentiable.

    query, key: [B, N, H, D], the landmarks; attended: [B, N, H, D], what each query landmark gets from all keys;
    real: [B, N] bool or None, landmarks that are there. The backward pass computes the inverse again.
    """
    return _Core.apply(query, key, attended, real, scale, iterations, init)  # type: ignore[no-any-return]


class _Core(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, attended, real, scale, iterations, init):
        ctx.save_for_backward(query, key, attended)
        ctx.real = real
        ctx.options = {"scale": scale, "iterations": iterations, "init": init}
        return core(query, key, attended, real, **ctx.options)

    @staticmethod
    def backward(ctx, grad):
        return *core_grad(*ctx.saved_tensors, ctx.real, grad, **ctx.options), None, None, None, None


def core(query, key, attended, real, *, scale, iterations, init):
    """`landmark_values` without a gradient."""
    with torch.autocast(query.device.type, enabled=False):
        weights = _weights(query, key, real, scale)
        inverse = pseudo_inverse(weights, iterations=iterations, init=init)
        return _from_heads(inverse @ _to_heads(attended), attended)


def core_grad(query, key, attended, real, grad, *, scale, iterations, init):
    """Gradients of query, key and attended [B, N, H, D], given that of `landmark_values`."""
    with torch.autocast(query.device.type, enabled=False):
        weights = _weights(query, key, real, scale)
        inverse = pseudo_inverse(weights, iterations=iterations, init=init)
        grad = _to_heads(grad)
        attended_grad = inverse.mT @ grad
        inverse_grad = grad @ _to_heads(attended).mT
        weights_grad = pseudo_inverse_grad(weights, inverse_grad, iterations=iterations, init=init)
        scores_grad = weights * (weights_grad - (weights * weights_grad).sum(dim=-1, keepdim=True)) * scale
        grads = scores_grad @ _to_heads(key), scores_grad.mT @ _to_heads(query), attended_grad
        return tuple(_from_heads(each, query) for each in grads)


def _weights(query, key, real, scale):
    """[B * H, N, N] softmax of the landmarks' scores; rows and columns of those that are not there are zero."""
    scores = _to_heads(query) @ _to_heads(key).mT * scale
    if real is None:
        return torch.softmax(scores, dim=-1)
    real = real.repeat_interleave(query.shape[2], dim=0)
    scores = scores.masked_fill(~real[:, None, :], torch.finfo(scores.dtype).min)
    return torch.softmax(scores, dim=-1) * (real[:, :, None] & real[:, None, :])


def _to_heads(tensor):
    """[B, N, H, D] -> [B * H, N, D]."""
    return tensor.transpose(1, 2).flatten(0, 1)


def _from_heads(tensor, like):
    """[B * H, N, D] -> [B, N, H, D] of `like`."""
    return tensor.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)
