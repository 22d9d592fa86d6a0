"""Parts that every architecture shares: the feed-forward layer, the block and the initialisation."""

import torch
import torch.nn.functional as F
from torch import nn


class MLP(nn.Module):
    """Two linear layers with GELU and dropout between and after: [B, T, M] -> [B, T, M]."""

    def __init__(self, dim: int, hidden: int, dropout: float):
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, M] -> [B, T, M]."""
        return self.dropout(self.down(self.dropout(F.gelu(self.up(x)))))


class Block(nn.Module):
    """Pre-LayerNorm transformer block around a given attention module: [B, T, M] -> [B, T, M]."""

    def __init__(self, attention: nn.Module, dim: int, hidden: int, dropout: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = MLP(dim, hidden, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, **attention_inputs) -> torch.Tensor:
        """x [B, T, M]; the rest goes to the attention module."""
        x = x + self.dropout(self.attention(self.attention_norm(x), **attention_inputs))
        return x + self.mlp(self.mlp_norm(x))


def init_weights(module: nn.Module) -> None:
    """For `Module.apply`: matrices N(0, 0.02), LayerNorm gains N(1, 0.02), biases 0 (Transformer-XL's train.py)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.LayerNorm):
        nn.init.normal_(module.weight, mean=1.0, std=0.02)
    if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
        nn.init.zeros_(module.bias)
