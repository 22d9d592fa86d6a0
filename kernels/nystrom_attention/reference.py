"""Naive oracle of Nyström attention: every matrix in full, gradients by autograd. Any device, differentiable."""

import torch

from kernels.nystrom_attention.inverse import pseudo_inverse


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
    """F Z (B V) + conv(V) of arXiv 2102.03902, section 3.2; arguments as in `api.nystrom_attention`.

    query, key, value [B, T, H, D], valid [B, T] bool, conv_weight [H, K]; result [B, T, H, D]. Computed in float32, or
    float64 for inputs of that type. An example with no more real tokens than landmarks is plain softmax attention.
    Time and memory T * T for such an example, else T * N. published: `valid` hides keys from the landmarks' queries and
    means nothing else, as in the published code.
    """
    dtype = query.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.autocast(query.device.type, enabled=False):
        seen = torch.ones(query.shape[:2], dtype=torch.bool, device=query.device) if valid is None else valid
        counted = torch.ones_like(seen) if published else seen
        query, key, value = (tensor.to(compute).transpose(1, 2) for tensor in (query, key, value))  # [B, H, T, D]
        examples = []
        for b in range(len(seen)):
            averages = averaging(counted[b], num_landmarks).to(compute)
            examples.append([averages @ tensor[b] for tensor in (query, key)])
        landmarks = [torch.stack(each) for each in zip(*examples, strict=True)]  # [B, H, N, D] of queries and keys
        there = torch.stack([averaging(each, num_landmarks).any(1) for each in counted])[:, None]
        to_landmarks = softmax(query @ landmarks[1].mT * scale, there[:, :, None])  # [B, H, T, N]
        between = softmax(landmarks[0] @ landmarks[1].mT * scale, there[:, :, None]) * there[..., None]
        to_keys = softmax(landmarks[0] @ key.mT * scale, seen[:, None, None])  # [B, H, N, T]
        inverse = pseudo_inverse(between.flatten(0, 1), iterations=pinv_iterations, init=pinv_init).view_as(between)
        out = to_landmarks @ (inverse @ (to_keys @ value))
        few = counted.sum(1) <= num_landmarks
        if few.any():
            dense = softmax(query @ key.mT * scale, seen[:, None, None]) @ value
            out = torch.where(few[:, None, None, None], dense, out)
        if conv_weight is not None:
            out = out + convolve(value * counted[:, None, :, None], conv_weight.to(compute))
        out = out.masked_fill(~counted[:, None, :, None], 0.0)
    return out.transpose(1, 2).to(dtype)


def averaging(counted: torch.Tensor, num_landmarks: int) -> torch.Tensor:
    """[N, T] float64 weights that make the landmarks of one example of its tokens, `counted` [T] bool of them."""
    places = counted.nonzero()[:, 0]
    size = len(places) // num_landmarks
    num_short = (size + 1) * num_landmarks - len(places)
    weights = torch.zeros(num_landmarks, len(counted), dtype=torch.float64, device=counted.device)
    lengths = [size] * num_short + [size + 1] * (num_landmarks - num_short)
    for row, run in zip(weights, places.split(lengths), strict=True):
        row[run] = 1.0 / max(len(run), 1)
    return weights


def softmax(scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Over the last dimension, of the scores that are seen; zeros where none is."""
    return torch.softmax(scores.masked_fill(~seen, torch.finfo(scores.dtype).min), dim=-1) * seen


def convolve(value: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """value [B, H, T, D], taps [H, K]: sum over j of taps[h, j] value[t + j - K // 2], zeros outside the text."""
    seq_len, num_taps = value.shape[2], taps.shape[1]
    padded = torch.nn.functional.pad(value, (0, 0, num_taps // 2, num_taps // 2))
    shifted = [taps[:, j, None, None] * padded[:, :, j : j + seq_len] for j in range(num_taps)]
    return torch.stack(shifted).sum(0)
