"""Parts that every architecture shares: the feed-forward layer, the block and the initialisation."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class MLP(nn.Module):
    """Two linear layers with an activation between and dropout after both: [B, T, M] -> [B, T, M].

    inner_dropout: that after the activation, `dropout` if None. activation: a key of ACTIVATIONS.
    """

    def __init__(
        self, dim: int, hidden: int, dropout: float, *, activation: str = "gelu", inner_dropout: float | None = None
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}, it must be one of {', '.join(ACTIVATIONS)}")
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)
        self.activation = ACTIVATIONS[activation]
        self.inner_dropout = nn.Dropout(dropout if inner_dropout is None else inner_dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, M] -> [B, T, M]."""
        return self.dropout(self.down(self.inner_dropout(self.activation(self.up(x)))))


class Block(nn.Module):
    """Transformer block around a given attention module: [B, T, M] -> [B, T, M].

    pre_norm: LayerNorm before the attention and the feed-forward layer (GPT-2), else behind the sums (BERT).
    """

    def __init__(
        self,
        attention: nn.Module,
        dim: int,
        hidden: int,
        dropout: float,
        *,
        activation: str = "gelu",
        inner_dropout: float | None = None,
        norm_eps: float = 1e-5,
        pre_norm: bool = True,
    ):
        super().__init__()
        self.pre_norm = pre_norm
        self.attention_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.attention = attention
        self.mlp_norm = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = MLP(dim, hidden, dropout, activation=activation, inner_dropout=inner_dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, **attention_inputs) -> torch.Tensor:
        """x [B, T, M]; the rest goes to the attention module."""
        if self.pre_norm:
            x = x + self.dropout(self.attention(self.attention_norm(x), **attention_inputs))
            return x + self.mlp(self.mlp_norm(x))
        x = self.attention_norm(x + self.dropout(self.attention(x, **attention_inputs)))
        return self.mlp_norm(x + self.mlp(x))


def check_sizes(*, dim: int, num_heads: int, dropout: float, **sizes: int) -> None:
    """ValueError for a size below 1, heads that do not divide the width, a dropout outside of [0, 1)."""
    for name, value in {"dim": dim, "num_heads": num_heads, **sizes}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, it must be at least 1")
    if dim % num_heads:
        raise ValueError(f"num_heads {num_heads} does not divide dim {dim}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout}, it must be at least 0 and below 1")


def init_weights(module: nn.Module) -> None:
    """For `Module.apply`: matrices N(0, 0.02), LayerNorm gains N(1, 0.02), biases 0 (Transformer-XL's train.py)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.LayerNorm):
        nn.init.normal_(module.weight, mean=1.0, std=0.02)
    if isinstance(module, nn.Linear | nn.LayerNorm) and module.bias is not None:
        nn.init.zeros_(module.bias)
