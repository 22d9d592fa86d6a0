"""The convolution beside Nyström attention: one filter a head over the values of neighbouring tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor


def convolve(value: Tensor, taps: Tensor) -> Tensor:
    """value [B, T, H, D] with taps [H, K], K odd -> [B, T, H, D]: sum over j of taps[h, j] value[t + j - K // 2].

    Tokens before the first and after the last count as zeros. The channels of a head share its filter. Nothing is
    transposed: the tokens are taken as an image of one column whose channels lie together.
    """
    # to a compiler an operator, as inductor compiles a convolution anew for every length
    return _traced(value, taps) if torch.compiler.is_compiling() else _convolve(value, taps)


def _convolve(value, taps):
    image, filters = _image(value), _filters(value, taps)
    return _tokens(F.conv2d(image, filters, padding=(taps.shape[1] // 2, 0), groups=len(filters)), value)


def _image(tensor):
    """[B, T, H, D] -> [B, H * D, T, 1]."""
    return tensor.flatten(2)[:, :, None].permute(0, 3, 1, 2)


def _tokens(image, like):
    """[B, H * D, T, 1] -> [B, T, H, D] of `like`."""
    return image.permute(0, 2, 3, 1).reshape(like.shape)


def _filters(value, taps):
    return taps.to(value.dtype).repeat_interleave(value.shape[3], dim=0)[:, None, :, None]


@torch.library.custom_op("longspan::convolve", mutates_args=())
def _traced(value: Tensor, taps: Tensor) -> Tensor:
    return _convolve(value, taps).contiguous()


@_traced.register_fake
def _(value, taps):
    return value.new_empty(value.shape)


@torch.library.custom_op("longspan::convolve_backward", mutates_args=())
def _backward(grad: Tensor, value: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    filters, padding = _filters(value, taps), (taps.shape[1] // 2, 0)
    sizes = ((1, 1), padding, (1, 1), False, (0, 0), len(filters))  # stride to groups
    value_grad, filters_grad, _ = torch.ops.aten.convolution_backward(
        _image(grad), _image(value), filters, None, *sizes, (True, True, False)
    )
    taps_grad = filters_grad.view(taps.shape[0], -1, taps.shape[1]).sum(1).to(taps.dtype)
    return _tokens(value_grad, value).contiguous(), taps_grad


@_backward.register_fake
def _(grad, value, taps):
    return value.new_empty(value.shape), taps.new_empty(taps.shape)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _grads(ctx, grad):
    return _backward(grad, *ctx.saved_tensors)


_traced.register_autograd(_grads, setup_context=_setup)
