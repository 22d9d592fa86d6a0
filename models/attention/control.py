"""Attention options of a whole model, changed between the phases of a schedule."""

from abc import ABC, abstractmethod
from typing import Any

import torch

from kernels.window_attention import WindowPattern
from models.attention.sliding_window import SlidingWindowAttention


class AttentionControl(ABC):
    """What a model offers whose layers may attend through windows; a subclass says which layers it has."""

    @abstractmethod
    def attention_layers(self) -> list[Any]:
        """The attention module of each layer, from the bottom."""

    def set_attention(self, **options) -> None:
        """Change attention options of every layer, as between the phases of a schedule; ValueError names a bad one."""
        layers = self._windowed()
        if options and not layers:
            raise ValueError(f"{next(iter(options))}: this model's attention has no options that a phase can change")
        # all layers or none: a refused option leaves the model as it was
        patterns = [layer.pattern_for(**options) for layer in layers]
        for layer, pattern in zip(layers, patterns, strict=True):
            layer.set_options(pattern, **options)

    def check_device(self, device: torch.device, dtype: torch.dtype) -> None:
        """ValueError where a layer asks for kernels that a device cannot run in a dtype, or not with its positions."""
        for layer in self._windowed():
            layer.check_device(device, dtype)

    def attention_patterns(self) -> list[WindowPattern]:
        """The pattern of each layer, from the bottom; none of a model whose layers have no windows."""
        return [layer.pattern for layer in self._windowed()]

    def _windowed(self) -> list[SlidingWindowAttention]:
        return [layer for layer in self.attention_layers() if isinstance(layer, SlidingWindowAttention)]
