"""Longformer's sliding-window attention with per-head dilation (arXiv 2004.05150, section 3.1)."""

from kernels.window_attention.api import window_attention
from kernels.window_attention.pattern import WindowPattern

__all__ = ["WindowPattern", "window_attention"]
