"""Longformer's sliding-window attention with per-head dilation and global tokens (arXiv 2004.05150, section 3.1)."""

from kernels.window_attention.api import global_rows_attention, why_not_triton, window_attention
from kernels.window_attention.global_tokens import global_positions
from kernels.window_attention.pattern import WindowPattern

__all__ = ["WindowPattern", "global_positions", "global_rows_attention", "why_not_triton", "window_attention"]
