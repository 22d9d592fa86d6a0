"""Relative positions for windowed attention: rotary phases, or Transformer-XL's sinusoids."""

import torch
from torch import nn


class RotaryPositions(nn.Module):
    """Rotary embedding of queries and keys (arXiv 2104.09864), halves paired; no parameters.

    forward(query, key, pattern, start) takes [B, T, H, D] and gives rotated query and key and no further kernel
    arguments; the first row stands at position `start` of its text.
    """

    kernel_arguments: tuple[str, ...] = ()

    def __init__(self, dim: int, num_heads: int, *, base: float = 10_000.0):
        super().__init__()
        head_dim = dim // num_heads
        if head_dim % 2:
            raise ValueError(f"rotary positions need an even head dim, got {dim} / {num_heads} = {head_dim}")
        self.base, self.num_frequencies = base, head_dim // 2

    def forward(self, query, key, pattern, start: int = 0):
        """Rotate by the phase of each row's position in its text."""
        # float32 angles of far positions are off by more than the rest of a float32 model is
        kind = {"device": query.device, "dtype": torch.float64}
        frequency = self.base ** (-torch.arange(self.num_frequencies, **kind) / self.num_frequencies)
        phase = torch.arange(start, start + query.shape[1], **kind)[:, None] * frequency
        # [T, 1, D / 2]
        cos, sin = phase.cos().to(query.dtype)[:, None], phase.sin().to(query.dtype)[:, None]
        return _rotate(query, cos, sin), _rotate(key, cos, sin), {}


def _rotate(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class RelativePositions(nn.Module):
    """Transformer-XL's relative term (arXiv 1901.02860, section 3.3) over the distances a window has.

    The score of a key at distance r gains (q + position_bias) . W R_r, and the content term uses q + content_bias.
    Both biases are [H, D] and shared by all layers; W is this layer's own. Only window + 1 distances occur, so the
    projected sinusoids are computed for those within reach and no shift of a T x T matrix is needed.

    forward(query, key, pattern, start) takes [B, T, H, D]; pattern must be causal. Where the text starts is all one.
    """

    kernel_arguments: tuple[str, ...] = ("position_query", "position_key")

    def __init__(self, dim: int, num_heads: int, *, biases: "SharedBiases", dropout: float = 0.0):
        super().__init__()
        if dim % 2:
            raise ValueError(f"relative positions need an even dim, got {dim}")
        self.dim, self.num_heads = dim, num_heads
        self.project = nn.Linear(dim, dim, bias=False)
        self.biases = biases
        self.dropout = nn.Dropout(dropout)

    def forward(self, query, key, pattern, start: int = 0):
        """Query with the content bias, key as it is, and the position term as arguments of the kernel."""
        dtype = self.project.weight.dtype
        # every distance a window spans, though a dilated head uses some alone: no shape depends on a tensor's content
        sines = sinusoids(torch.arange(pattern.reach + 1, device=query.device), self.dim).to(dtype)
        projected = self.project(self.dropout(sines)).unflatten(-1, (self.num_heads, -1))  # [reach + 1, H, D]
        distance = self._distances(pattern, query.device)  # [H, C]
        heads = torch.arange(self.num_heads, device=query.device)[:, None]
        terms = {
            "position_query": query + self.biases.position.to(query.dtype),
            "position_key": projected[distance, heads].to(query.dtype),  # [H, C, D]
        }
        return query + self.biases.content.to(query.dtype), key, terms

    @staticmethod
    def _distances(pattern, device):
        """Tokens from a query back to the key of each window column, [H, max window + 1]; 0 where a head has none."""
        window = torch.tensor(pattern.window, device=device)[:, None]
        dilation = torch.tensor(pattern.dilation, device=device)[:, None]
        columns = torch.arange(max(pattern.window) + 1, device=device)
        return ((window - columns) * dilation).clamp(min=0)


class SharedBiases(nn.Module):
    """The content and position biases u and v of Transformer-XL, [H, D] each, one pair for the whole model."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.content = nn.Parameter(torch.empty(num_heads, dim // num_heads).normal_(std=0.02))
        self.position = nn.Parameter(torch.empty(num_heads, dim // num_heads).normal_(std=0.02))


def sinusoids(distance: torch.Tensor, dim: int) -> torch.Tensor:
    """[N] distances -> float64 [N, dim]: sines, then cosines, of frequencies 10000^(-2k / dim)."""
    frequency = 10_000.0 ** (-torch.arange(0, dim, 2, device=distance.device, dtype=torch.float64) / dim)
    phase = distance[:, None] * frequency
    return torch.cat([phase.sin(), phase.cos()], dim=-1)
