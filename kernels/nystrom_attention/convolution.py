"""The convolution beside Nyström attention: one filter a head over the values of neighbouring tokens."""

import torch
import torch.nn.functional as F


def convolve(value: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """value [B, T, H, D] with taps [H, K], K odd -> [B, T, H, D]: sum over j of taps[h, j] value[t + j - K // 2].

    Tokens before the first and after the last count as zeros. The channels of a head share its filter. Nothing is
    transposed: the tokens are taken as an image of one column whose channels lie together.
    """
    head_dim, num_taps = value.shape[3], taps.shape[1]
    image = value.flatten(2)[:, :, None].permute(0, 3, 1, 2)  # [B, H * D, T, 1]
    filters = taps.to(value.dtype).repeat_interleave(head_dim, dim=0)[:, None, :, None]
    out = F.conv2d(image, filters, padding=(num_taps // 2, 0), groups=len(filters))
    return out.permute(0, 2, 3, 1).reshape(value.shape)
