"""What the attention modules share: one product for query, key and value, one for the output."""

import torch
from torch import nn


class SelfAttention(nn.Module):
    """Projections around a mechanism: a subclass computes `attend` between them.

    Args:
        dim: width M; num_heads must divide it.
        bias: of the query, key and value projections; out_bias: of the output projection.
    """

    def __init__(self, dim: int, num_heads: int, *, bias: bool, out_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim, bias=out_bias)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x [B, T, M] -> query, key, value [B, T, H, D], views of one tensor."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)

    def merge(self, out: torch.Tensor) -> torch.Tensor:
        """What the heads found, [B, T, H, D] -> [B, T, M]."""
        return self.out(out.flatten(2))


def draw_seed(device: torch.device) -> torch.Tensor:
    """int64 [1] for the dropout of a kernel, from torch's generator of the device: nothing waits for it."""
    return torch.randint(2**63 - 1, (1,), device=device)
