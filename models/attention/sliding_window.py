"""Longformer's self-attention as a module: a sliding window, and global tokens (arXiv 2004.05150, section 3.1)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from kernels.window_attention import WindowPattern, global_rows_attention, why_not_triton, window_attention
from models.attention.base import SelfAttention, draw_seed
from models.attention.options import layer_option, refuse_unknown
from models.cache import LayerCache


class SlidingWindowAttention(SelfAttention):
    """Multi-head attention over a dilated window and to global tokens: [B, T, M] -> [B, T, M].

    Args:
        dim: width M; num_heads must divide it.
        layer, num_layers: this layer's index and the depth of the model, to pick its entry of `window`, `dilation`.
        position: module that turns (query, key, pattern) into what the kernel needs, see `models.positions`; None where
            the model adds positions to its embeddings.
        window: keys on each side of a query, itself excluded, in steps of `dilation`: an int, or one entry a layer,
            each an int or one int a head.
        dilation: distance between neighbouring keys, in the same forms.
        causal: whether a query sees keys to its right.
        bias: whether the projections have biases.
        global_tokens: whether there are global tokens, whose rows have projections of their own.
        dropout: of the probabilities, in training; each call draws a seed from torch's generator of the device.
        impl: path of `kernels.window_attention.window_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        layer: int,
        *,
        num_layers: int,
        window: int | Sequence,
        position: nn.Module | None = None,
        causal: bool = False,
        dilation: int | Sequence = 1,
        bias: bool = False,
        global_tokens: bool = False,
        dropout: float = 0.0,
        impl: Literal["auto", "triton", "blocked", "reference"] = "auto",
    ):
        super().__init__(dim, num_heads, bias=bias, out_bias=bias)
        self.layer, self.num_layers = layer, num_layers
        self.causal, self.impl = causal, impl
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout of attention is {dropout}, it must be at least 0 and below 1")
        self.dropout = dropout
        self.position = position
        self.query_global = nn.Linear(dim, dim, bias=bias) if global_tokens else None
        self.key_value_global = nn.Linear(dim, 2 * dim, bias=bias) if global_tokens else None
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
            needs: Any = () if self.position is None else self.position.kernel_arguments
            needs = (*needs, "dropout") if self.dropout else needs
            reason = why_not_triton(device, head_dim=head_dim, dtype=dtype, needs=needs)
            if reason is not None:
                raise ValueError(f"impl='triton': {reason}; use impl='auto'")

    def new_cache(self, batch_size: int) -> LayerCache:
        """An empty cache for this layer as its options are now."""
        return LayerCache(batch_size, self.pattern)

    def forward(
        self,
        x: torch.Tensor,
        *,
        valid: torch.Tensor | None = None,
        global_index: torch.Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> torch.Tensor:
        """x [B, T, M] -> [B, T, M]; with a cache x goes on where its text stopped.

        valid: [B, T] bool, True = real. global_index: [B, G] int64 positions of valid tokens, ascending, -1 pads, as
        `global_positions` gives them.
        """
        query, key, value = self.project(x)
        start, query_start, terms = 0, 0, {}
        if cache is not None:
            start = self._position_in(cache, valid)
        if self.position is not None:
            query, key, terms = self.position(query, key, self.pattern, start)
        if cache is not None:
            key, value, query_start = cache.append(key, value)
        if self.dropout and self.training:
            # one seed for all: the row that a global row replaces is thrown away
            terms |= {"dropout": self.dropout, "dropout_seed": draw_seed(x.device)}
        out = window_attention(
            query,
            key,
            value,
            window=self.pattern.window,
            dilation=self.pattern.dilation,
            causal=self.causal,
            valid=valid,
            global_index=global_index,
            query_start=query_start,
            impl=self.impl,
            **terms,
        )
        if global_index is not None:
            drop = {name: terms[name] for name in ("dropout", "dropout_seed") if name in terms}
            out = self._with_global_rows(out, x, valid, global_index, drop)
        return self.merge(out)

    def _with_global_rows(self, out, x, valid, global_index, drop):
        """`out` [B, T, H, D] with the rows of the global tokens replaced by what they get from all of x [B, T, M]."""
        if self.query_global is None or self.key_value_global is None:
            raise ValueError("this layer has no global tokens: build it with global_tokens=True")
        seq_len, pads = x.shape[1], global_index < 0
        # take_along_dim would do, but makes a compiler take all sizes for constants
        tokens = x.gather(1, global_index.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))  # [B, G, M]
        query = self.query_global(tokens).unflatten(-1, (self.num_heads, -1))
        options = {"valid": valid, "causal": self.causal, "impl": self.impl}
        # with dropout each head draws for keys of its own
        if not drop and x.device.type == "cpu" and 2 * query.shape[1] * self.num_heads <= x.shape[-1]:
            rows = self._rows_over_inputs(self.key_value_global, query, x, global_index, options)
            rows = rows.masked_fill(pads[:, :, None, None], 0.0)
        else:
            key, value = self.key_value_global(x).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
            rows = global_rows_attention(query, key, value, global_index=global_index, **options, **drop)
        # a last column, dropped at once, takes the pads
        is_global = torch.zeros(x.shape[0], seq_len + 1, dtype=torch.bool, device=x.device)
        is_global = is_global.scatter(1, global_index.masked_fill(pads, seq_len), True)[:, :seq_len]
        place = global_index.clamp(min=0)[:, :, None, None].expand(rows.shape)
        return out.masked_fill(is_global[:, :, None, None], 0.0).scatter_add_(1, place, rows)

    def _rows_over_inputs(self, projection, query, x, global_index, options):
        """Global rows [B, G, H, D] of query [B, G, H, D] over x [B, T, M], whose keys and values are never made.

        q . (W x + b) is (W' q) . x and what is the same for all keys, which a softmax does not see; the weighted mean
        of W x + b is W times that of x, and b. For few rows that is far less work than to project every token.
        """
        key_weight, value_weight = projection.weight.unflatten(0, (2, self.num_heads, -1)).unbind(0)  # [H, D, M]
        # a row and head each as a row of its own, over one head of width M
        asking = torch.einsum("bghd,hdm->bghm", query, key_weight).flatten(1, 2)[:, :, None]
        index = global_index.repeat_interleave(self.num_heads, dim=1)
        keys, scale = x[:, :, None], query.shape[-1] ** -0.5
        means = global_rows_attention(asking, keys, keys, global_index=index, scale=scale, **options)
        rows = torch.einsum("bghm,hdm->bghd", means.reshape(*query.shape[:3], -1), value_weight)
        if projection.bias is None:
            return rows
        # under autocast the bias alone is still float32
        return rows + projection.bias.unflatten(0, (2, self.num_heads, -1))[1].to(rows.dtype)

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
