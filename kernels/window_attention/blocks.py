"""What the blocked path works on: problems of one size, blocks of their rows, overlapping keys, columns beside them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.checks import empty_result
from kernels.dropout import keep_mask


class Problems(NamedTuple):
    """P independent problems of N rows and K keys.

    query, position_query [P, N, D]; key, value [P, K, D]; position_key [P, columns, D]; row_valid bool [P, N, 1],
    key_valid [P, K, 1]; number int64 [P], where a problem stands among all.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    position_query: torch.Tensor | None = None
    position_key: torch.Tensor | None = None
    row_valid: torch.Tensor | None = None
    key_valid: torch.Tensor | None = None
    number: torch.Tensor | None = None

    def split(self, size: int) -> list["Problems"]:
        """The same in parts of at most `size` problems."""
        parts = [(None,) * -(-len(self.query) // size) if t is None else t.split(size) for t in self]
        return [Problems(*part) for part in zip(*parts, strict=True)]

    def zeros(self) -> torch.Tensor:
        """The result where there is no key: zeros, with zero gradients of every input."""
        others = (self.key, self.value, self.position_query, self.position_key)
        return empty_result(self.query, *(tensor for tensor in others if tensor is not None))


@dataclass(frozen=True)
class Blocks:
    """Blocks of rows, row i standing at key `start + i`; each touches `span` keys, from `left` before its first row."""

    num_rows: int
    num_keys: int
    start: int
    left: int
    right: int
    block: int

    @property
    def num_blocks(self) -> int:
        """Blocks that hold a row."""
        return -(-self.num_rows // self.block)

    @property
    def tail(self) -> int:
        """Rows the last block has beyond the last row."""
        return self.num_blocks * self.block - self.num_rows

    @property
    def span(self) -> int:
        """Keys a block touches."""
        return self.left + self.block + self.right

    def ranges(self, most: int) -> list[tuple[int, int]]:
        """Blocks by mask, at most `most` together: at the start, with the plain band, at the end."""
        first = min(max(-(-(self.left - self.start) // self.block), 0), self.num_blocks)
        last = min(max(first, (self.num_keys - self.right - self.start) // self.block), self.num_blocks)
        bounds = {0, first, last, self.num_blocks}
        for start, stop in ((0, first), (first, last), (last, self.num_blocks)):
            bounds.update(range(start, stop, most))
        bounds = sorted(bounds)
        return list(zip(bounds, bounds[1:], strict=False))

    def ends(self, first: int, last: int) -> tuple[int, int]:
        """(begin, end) of the keys that a range of blocks touches; some may lie off either end of the sequence."""
        return first * self.block + self.start - self.left, last * self.block + self.start + self.right

    def is_plain(self, first: int, last: int) -> bool:
        """Whether no key of these blocks lies off either end, so that one mask serves them all."""
        begin, end = self.ends(first, last)
        return begin >= 0 and end <= self.num_keys

    def stretch(self, first: int, last: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """((begin, end), (before, after)): what there is of the keys of a range, and how many are missing around it."""
        begin, end = self.ends(first, last)
        there = min(max(begin, 0), self.num_keys)
        stop = max(min(end, self.num_keys), there)
        before = max(there - begin, 0)
        return (there, stop), (before, end - begin - before - (stop - there))

    def band(self, first: int, last: int, device: torch.device) -> torch.Tensor:
        """Keys the rows of a range of blocks see, bool [1, blocks, block, span], one block where the range is plain."""
        stop = first + 1 if self.is_plain(first, last) else last
        starts = torch.arange(first, stop, device=device)[:, None, None] * self.block + self.start
        rows = starts + torch.arange(self.block, device=device)[:, None]
        cols = starts - self.left + torch.arange(self.span, device=device)  # [blocks, 1, span]
        return ((cols >= rows - self.left) & (cols <= rows + self.right) & (cols >= 0) & (cols < self.num_keys))[None]

    def of_keys(self, valid: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """What the blocks of a range touch of a key mask [P, K]: [P, blocks, 1, span], False where there is no key."""
        (begin, end), pad = self.stretch(first, last)
        return F.pad(valid[:, begin:end], pad).unfold(1, self.span, self.block)[:, :, None]

    def own(self, device: torch.device) -> torch.Tensor:
        """The place of each row itself, bool [block, span]."""
        rows = torch.arange(self.block, device=device)[:, None]
        return torch.arange(self.span, device=device) == rows + self.left


class GlobalColumns(NamedTuple):
    """Global keys beside the windows of P = B * classes * H problems, which stand in this order.

    key, value [B * H, G, D], zeros at pads; position [B, G] int64, -1 pads. Row n of class c stands at position
    first_row + c + n * dilation.
    """

    key: torch.Tensor
    value: torch.Tensor
    position: torch.Tensor
    first_row: int
    dilation: int
    num_classes: int
    num_heads: int
    causal: bool

    @classmethod
    def of(cls, key, value, position, first_row, dilation, num_classes, causal) -> "GlobalColumns":
        """The columns of heads whose global keys and values are [B, G, H, D]."""
        num_heads = key.shape[2]
        key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (key, value))
        return cls(key, value, position, first_row, dilation, num_classes, num_heads, causal)

    def of_problems(self, problems: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, [p, G, D] each, of some of the problems, given by number [p]."""
        source = problems // (self.num_classes * self.num_heads) * self.num_heads + problems % self.num_heads
        # classes share them: of the two, the one whose backward pass adds up in a fixed order on this device
        if self.key.is_cuda:
            return self.key[source], self.value[source]
        return self.key.index_select(0, source), self.value.index_select(0, source)

    def seen(self, problems: torch.Tensor, first: int, last: int, left: int, right: int) -> torch.Tensor:
        """Bool [p, N, G]: columns that the rows [first, last) of some problems see, given by number [p].

        A key within `left` or `right` steps of a row's own place is one of its window already.
        """
        position = self.position[problems // (self.num_classes * self.num_heads)]  # [p, G]
        offset = position - self.first_row - (problems // self.num_heads % self.num_classes)[:, None]
        step = torch.div(offset, self.dilation, rounding_mode="floor")
        in_class = (step * self.dilation == offset)[:, None]  # [p, 1, G]
        rows = torch.arange(first, last, dtype=torch.int32, device=position.device)[:, None]
        lag = rows - step.int()[:, None]  # [p, N, G], steps from the key to the row
        seen = (position >= 0)[:, None] & ~(in_class & (lag <= left) & (lag >= -right))
        # a key between two tokens of the class comes after the first of them
        return seen & (lag >= (~in_class).int()) if self.causal else seen


class Dropout(NamedTuple):
    """Which probabilities stay, in P = B * classes * H problems, which stand in this order.

    head: int64 [H], of all `num_heads` those that are computed together. Row n of class c stands at position first_row
    + c + n * dilation of the text, key k of it at first_key + c + k * dilation.
    """

    probability: float
    seed: torch.Tensor
    head: torch.Tensor
    num_heads: int
    first_row: int = 0
    first_key: int = 0
    dilation: int = 1
    num_classes: int = 1

    def kept(
        self, problems: torch.Tensor, blocks: Blocks, first: int, last: int, position: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Bool [p, blocks, block, span] of the keys that a range of blocks touches, some of the problems by number [p].

        And [p, blocks, block, G] of the global keys at `position` [B, G], if there are any.
        """
        device, group = problems.device, len(self.head)
        example, own_class = problems // (self.num_classes * group), problems // group % self.num_classes
        batch_head = (example * self.num_heads + self.head[problems % group])[:, None, None, None]
        own_class = own_class[:, None, None, None]
        starts = torch.arange(first, last, device=device)[:, None, None] * blocks.block  # [blocks, 1, 1]
        steps = starts + torch.arange(blocks.block, device=device)[:, None]
        rows = self.first_row + own_class + steps * self.dilation  # [p, blocks, block, 1]
        steps = starts + blocks.start - blocks.left + torch.arange(blocks.span, device=device)
        keys = self.first_key + own_class + steps * self.dilation  # [p, blocks, 1, span]
        kept = keep_mask(self.seed, batch_head, rows, keys, self.probability)
        if position is None:
            return kept, None
        return kept, keep_mask(self.seed, batch_head, rows, position[example][:, None, None], self.probability)


class Stretches(torch.autograd.Function):
    """[P, L, D] -> a view of each stretch of rows, which may overlap; the backward adds their gradients up."""

    @staticmethod
    def forward(ctx, padded, stretches):
        ctx.shape, ctx.stretches = padded.shape, stretches
        return tuple(padded[:, first:last] for first, last in stretches)

    @staticmethod
    def backward(ctx, *grads):
        total = grads[0].new_zeros(ctx.shape)
        for (first, last), grad in zip(ctx.stretches, grads, strict=True):
            total[:, first:last] += grad
        return total, None


class OverlappingBlocks(torch.autograd.Function):
    """[P, L, D] -> a view [P, blocks, span, D], starts `block` apart; the backward adds shifted slices."""

    @staticmethod
    def forward(ctx, rows, block, span):
        ctx.shape, ctx.block = rows.shape, block
        return rows.unfold(1, span, block).transpose(-1, -2)

    @staticmethod
    def backward(ctx, grad):
        num_problems, num_blocks, span, dim = grad.shape
        pieces = -(-span // ctx.block)
        total = grad.new_zeros(num_problems, num_blocks - 1 + pieces, ctx.block, dim)
        for piece in range(pieces):
            part = grad[:, :, piece * ctx.block : (piece + 1) * ctx.block]
            total[:, piece : piece + num_blocks, : part.shape[2]] += part
        return total.flatten(1, 2)[:, : ctx.shape[1]], None, None


def skew(columns: torch.Tensor, span: int) -> torch.Tensor:
    """[…, block, columns] by distance -> […, block, span] by key: row i shifts right by i."""
    block, width = columns.shape[-2:]
    padded = F.pad(columns, (0, span + 1 - width)).flatten(-2)
    return padded[..., : block * span].unflatten(-1, (block, span))
