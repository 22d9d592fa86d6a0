"""The rolling cache of a causal model: keys and values of the last window of each layer, whatever came before."""

from collections.abc import Iterable

import torch

from kernels.window_attention import WindowPattern

MIN_SPARE = 256


class LayerCache:
    """Keys and values of the last `pattern.reach` tokens of one layer, [B, tokens, Hkv, D] each.

    A buffer with a quarter to spare is filled from the front; when it is full the last `reach` tokens move there. So a
    token is copied about four times, and what the kernel gets is one plain stretch of keys in the order of the text.
    A ring would save the copies, but its seam cuts windows and the strides of dilated heads in two, and each path of
    the kernel would need a second way of addressing keys.

    `position`: tokens of the text seen so far, which is the position of the next one.
    """

    def __init__(self, batch_size: int, pattern: WindowPattern):
        if not pattern.causal:
            raise ValueError("a cache serves causal attention: in the other kind later tokens change earlier ones")
        self.batch_size, self.pattern = batch_size, pattern
        self.position = 0
        self.capacity = pattern.reach + max(MIN_SPARE, pattern.reach // 4)  # at most
        self._buffers: tuple[torch.Tensor, ...] = ()
        self._filled = 0

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Take the keys and values of the next T tokens, [B, T, Hkv, D], T as large as one likes.

        Returns (keys, values, query_start): those within reach of the new tokens, with the new ones at the end, and
        the place of the first new one among them. The tensors are read before the next call, which may overwrite them.
        """
        if len(key) != self.batch_size:
            raise ValueError(f"the cache was made for {self.batch_size} texts at once, got {len(key)}")
        new, count, past = (key, value), key.shape[1], min(self._filled, self.pattern.reach)
        self._grow(new, self._filled + count)
        self.position += count
        held = [buffer[:, self._filled - past : self._filled] for buffer in self._buffers]
        if past + count > self.capacity:  # more than fits: this once old and new are joined outside the buffer
            keys, values = (torch.cat(pair, dim=1) for pair in zip(held, new, strict=True))
            kept = min(past + count, self.pattern.reach)
            self._restart([part[:, past + count - kept :] for part in (keys, values)], kept)
            return keys, values, past
        if self._filled + count > self._buffers[0].shape[1]:
            self._restart([part.clone() for part in held], past)  # from one place of a buffer to another that overlaps
        first, last = self._filled - past, self._filled + count
        for buffer, part in zip(self._buffers, new, strict=True):
            buffer[:, self._filled : last] = part
        self._filled = last
        keys, values = (buffer[:, first:last] for buffer in self._buffers)
        return keys, values, past

    def _grow(self, new, needed):
        """Buffers for `needed` tokens, twice as many as before but at most `capacity`: a window may be wider than any
        text."""
        room = self._buffers[0].shape[1] if self._buffers else 0
        if self._buffers and room >= min(needed, self.capacity):
            return
        size = min(self.capacity, max(needed, 2 * room, MIN_SPARE))
        former = self._buffers
        self._buffers = tuple(part.new_empty(len(part), size, *part.shape[2:]) for part in new)
        for buffer, part in zip(self._buffers, former, strict=bool(former)):
            buffer[:, : self._filled] = part[:, : self._filled]

    def _restart(self, parts, count):
        """Fill the buffers anew from the front."""
        for buffer, part in zip(self._buffers, parts, strict=True):
            buffer[:, :count] = part
        self._filled = count


class RollingCache:
    """One `LayerCache` a layer: what a causal model keeps of the text so far, of a size that does not grow with it."""

    def __init__(self, layers: Iterable[LayerCache]):
        self.layers = list(layers)

    @property
    def position(self) -> int:
        """Tokens of the text seen so far."""
        return self.layers[0].position
