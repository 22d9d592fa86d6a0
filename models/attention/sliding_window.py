"""Longformer's sliding-window self-attention as a module (arXiv 2004.05150, section 3.1)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from kernels.window_attention import WindowPattern, why_not_triton, window_attention
from models.attention.options import layer_option, refuse_unknown
from models.cache import LayerCache


class SlidingWindowAttention(nn.Module):
    """Multi-head attention over a dilated window, without biases: [B, T, M] -> [B, T, M].

    Args:
        dim: width M; num_heads must divide it.
        layer, num_layers: this layer's index and the depth of the model, to pick its entry of `window`, `dilation`.
        position: module that turns (query, key, pattern) into what the kernel needs, see `models.positions`.
        window: keys on each side of a query, itself excluded, in steps of `dilation`: an int, or one entry a layer,
            each an int or one int a head.
        dilation: distance between neighbouring keys, in the same forms.
        causal: whether a query sees keys to its right.
        impl: path of `kernels.window_attention.window_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        layer: int,
        *,
        num_layers: int,
        position: nn.Module,
        causal: bool,
        window: int | Sequence,
        dilation: int | Sequence = 1,
        impl: Literal["auto", "triton", "blocked", "reference"] = "auto",
    ):
        super().__init__()
        self.layer, self.num_layers, self.num_heads = layer, num_layers, num_heads
        self.causal, self.impl = causal, impl
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.position = position
        self.options = {"window": window, "dilation": dilation}
        self.pattern = self.pattern_for()

    def pattern_for(self, **options) -> WindowPattern:
        """This layer's pattern with `window`, `dilation` changed, in the forms of the constructor.

        ValueError names an option that is unknown or out of range.
        """
        refuse_unknown(options, self.options)
        place = {"layer": self.layer, "num_layers": self.num_layers}
        entries = {name: layer_option(value, name, **place) for name, value in (self.options | options).items()}
        try:
            return WindowPattern.of(**entries, num_heads=self.num_heads, causal=self.causal)
        except ValueError as error:
            raise ValueError(f"layer {self.layer}: {error}") from None

    def set_options(self, pattern: WindowPattern, **options) -> None:
        """Take `pattern`, which `pattern_for(**options)` gave; options not named stay."""
        self.pattern, self.options = pattern, self.options | options

    def check_device(self, device: torch.device, dtype: torch.dtype) -> None:
        """ValueError where `impl` names a path that cannot run on a device in a dtype, or not with these positions."""
        if self.impl == "triton":
            head_dim = self.qkv.in_features // self.num_heads
            needs: Any = self.position.kernel_arguments
            reason = why_not_triton(device, head_dim=head_dim, dtype=dtype, needs=needs)
            if reason is not None:
                raise ValueError(f"impl='triton': {reason}; use impl='auto'")

    def new_cache(self, batch_size: int) -> LayerCache:
        """An empty cache for this layer as its options are now."""
        return LayerCache(batch_size, self.pattern)

    def forward(
        self, x: torch.Tensor, *, valid: torch.Tensor | None = None, cache: LayerCache | None = None
    ) -> torch.Tensor:
        """x [B, T, M], valid [B, T] bool (True = real) -> [B, T, M]; with a cache x goes on where its text stopped."""
        batch, seq_len, dim = x.shape
        fused = self.qkv(x).view(batch, seq_len, 3, self.num_heads, dim // self.num_heads)
        query, key, value = fused.unbind(2)  # [B, T, H, D]
        start = query_start = 0
        if cache is not None:
            start = self._position_in(cache, valid)
        query, key, terms = self.position(query, key, self.pattern, start)
        if cache is not None:
            key, value, query_start = cache.append(key, value)
        out = window_attention(
            query,
            key,
            value,
            window=self.pattern.window,
            dilation=self.pattern.dilation,
            causal=self.causal,
            valid=valid,
            query_start=query_start,
            impl=self.impl,
            **terms,
        )
        return self.out(out.reshape(batch, seq_len, dim))

    def _position_in(self, cache, valid):
        """The position of the next token of a cache, once it is sure that the cache can serve this layer."""
        if cache.pattern != self.pattern:
            raise ValueError(
                f"layer {self.layer}: the cache was made for window {cache.pattern.window} and dilation "
                f"{cache.pattern.dilation}, the layer has {self.pattern.window} and {self.pattern.dilation} now: "
                "call new_cache() after set_attention()"
            )
        if valid is not None:
            raise NotImplementedError("SlidingWindowAttention: valid together with a cache is not implemented yet")
        return cache.position
