"""Nyströmformer's self-attention as a module (arXiv 2102.03902, section 3.2)."""

from typing import Literal

import torch
from torch import nn

from kernels.nystrom_attention import nystrom_attention
from models.attention.base import SelfAttention


class NystromAttention(SelfAttention):
    """Attention through landmarks, with a convolution over the values beside it: [B, T, M] -> [B, T, M].

    Args:
        dim: width M; num_heads must divide it.
        layer, num_layers: unused, every mechanism is told.
        num_landmarks: a text with no more tokens is plain attention.
        num_taps: of the convolution, odd; None for none.
        bias: of the query, key and value projections; the output projection always has one.
        pinv_init, compat, impl: as in `kernels.nystrom_attention.nystrom_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        layer: int,
        *,
        num_layers: int,
        num_landmarks: int = 64,
        num_taps: int | None = 65,
        bias: bool = True,
        pinv_init: Literal["exact", "original"] = "exact",
        compat: Literal["hf", "original"] | None = None,
        impl: Literal["auto", "triton", "blocked", "reference"] = "auto",
    ):
        super().__init__(dim, num_heads, bias=bias, out_bias=True)
        self.options = {"num_landmarks": num_landmarks, "pinv_init": pinv_init, "compat": compat, "impl": impl}
        self.conv_weight = None
        if num_taps is not None:
            self.conv_weight = nn.Parameter(torch.empty(num_heads, num_taps).normal_(std=0.02))

    def forward(
        self, x: torch.Tensor, *, valid: torch.Tensor | None = None, global_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [B, T, M], valid [B, T] bool (True = real) -> [B, T, M]; there are no global tokens."""
        out = nystrom_attention(*self.project(x), valid=valid, conv_weight=self.conv_weight, **self.options)
        return self.merge(out)
