"""Dense oracle of block-sparse attention: every score, the logarithm of its multiplicity, one softmax.

Any device, any dtype, differentiable. Time and memory T^2.
"""

import torch

from kernels.block_sparse_attention.pattern import BlockPattern
from kernels.dropout import keep_mask


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    pattern: BlockPattern,
    scale: float,
    valid: torch.Tensor | None = None,
    dropout: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax over the keys of the blocks `pattern` shows, each as often as it counts; as `api`'s function.

    query, key, value, result [B, T, H, D], valid [B, T] bool. A row that is not valid or sees no key is zero.
    """
    batch, seq_len, num_heads, _ = query.shape
    counts = _token_counts(pattern, batch, seq_len, valid, query.device)  # [B, H, T, T]
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * scale + counts.to(query.dtype).log()
    seen = counts > 0
    weights = torch.softmax(scores.masked_fill(~seen, torch.finfo(scores.dtype).min), dim=-1)
    # a row that sees no key spreads its weight evenly under the lowest finite score: it must give zero
    weights = weights.masked_fill(~seen, 0.0)
    if dropout and dropout_seed is not None:
        batch_head = torch.arange(batch * num_heads, device=query.device).view(batch, num_heads, 1, 1)
        rows = torch.arange(seq_len, device=query.device)
        kept = keep_mask(dropout_seed, batch_head, rows[:, None], rows, dropout)
        weights = weights * kept / (1 - dropout)
    return torch.einsum("bhij,bjhd->bihd", weights, value)


def _token_counts(pattern, batch, seq_len, valid, device):
    """How often each pair counts, int64 [B, H, T, T]: each example by its own number of blocks, none that is masked."""
    block_size, longest = pattern.block_size, pattern.blocks_of(seq_len)
    if valid is None:
        valid = torch.ones(batch, seq_len, dtype=torch.bool, device=device)
    counts = torch.zeros(batch, pattern.num_heads, seq_len, seq_len, dtype=torch.int64, device=device)
    for example, real in enumerate(valid.tolist()):
        num_tokens = max((position + 1 for position in range(seq_len) if real[position]), default=0)
        num_blocks = -(-num_tokens // block_size) if pattern.follows_length else longest
        own = pattern.counts(num_blocks).to(device)
        own = own.repeat_interleave(block_size, dim=1).repeat_interleave(block_size, dim=2)[:, :seq_len, :seq_len]
        counts[example, :, : own.shape[1], : own.shape[2]] = own
    return counts * (valid[:, None, :, None] & valid[:, None, None, :])
