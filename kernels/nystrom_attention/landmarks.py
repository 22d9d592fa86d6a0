"""Landmarks of Nyström attention: means of segments of the text (arXiv 2102.03902, section 3.1).

The segments cut the *real* tokens of each example, in their order, into runs of nearly one length: of n tokens and m
landmarks the first (n // m + 1) m - n runs hold n // m tokens, the others one more (the rule of mlpen/Nystromformer,
ImageNet/T2T-ViT/models/token_nystromformer.py). So padding, wherever it lies, and the other examples of a batch change
nothing. Where there are fewer tokens than landmarks the first runs are empty and the others one token each.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Which tokens each landmark averages; tables of one row where all examples are cut alike (B is then 1).

    Attributes:
        first: [B, N + 1] int64, the place among the counted tokens of each landmark's first one, at last their number.
        index: [B, T] int64, the landmark of each token; -1 for a token that is in none.
        share: [B, N], what a token counts in the mean of its landmark; 0 for an empty one.
        ranks: [B, T] int64, counted tokens up to and with each position; None where all are counted.
    """

    first: torch.Tensor
    index: torch.Tensor
    share: torch.Tensor
    ranks: torch.Tensor | None = None

    @property
    def start(self) -> torch.Tensor:
        """[B, N + 1] int64: landmark j averages tokens from position start[j] to before start[j + 1]."""
        return self.first if self.ranks is None else torch.searchsorted(self.ranks, self.first + 1)

    @property
    def real(self) -> torch.Tensor | None:
        """[B, N] bool, the landmarks that average something; None where all do."""
        return None if self.ranks is None else self.share > 0

    @property
    def single(self) -> torch.Tensor | None:
        """[B] bool, examples with no more tokens than landmarks, each of which is one token; None where none is."""
        return None if self.ranks is None else self.first[:, -1] <= self.share.shape[1]


def cut(
    seq_len: int, num_landmarks: int, valid: torch.Tensor | None, *, dtype: torch.dtype, device: torch.device
) -> Segments:
    """Segments of the tokens that are valid [B, T], None for all, in texts longer than `num_landmarks`.

    The shares are in `dtype`.
    """
    ranks = None if valid is None else valid.cumsum(dim=1)  # [B, T]
    num_counted = seq_len if ranks is None else ranks[:, -1:]
    rank = torch.arange(seq_len, device=device)[None] if ranks is None else ranks - 1
    size = num_counted // num_landmarks
    num_short = (size + 1) * num_landmarks - num_counted  # landmarks of `size` tokens
    in_short = num_short * size
    # without a token to a landmark none is in a short segment: the divisor is then of no consequence
    divisor = size if isinstance(size, int) else size.clamp(min=1)
    index = torch.where(rank < in_short, rank // divisor, num_short + (rank - in_short) // (size + 1))
    if valid is not None:
        index = index.masked_fill(~valid, -1)
    landmark = torch.arange(num_landmarks + 1, device=device)[None]
    first = landmark * size + (landmark - num_short).clamp(min=0)
    count = first.diff(dim=1)
    share = (1.0 / count.clamp(min=1).to(dtype)).masked_fill(count == 0, 0.0)
    return Segments(first, index, share, ranks)


def means(tensor: torch.Tensor, segments: Segments) -> torch.Tensor:
    """[B, T, H, D] -> [B, N, H, D], the mean of each segment, zero for an empty one. Differentiable."""
    return _means(tensor, segments.first, segments.index, segments.share, segments.ranks)


# operators, because both directions gather: no order of sums is left to chance, nothing of size T x N is made
@torch.library.custom_op("longspan::segment_means", mutates_args=())
def _means(tensor: Tensor, first: Tensor, index: Tensor, share: Tensor, ranks: Tensor | None) -> Tensor:
    segments = Segments(first, index, share, ranks)
    sums = _run_sums(tensor, segments) if ranks is None else _gathered_sums(tensor, segments)
    return sums * share[..., None, None]


@_means.register_fake
def _(tensor, first, index, share, ranks):
    batch, _, num_heads, head_dim = tensor.shape
    return tensor.new_empty((batch, share.shape[1], num_heads, head_dim))


@torch.library.custom_op("longspan::segment_means_backward", mutates_args=())
def _means_backward(grad: Tensor, first: Tensor, index: Tensor, share: Tensor, ranks: Tensor | None) -> Tensor:
    return spread(grad, Segments(first, index, share, ranks))


@_means_backward.register_fake
def _(grad, first, index, share, ranks):
    batch, _, num_heads, head_dim = grad.shape
    return grad.new_empty((batch, index.shape[1], num_heads, head_dim))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _grads(ctx, grad):
    return _means_backward(grad, *ctx.saved_tensors), None, None, None, None


_means.register_autograd(_grads, setup_context=_setup)


def _run_sums(tensor, segments):
    """Sums of segments that are the same in every example: at most two lengths of them."""
    seq_len, num_landmarks = tensor.shape[1], segments.share.shape[1]
    size = seq_len // num_landmarks
    num_short = (size + 1) * num_landmarks - seq_len
    short, long = tensor.tensor_split([num_short * size], dim=1)
    sums = [short.unflatten(1, (num_short, size)).sum(2)]
    if num_short < num_landmarks:
        sums.append(long.unflatten(1, (num_landmarks - num_short, size + 1)).sum(2))
    return torch.cat(sums, dim=1)


def _gathered_sums(tensor, segments):
    """Sums of segments of the counted tokens: those of a landmark are brought together, as many as one may have."""
    batch, seq_len, num_heads, head_dim = tensor.shape
    longest = seq_len // segments.share.shape[1] + 1
    rank = segments.first[:, :-1, None] + torch.arange(longest, device=tensor.device)  # [B, N, longest]
    own = rank < segments.first[:, 1:, None]
    places = torch.searchsorted(segments.ranks, rank.flatten(1) + 1).clamp(max=seq_len - 1)
    examples = torch.arange(batch, device=tensor.device)[:, None]
    tokens = tensor[examples, places].reshape(*own.shape, num_heads * head_dim)
    return (own[:, :, None].to(tensor.dtype) @ tokens).view(batch, -1, num_heads, head_dim)


def spread(grad: torch.Tensor, segments: Segments) -> torch.Tensor:
    """[B, N, H, D] gradient of the means -> [B, T, H, D], that of the tokens."""
    grad = grad * segments.share[..., None, None]
    examples = torch.arange(len(grad), device=grad.device)[:, None]
    if segments.ranks is None:
        return grad[examples, segments.index]
    outside = segments.index < 0
    return grad[examples, segments.index.clamp(min=0)].masked_fill(outside[..., None, None], 0.0)
