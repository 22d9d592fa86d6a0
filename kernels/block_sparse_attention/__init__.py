"""BigBird's block-sparse attention, and attention over any other pattern of blocks (arXiv 2007.14062, section 2)."""

from kernels.block_sparse_attention.api import block_sparse_attention, why_not_triton
from kernels.block_sparse_attention.pattern import BlockPattern

__all__ = ["BlockPattern", "block_sparse_attention", "why_not_triton"]
