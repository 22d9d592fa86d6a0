"""Causal character model over bytes, after Longformer's (arXiv 2004.05150, section 4 and appendix B)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.attention.control import AttentionControl
from models.cache import RollingCache
from models.layers import Block, check_sizes, init_weights
from models.positions import RelativePositions, RotaryPositions, SharedBiases


class CharLM(AttentionControl, nn.Module):
    """Decoder with pre-LayerNorm, GELU and tied embeddings; forward gives next-character logits.

    Args:
        attention: called as attention(dim, num_heads, layer, num_layers=, position=, causal=True) once a layer.
        vocab_size: 256 for raw bytes.
        positions: "rotary", or "relative" for Transformer-XL's sinusoids, which the paper used.
        mlp_ratio: width of the feed-forward layer over `dim`.
        dropout: after the embedding, the attention output, inside and after the feed-forward layer, before the logits.
        checkpoint_activations: recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        *,
        attention: Callable[..., nn.Module],
        vocab_size: int = 256,
        dim: int = 512,
        num_layers: int = 12,
        num_heads: int = 8,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        positions: str = "rotary",
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        sizes = {"num_layers": num_layers, "vocab_size": vocab_size, "mlp_ratio": mlp_ratio}
        check_sizes(dim=dim, num_heads=num_heads, dropout=dropout, **sizes)
        make_position = _position_maker(positions, dim, num_heads, dropout)
        self.checkpoint_activations = checkpoint_activations
        self.embed = nn.Embedding(vocab_size, dim)
        self.blocks = nn.ModuleList(
            Block(
                attention(dim, num_heads, layer, num_layers=num_layers, position=make_position(), causal=True),
                dim,
                mlp_ratio * dim,
                dropout,
            )
            for layer in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.output_bias = nn.Parameter(torch.zeros(vocab_size))
        self.apply(init_weights)

    def forward(
        self, input_ids: torch.Tensor, *, cache: RollingCache | None = None, document_start=None
    ) -> torch.Tensor:
        """input_ids [B, T] int -> logits [B, T, V]; the logits at t predict character t + 1.

        With a `cache` the characters go on where those it has seen stopped, in steps of any size, as if all had been
        given at once. It has no gradients: ValueError where they are on, and where `set_attention` came in between.
        """
        if document_start is not None:
            raise NotImplementedError("CharLM.forward: the argument document_start is not implemented yet")
        if cache is not None and torch.is_grad_enabled():
            raise ValueError("a cache holds no gradients: call the model under torch.no_grad()")
        x = self.dropout(self.embed(input_ids) * self.embed.embedding_dim**0.5)  # [B, T, M]
        for layer, block in enumerate(self.blocks):
            if cache is not None:
                x = block(x, cache=cache.layers[layer])
            elif self.checkpoint_activations and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return F.linear(self.dropout(self.norm(x)), self.embed.weight, self.output_bias)

    def new_cache(self, batch_size: int = 1) -> RollingCache:
        """An empty cache for texts that are read piece by piece, `batch_size` of them side by side."""
        return RollingCache(layer.new_cache(batch_size) for layer in self.attention_layers())

    def attention_layers(self) -> list[Any]:
        """The attention module of each layer, from the bottom."""
        return [block.attention for block in self.blocks]

    @property
    def vocab_size(self) -> int:
        """Symbols it knows."""
        return self.embed.num_embeddings

    @property
    def max_positions(self) -> None:
        """The longest text in tokens: none, as positions are relative."""

    @property
    def receptive_field(self) -> int:
        """Characters before a position that its logits can depend on: the reaches of the layers added up."""
        return sum(pattern.reach for pattern in self.attention_patterns())


def _position_maker(positions, dim, num_heads, dropout):
    """A function that makes one layer's position module."""
    if positions == "rotary":
        return lambda: RotaryPositions(dim, num_heads)
    if positions == "relative":
        biases = SharedBiases(dim, num_heads)
        return lambda: RelativePositions(dim, num_heads, biases=biases, dropout=dropout)
    raise ValueError(f"positions is {positions!r}, it must be 'rotary' or 'relative'")
