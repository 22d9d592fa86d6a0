"""What we are measured against, each at its public settings, in our layout and our window convention.

A peer is made by a function that builds masks and compiles; what that returns is timed, inputs [B, T, H, D].
A peer that needs another layout converts inside the timed call.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def longformer_self_attention(dim: int, num_heads: int, window: int) -> "LocalOnly":
    """Hugging Face's LongformerSelfAttention without global tokens: [B, T, dim] -> [B, T, dim].

    Its `attention_window` counts both sides, ours one. T must be a multiple of 2 * window.
    """
    return LocalOnly(_self_attention(dim, num_heads, window))


def longformer_with_globals(dim: int, num_heads: int, window: int) -> "WithGlobals":
    """The same module with global tokens: (x [B, T, dim], is_global [B, T] bool) -> [B, T, dim]."""
    return WithGlobals(_self_attention(dim, num_heads, window))


def _self_attention(dim, num_heads, window):
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=dim,
        num_attention_heads=num_heads,
        attention_window=[2 * window],
        attention_probs_dropout_prob=0.0,
    )
    return LongformerSelfAttention(config, layer_id=0)


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


class WithGlobals(torch.nn.Module):
    """The arguments LongformerModel would pass for a text without padding, some of whose tokens are global."""

    def __init__(self, attention: torch.nn.Module):
        super().__init__()
        self.attention: torch.nn.Module = attention

    def forward(self, x: torch.Tensor, is_global: torch.Tensor) -> torch.Tensor:
        """[B, T, dim], [B, T] bool -> [B, T, dim]."""
        # the mask is 0 at local tokens and something large at global ones, whose window entries it removes
        mask = x.new_zeros(x.shape[:2]).masked_fill(is_global, torch.finfo(x.dtype).max)
        return self.attention(
            x,
            mask,
            is_index_masked=torch.zeros_like(is_global),
            is_index_global_attn=is_global,
            is_global_attn=True,
        )[0]


def bigbird_self_attention(
    dim: int, num_heads: int, batch: int, seq_len: int, block_size: int, num_random_blocks: int
) -> "SparseOnly":
    """Hugging Face's BigBirdBlockSparseAttention as it trains, in layer 0: [B, T, dim] -> [B, T, dim].

    In eval() it would compute another function. T must be a multiple of `block_size`.
    """
    from transformers import BigBirdConfig
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

    config = BigBirdConfig(
        hidden_size=dim,
        num_attention_heads=num_heads,
        block_size=block_size,
        num_random_blocks=num_random_blocks,
        max_position_embeddings=max(seq_len, 4096),
    )
    masks = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(batch, seq_len), block_size)
    return SparseOnly(BigBirdBlockSparseAttention(config, seed=0).train(), *masks)


class SparseOnly(torch.nn.Module):
    """The arguments BigBirdModel would pass for texts without padding; it makes the masks once for all layers."""

    def __init__(self, attention: torch.nn.Module, blocked_mask, band_mask, from_mask, to_mask):
        super().__init__()
        self.attention: torch.nn.Module = attention
        for name, mask in (("blocked", blocked_mask), ("band", band_mask), ("rows", from_mask), ("keys", to_mask)):
            self.register_buffer(name, mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, dim] -> [B, T, dim]."""
        out, _ = self.attention(
            x,
            band_mask=self.band,
            from_mask=self.rows,
            to_mask=self.keys,
            from_blocked_mask=self.blocked,
            to_blocked_mask=self.blocked,
        )
        return out


def nystromformer_self_attention(
    dim: int, num_heads: int, seq_len: int, num_landmarks: int, num_taps: int
) -> "FirstOutput":
    """Hugging Face's NystromformerSelfAttention on its Nyström path: [B, T, dim] -> [B, T, dim].

    T must be `seq_len`, a multiple of `num_landmarks`; the pseudo-inverse begins with one factor for the whole batch.
    """
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    config = NystromformerConfig(
        hidden_size=dim,
        num_attention_heads=num_heads,
        num_landmarks=num_landmarks,
        segment_means_seq_len=seq_len,
        conv_kernel_size=num_taps,
    )
    return FirstOutput(NystromformerSelfAttention(config))


class FirstOutput(torch.nn.Module):
    """A module that returns a tuple, for a text without padding."""

    def __init__(self, attention: torch.nn.Module):
        super().__init__()
        self.attention: torch.nn.Module = attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, dim] -> [B, T, dim]."""
        return self.attention(x)[0]


def whole_encoder(model_type: str, config: dict[str, Any]) -> "LastStates":
    """Hugging Face's model with its initial weights, without pooler: input_ids [B, T] -> [B, T, dim].

    config: entries of its config.json other than their defaults.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    name = {"longformer": "Longformer", "big_bird": "BigBird", "nystromformer": "Nystromformer", "roberta": "Roberta"}
    parts = [getattr(transformers, f"{name[model_type]}{part}") for part in ("Config", "Model")]
    options = {} if model_type == "nystromformer" else {"add_pooling_layer": False}  # it has none
    return LastStates(parts[1](parts[0](**config), **options))


class LastStates(torch.nn.Module):
    """The last layer's states of a whole model, for texts without padding."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model: Any = model

    def forward(self, input_ids: torch.Tensor, *, is_global: torch.Tensor | None = None) -> torch.Tensor:
        """input_ids [B, T], is_global [B, T] bool for a model that has global tokens -> [B, T, dim]."""
        options = {} if is_global is None else {"global_attention_mask": is_global.long()}
        return self.model(input_ids, **options)[0]


def dense_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention to every key, by the backend that PyTorch takes."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def dense_flash(causal: bool, grouped: bool, dtype: torch.dtype) -> Attention:
    """Attention to every key (with `causal` to the earlier ones): flash, or in float32 the memory-efficient kernel."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = SDPBackend.EFFICIENT_ATTENTION if dtype == torch.float32 else SDPBackend.FLASH_ATTENTION

    def attend(query, key, value):
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)
        return out.transpose(1, 2)

    return attend


def flash_varlen(batch: int, seq_len: int, window: int, causal: bool, grouped: bool, device: str) -> Attention:
    """The window of FlashAttention-2 as it comes with torch, through torch.nn.attention.varlen (torch >= 2.11)."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"window_size": (window, 0 if causal else window)}
    options |= {"enable_gqa": True} if grouped else {}
    for name in options:
        if name not in known:
            raise NotImplementedError(f"varlen_attn of torch {torch.__version__} has no {name}")
    starts = torch.arange(0, (batch + 1) * seq_len, seq_len, dtype=torch.int32, device=device)

    def attend(query, key, value):
        query, key, value = (tensor.flatten(0, 1) for tensor in (query, key, value))
        out: Any = varlen_attn(query, key, value, starts, starts, seq_len, seq_len, **options)
        return out.unflatten(0, (batch, seq_len))

    return attend


def flash_package(window: int, causal: bool) -> Attention:
    """flash_attn_func of the flash-attn package with its window, where it is installed; our layout is its own."""
    flash_attn = importlib.import_module("flash_attn")
    sides = (window, 0 if causal else window)
    return lambda query, key, value: flash_attn.flash_attn_func(query, key, value, causal=causal, window_size=sides)


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
