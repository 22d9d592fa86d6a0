"""Nyströmformer's attention through landmarks (arXiv 2102.03902)."""

from kernels.nystrom_attention.api import nystrom_attention, why_not_triton

__all__ = ["nystrom_attention", "why_not_triton"]
