"""Nyström attention in plain PyTorch with linear memory: two calls of scaled_dot_product_attention around the core."""

import torch
import torch.nn.functional as F

from kernels.nystrom_attention.convolution import convolve
from kernels.nystrom_attention.core import landmark_values
from kernels.nystrom_attention.landmarks import cut, means


def nystrom_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    num_landmarks: int,
    scale: float,
    valid: torch.Tensor | None = None,
    pinv_iterations: int = 6,
    pinv_init: str = "exact",
    conv_weight: torch.Tensor | None = None,
    published: bool = False,
) -> torch.Tensor:
    """As `reference.nystrom_attention`; nothing of size T x N is stored."""
    dtype = query.dtype
    query, key, value = (tensor if dtype == torch.float64 else tensor.float() for tensor in (query, key, value))
    counted = None if published else valid
    with torch.autocast(query.device.type, enabled=False):
        if query.shape[1] <= num_landmarks:
            out = attend(query, key, value, valid, scale)
        else:
            segments = cut(query.shape[1], num_landmarks, counted, dtype=query.dtype, device=query.device)
            query_landmarks, key_landmarks = means(query, segments), means(key, segments)
            landmark_value = landmark_values(
                query_landmarks,
                key_landmarks,
                attend(query_landmarks, key, value, valid, scale),
                segments.real,
                scale=scale,
                iterations=pinv_iterations,
                init=pinv_init,
            )
            if segments.single is not None:
                # each landmark is a token: with the tokens' own values the weights on landmarks are plain attention
                single = segments.single[:, None, None, None]
                landmark_value = torch.where(single, means(value, segments), landmark_value)
            out = attend(query, key_landmarks, landmark_value, segments.real, scale)
        if conv_weight is not None:
            masked = value if counted is None else value.masked_fill(~counted[:, :, None, None], 0.0)
            out = out + convolve(masked, conv_weight)
        if counted is not None:
            out = out.masked_fill(~counted[:, :, None, None], 0.0)
    return out.to(dtype)


def attend(query, key, value, seen, scale):
    """Softmax attention of query [B, T, H, D] over those of key, value [B, S, H, D] that are seen, [B, S] or None.

    An example that sees nothing gets something finite.
    """
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    # a softmax needs a key
    mask = None if seen is None else (seen | ~seen.any(dim=1, keepdim=True))[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)
