"""Window attention in plain PyTorch with memory linear in the length: blocks of queries, overlapping views of keys.

Heads with the same window and dilation are computed together, dilated ones by residue classes (`residues`), so that
they cost what undilated ones do.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels.window_attention.pattern import WindowPattern, valid_rows
from kernels.window_attention.residues import join_residues, residue_ranges

# bytes of overlapping keys (the gradient of the view, a real copy) that one SDPA call may cause
CHUNK_BYTES = 16 * 2**20
# bytes of explicit scores or masks kept for the backward pass; beyond it they are made again, a chunk at a time
KEEP_BYTES = 256 * 2**20


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    pattern: WindowPattern,
    scale: float,
    valid: torch.Tensor | None = None,
    position_query: torch.Tensor | None = None,
    position_key: torch.Tensor | None = None,
    query_start: int = 0,
) -> torch.Tensor:
    """As `reference.window_attention`, in time and memory linear in T, however many keys there are.

    Nothing of T x S is made, and of T x window at most KEEP_BYTES a group of heads is kept for the backward pass.
    """
    batch, seq_len, num_heads, head_dim = query.shape
    row_valid = valid_rows(valid, query_start, seq_len)
    first, last = _reachable(pattern.reach, pattern.causal, seq_len, key.shape[1], query_start)
    key, value = key[:, first:last], value[:, first:last]
    key_valid = None if valid is None else valid[:, first:last]
    kinds = list(zip(pattern.window, pattern.dilation, strict=True))
    # heads of one window and dilation together, in parts whose overlapping keys (about five copies) fit CHUNK_BYTES;
    # split and concatenated by head, inputs, results and gradients are written once, in the layout they come in
    order = sorted(range(num_heads), key=lambda head: kinds.index(kinds[head]))
    longest = max(seq_len, key.shape[1])
    most = max(1, CHUNK_BYTES // (5 * batch * longest * head_dim * query.element_size()))
    parts = [part for _, group in groupby(order, key=lambda head: kinds[head]) for part in _parts(list(group), most)]
    repeats = num_heads // key.shape[2]
    sizes = [len(part) for part in parts]
    queries, positions = (_by_head(tensor, order, sizes) for tensor in (query, position_query))
    keys, values = (_by_head(tensor, [head // repeats for head in order], sizes) for tensor in (key, value))
    outputs = []
    for index, part in enumerate(parts):
        window, dilation = kinds[part[0]]
        out = _head_group(
            queries[index],
            keys[index],
            values[index],
            positions[index],
            None if position_key is None else position_key[part],
            row_valid,
            key_valid,
            window=window,
            dilation=dilation,
            causal=pattern.causal,
            scale=scale,
            query_start=query_start - first,
        )
        outputs.append(out)
    out = torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]
    if order == list(range(num_heads)):
        return out
    return out[:, :, torch.tensor(order, device=out.device).argsort()]


def _parts(heads, most):
    return [heads[first : first + most] for first in range(0, len(heads), most)]


def _by_head(tensor, heads, sizes):
    """[B, T, H, D] -> its heads in an order, in parts of these sizes; one None a part where there is no tensor."""
    if tensor is None:
        return [None] * len(sizes)
    if heads != list(range(tensor.shape[2])):
        tensor = tensor[:, :, heads]
    return tensor.split(sizes, dim=2)


def _reachable(reach, causal, seq_len, num_keys, query_start):
    """(first, last) of the keys that any of the rows can see: the others are sliced away before anything is made."""
    last = query_start + seq_len + (0 if causal else reach)
    return min(max(0, query_start - reach), num_keys), min(last, num_keys)


def _head_group(
    query,
    key,
    value,
    position_query,
    position_key,
    row_valid,
    key_valid,
    *,
    window,
    dilation,
    causal,
    scale,
    query_start,
):
    """Heads of one window and dilation: T rows and S keys, [B, T, H, D] -> [B, T, H, D]."""
    batch, seq_len, num_heads, _ = query.shape
    first, last = _reachable(window * dilation, causal, seq_len, key.shape[1], query_start)
    start = query_start - first
    # a dilation beyond every distance leaves each row its own key alone, whatever it is
    dilation = min(dilation, max(start + seq_len, last - first))
    rows = {"query": query, "position_query": position_query, "row_valid": _head_mask(row_valid, num_heads)}
    keys = {"key": key, "value": value, "key_valid": _head_mask(key_valid, num_heads)}
    rows = {name: tensor for name, tensor in rows.items() if tensor is not None}
    keys = {name: tensor[:, first:last] for name, tensor in keys.items() if tensor is not None}
    outputs = []
    for residues in residue_ranges(seq_len, last - first, start, dilation):
        split = {name: residues.rows_of(tensor) for name, tensor in rows.items()}
        split |= {name: residues.keys_of(tensor) for name, tensor in keys.items()}
        # [P, N, D] and [P, K, D] with P = B * classes * H problems of one size
        problems = _Problems(**{name: tensor.flatten(0, 2) for name, tensor in split.items()})
        # what a window sees beyond the ends does not exist
        left = min(window, residues.start + residues.num_rows - 1)
        right = 0 if causal else min(window, max(residues.num_keys - 1 - residues.start, 0))
        if position_key is not None:
            columns = position_key[:, window - left : window + 1 + right]
            problems = problems._replace(position_key=columns.repeat(len(problems.query) // num_heads, 1, 1))
        out = _windows(problems, residues.start, left, right, scale)
        outputs.append(out.view(batch, -1, num_heads, *out.shape[1:]))
    return join_residues(outputs, seq_len)


def _head_mask(valid, num_heads):
    """[B, S] -> [B, S, H, 1]."""
    return None if valid is None else valid[:, :, None, None].expand(-1, -1, num_heads, 1)


class _Problems(NamedTuple):
    """P independent problems of N rows and K keys.

    query, position_query [P, N, D]; key, value [P, K, D]; position_key [P, columns, D]; row_valid bool [P, N, 1],
    key_valid [P, K, 1].
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    position_query: torch.Tensor | None = None
    position_key: torch.Tensor | None = None
    row_valid: torch.Tensor | None = None
    key_valid: torch.Tensor | None = None

    def split(self, size):
        """The same in parts of at most `size` problems."""
        parts = [(None,) * -(-len(self.query) // size) if t is None else t.split(size) for t in self]
        return [_Problems(*part) for part in zip(*parts, strict=True)]

    def zeros(self):
        """The result where there is no key: zeros, with zero gradients of every input."""
        empty = (self.query, self.key, self.value, self.position_query, self.position_key)
        return torch.zeros_like(self.query) + sum(tensor[:0].sum() for tensor in empty if tensor is not None)


@dataclass(frozen=True)
class _Blocks:
    """Blocks of rows, row i standing at key `start + i`; each touches `span` keys, from `left` before its first row."""

    num_rows: int
    num_keys: int
    start: int
    left: int
    right: int
    block: int

    @property
    def num_blocks(self):
        return -(-self.num_rows // self.block)

    @property
    def tail(self):
        """Rows the last block has beyond the last row."""
        return self.num_blocks * self.block - self.num_rows

    @property
    def span(self):
        return self.left + self.block + self.right

    def ranges(self, most):
        """Blocks by mask, at most `most` together: at the start, with the plain band, at the end."""
        first = min(max(-(-(self.left - self.start) // self.block), 0), self.num_blocks)
        last = min(max(first, (self.num_keys - self.right - self.start) // self.block), self.num_blocks)
        bounds = {0, first, last, self.num_blocks}
        for start, stop in ((0, first), (first, last), (last, self.num_blocks)):
            bounds.update(range(start, stop, most))
        bounds = sorted(bounds)
        return list(zip(bounds, bounds[1:], strict=False))

    def ends(self, first, last):
        """(begin, end) of the keys that a range of blocks touches; some may lie off either end of the sequence."""
        return first * self.block + self.start - self.left, last * self.block + self.start + self.right

    def is_plain(self, first, last):
        """Whether no key of these blocks lies off either end, so that one mask serves them all."""
        begin, end = self.ends(first, last)
        return begin >= 0 and end <= self.num_keys

    def stretch(self, first, last):
        """((begin, end), (before, after)): what there is of the keys of a range, and how many are missing around it."""
        begin, end = self.ends(first, last)
        there = min(max(begin, 0), self.num_keys)
        stop = max(min(end, self.num_keys), there)
        before = max(there - begin, 0)
        return (there, stop), (before, end - begin - before - (stop - there))

    def band(self, first, last, like):
        """Additive mask [1, blocks or 1, block, span] of a range of blocks: 0 where a key is seen, -inf elsewhere."""
        stop = first + 1 if self.is_plain(first, last) else last
        starts = torch.arange(first, stop, device=like.device)[:, None, None] * self.block + self.start
        rows = starts + torch.arange(self.block, device=like.device)[:, None]
        cols = starts - self.left + torch.arange(self.span, device=like.device)  # [blocks, 1, span]
        seen = (cols >= rows - self.left) & (cols <= rows + self.right) & (cols >= 0) & (cols < self.num_keys)
        # a row so far past the end that it sees no key sees its own zeros: without keys there is no softmax
        seen |= (cols == rows) & (rows - self.left >= self.num_keys)
        return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))[None]


def _windows(problems, start, left, right, scale):
    """Undilated windows, row i at key `start + i`: problems of N rows -> [P, N, D]."""
    num_problems, num_rows, head_dim = problems.query.shape
    if not problems.key.shape[1]:
        return problems.zeros()
    block = _block_size(num_rows, left + right, _explicit(problems))
    blocks = _Blocks(num_rows, problems.key.shape[1], start, left, right, block)
    element = problems.query.element_size()
    bytes_per_block = blocks.span * head_dim * element
    chunk = max(1, min(num_problems, CHUNK_BYTES // (blocks.num_blocks * bytes_per_block)))
    ranges = blocks.ranges(max(1, CHUNK_BYTES // (chunk * bytes_per_block)))
    scores_bytes = num_problems * blocks.num_blocks * blocks.block * blocks.span * element
    # scores, or masks that differ from row to row: what autograd would hold beside inputs and outputs
    masked = problems.key_valid is not None
    kept = _explicit(problems) or masked or blocks.num_blocks < 2 * (left + right) // blocks.block
    recompute = kept and scores_bytes > KEEP_BYTES and torch.is_grad_enabled()
    outputs = []
    for part in problems.split(chunk):
        if recompute:
            outputs.append(checkpoint(_attend_blocks, part, blocks, ranges, scale, use_reentrant=False))
        else:
            outputs.append(_attend_blocks(part, blocks, ranges, scale))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _block_size(num_rows, reach, explicit):
    """Rows a block, a power of two: small blocks compute fewer masked scores, large ones multiply faster.

    SDPA is at its best with a quarter of the keys a query sees, explicit scores with half of them (docs/LOG.md).
    """
    aim = reach // (2 if explicit else 4)
    return min(num_rows, max(64, min(256, 1 << max(aim - 1, 1).bit_length())))


class _Stretches(torch.autograd.Function):
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


class _OverlappingBlocks(torch.autograd.Function):
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


def _attend_blocks(problems, blocks, ranges, scale):
    """Some of the problems, one range of blocks at a time: [P, N, D]."""
    rows_pad = (0, 0, 0, blocks.tail)
    # without a tail F.pad would copy
    query = F.pad(problems.query, rows_pad) if blocks.tail else problems.query
    query = query.unflatten(1, (-1, blocks.block))  # [P, blocks, block, D]
    # a stretch of keys a range: the gradient of its overlapping copies is folded before the next one's is made
    stretches, pads = zip(*(blocks.stretch(first, last) for first, last in ranges), strict=True)
    key_parts, value_parts = (_Stretches.apply(tensor, stretches) for tensor in (problems.key, problems.value))
    outputs, plain = [], None
    for (first, last), pad, keys, values in zip(ranges, pads, key_parts, value_parts, strict=True):
        keys = _OverlappingBlocks.apply(F.pad(keys, (0, 0, *pad)), blocks.block, blocks.span)  # [P, blocks, span, D]
        values = _OverlappingBlocks.apply(F.pad(values, (0, 0, *pad)), blocks.block, blocks.span)
        if blocks.is_plain(first, last):
            mask = plain = blocks.band(first, last, problems.query) if plain is None else plain
        else:
            mask = blocks.band(first, last, problems.query)
        if problems.key_valid is not None:
            mask = _mask_invalid(mask, problems.key_valid[..., 0], first, last, blocks)
        rows = query[:, first:last]
        if not _explicit(problems):
            outputs.append(F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale))
            continue
        scores = (rows * scale) @ keys.transpose(-1, -2) + mask  # [P, blocks, block, span]
        if problems.position_query is not None:
            rows = F.pad(problems.position_query, rows_pad).unflatten(1, (-1, blocks.block))[:, first:last] * scale
            scores = scores + _skew(rows @ problems.position_key[:, None].transpose(-1, -2), blocks.span)
        outputs.append(torch.softmax(scores, dim=-1) @ values)
    out = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
    out = out.flatten(1, 2)[:, : blocks.num_rows]
    return out if problems.row_valid is None else out.masked_fill(~problems.row_valid, 0.0)


def _explicit(problems):
    """Whether scores are computed in the open: SDPA has no gradient for a bias on its fused path, and in half
    precision its backward pass takes two to three times as long on a CPU.
    """
    half = problems.query.dtype in (torch.bfloat16, torch.float16)
    return problems.position_query is not None or (half and problems.query.device.type == "cpu")


def _mask_invalid(mask, valid, first, last, blocks):
    """Add the key mask [P, K] to a band: [P, blocks, block, span]. A row left without a key sees its own place: a
    softmax needs one, and there lie zeros, or the row is not valid either.
    """
    (begin, end), pad = blocks.stretch(first, last)
    keys = F.pad(valid[:, begin:end], pad).unfold(1, blocks.span, blocks.block)
    mask = mask.masked_fill(~keys[:, :, None], float("-inf"))
    row = torch.arange(blocks.block, device=valid.device)[:, None]
    own = torch.arange(blocks.span, device=valid.device) == row + blocks.left
    return mask.masked_fill(own & mask.isinf().all(dim=-1, keepdim=True), 0.0)


def _skew(columns, span):
    """[…, block, columns] by distance -> […, block, span] by key: row i shifts right by i."""
    block, width = columns.shape[-2:]
    padded = F.pad(columns, (0, span + 1 - width)).flatten(-2)
    return padded[..., : block * span].unflatten(-1, (block, span))
