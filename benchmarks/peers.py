"""What we are measured against, each at its public settings, in our layout and our window convention.

A peer is made by a function that builds masks and compiles; what that returns is timed, inputs [B, T, H, D].
A peer that needs another layout converts inside the timed call.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def longformer_self_attention(dim: int, num_heads: int, window: int) -> "LocalOnly":
    """Hugging Face's LongformerSelfAttention without global tokens: [B, T, dim] -> [B, T, dim].

    Its `attention_window` counts both sides, ours one. T must be a multiple of 2 * window.
    """
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=dim,
        num_attention_heads=num_heads,
        attention_window=[2 * window],
        attention_probs_dropout_prob=0.0,
    )
    return LocalOnly(LongformerSelfAttention(config, layer_id=0))


class LocalOnly(torch.nn.Module):
    """The arguments LongformerModel would pass for a text without padding and without global tokens."""

    def __init__(self, attention: torch.nn.Module):
        super().__init__()
        self.attention: torch.nn.Module = attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, dim] -> [B, T, dim]."""
        mask = x.new_zeros(x.shape[:2])
        none = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        return self.attention(x, mask, is_index_masked=none, is_index_global_attn=none, is_global_attn=False)[0]


def dense_sdpa(seq_len: int, window: int, device: str, dtype: torch.dtype) -> Attention:
    """scaled_dot_product_attention with a T x T mask made once; additive on CPU, which would convert."""
    position = torch.arange(seq_len, device=device)
    seen = (position[:, None] - position).abs() <= window
    mask = torch.zeros(seq_len, seq_len, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
    mask = mask if device == "cpu" else seen

    def attend(query, key, value):
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)

    return attend


def compiled_flex(qkv: Sequence[torch.Tensor], window: int) -> Attention:
    """FlexAttention compiled for inputs shaped as `qkv`, its block mask made once. No backward on CPU."""
    import torch._inductor.config as inductor
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def near(batch, head, row, col):
        return (row - col).abs() <= window

    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(query, key, value):
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return compiled(query, key, value, block_mask=block_mask).transpose(1, 2)

    seq_len, device = qkv[0].shape[1], qkv[0].device.type
    # compile here and in this process: a pool of compiler workers would start up during the timing
    with inductor.patch(compile_threads=1), torch.no_grad():
        build = torch.compile(create_block_mask)
        block_mask = build(near, B=None, H=None, Q_LEN=seq_len, KV_LEN=seq_len, device=device)
        attend(*qkv)
    return attend
