"""Self-attention to every token, as in BERT and RoBERTa."""

import torch
import torch.nn.functional as F

from models.attention.base import SelfAttention


class DenseAttention(SelfAttention):
    """Multi-head attention over all valid tokens, by scaled_dot_product_attention: [B, T, M] -> [B, T, M].

    Args:
        dim: width M; num_heads must divide it.
        layer, num_layers: unused, every mechanism is told.
        bias: of the query, key and value projections; the output projection always has one.
        dropout: of the probabilities, in training.
    """

    def __init__(
        self, dim: int, num_heads: int, layer: int, *, num_layers: int, bias: bool = True, dropout: float = 0.0
    ):
        super().__init__(dim, num_heads, bias=bias, out_bias=True)
        self.dropout = dropout

    def forward(
        self, x: torch.Tensor, *, valid: torch.Tensor | None = None, global_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [B, T, M], valid [B, T] bool (True = real) -> [B, T, M]; all tokens are global already."""
        query, key, value = (part.transpose(1, 2) for part in self.project(x))
        mask = None
        if valid is not None:  # a text without any token needs some softmax, too
            mask = (valid | ~valid.any(dim=1, keepdim=True))[:, None, None]
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.merge(out.transpose(1, 2))
