"""Window attention in plain PyTorch with memory linear in the length: blocks of queries, overlapping views of keys.

Heads with the same window and dilation are computed together. A dilation d splits the sequence into its d residue
classes, each an undilated window problem on every d-th token, so a dilated head costs what an undilated one does.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels.window_attention.pattern import WindowPattern

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
) -> torch.Tensor:
    """As `reference.window_attention`, in time and memory linear in T.

    Nothing of T x T is made, and of T x window at most KEEP_BYTES a group of heads is kept for the backward pass.
    """
    batch, seq_len, num_heads, head_dim = query.shape
    kinds = list(zip(pattern.window, pattern.dilation, strict=True))
    # heads of one window and dilation together, in parts whose overlapping keys (about five copies) fit CHUNK_BYTES;
    # split and concatenated by head, inputs, results and gradients are written once, in the layout they come in
    order = sorted(range(num_heads), key=lambda head: kinds.index(kinds[head]))
    most = max(1, CHUNK_BYTES // (5 * batch * seq_len * head_dim * query.element_size()))
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
            valid,
            window=window,
            dilation=dilation,
            causal=pattern.causal,
            scale=scale,
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


def _head_group(query, key, value, position_query, position_key, valid, *, window, dilation, causal, scale):
    """Heads of one window and dilation, [B, T, H, D] -> [B, T, H, D]."""
    batch, seq_len, num_heads, _ = query.shape
    dilation = min(dilation, seq_len)  # a larger one leaves each token alone in its class too
    if valid is not None:
        valid = valid[:, :, None, None].expand(-1, -1, num_heads, 1)
    by_name = {"query": query, "key": key, "value": value, "position_query": position_query, "valid": valid}
    split = {name: _split_residues(tensor, dilation) for name, tensor in by_name.items() if tensor is not None}
    outputs = []
    for group in range(len(split["query"])):
        # [P, N, D] with P = B * classes * H problems of one length
        problems = _Problems(**{name: groups[group].flatten(0, 2) for name, groups in split.items()})
        steps = min(window, problems.query.shape[1] - 1)  # what a window sees beyond the ends does not exist
        if position_key is not None:
            columns = position_key[:, window - steps : window + 1 + (0 if causal else steps)]
            problems = problems._replace(position_key=columns.repeat(len(problems.query) // num_heads, 1, 1))
        out = _windows(problems, steps, 0 if causal else steps, scale)
        outputs.append(out.view(batch, -1, num_heads, *out.shape[1:]))
    return _join_residues(outputs, seq_len, dilation)


def _split_residues(tensor, dilation):
    """[B, T, H, D] -> [[B, classes, H, N, D], …]: the classes one token longer than the rest come first."""
    if dilation == 1:
        return [tensor.transpose(1, 2)[:, None]]
    batch, seq_len, num_heads, dim = tensor.shape
    length, remainder = divmod(seq_len, dilation)
    main = tensor[:, : length * dilation].reshape(batch, length, dilation, num_heads, dim)
    groups = [main]
    if remainder:
        last = tensor[:, None, length * dilation :]
        groups = [torch.cat([main[:, :, :remainder], last], dim=1), main[:, :, remainder:]]
    return [group.permute(0, 2, 3, 1, 4) for group in groups]


def _join_residues(groups, seq_len, dilation):
    """Inverse of `_split_residues`."""
    if dilation == 1:
        return groups[0][:, 0].transpose(1, 2)
    length = seq_len // dilation
    main = torch.cat([group[..., :length, :] for group in groups], dim=1)  # [B, d, H, N, D]
    main = main.permute(0, 3, 1, 2, 4).flatten(1, 2)
    if seq_len % dilation == 0:
        return main
    return torch.cat([main, groups[0][..., length, :]], dim=1)


class _Problems(NamedTuple):
    """P independent problems of one length N: [P, N, D] each, position_key [P, columns, D], valid bool [P, N, 1]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    position_query: torch.Tensor | None = None
    position_key: torch.Tensor | None = None
    valid: torch.Tensor | None = None

    def split(self, size):
        """The same in parts of at most `size` problems."""
        parts = [(None,) * -(-len(self.query) // size) if t is None else t.split(size) for t in self]
        return [_Problems(*part) for part in zip(*parts, strict=True)]


@dataclass(frozen=True)
class _Blocks:
    """Blocks of queries over a sequence; each touches `span` keys, from `left` before its first row."""

    seq_len: int
    left: int
    right: int
    block: int

    @property
    def num_blocks(self):
        return -(-self.seq_len // self.block)

    @property
    def tail(self):
        """Rows the last block has beyond the sequence."""
        return self.num_blocks * self.block - self.seq_len

    @property
    def span(self):
        return self.left + self.block + self.right

    def ranges(self, most):
        """Blocks by mask, at most `most` together: at the start, with the plain band, at the end."""
        first = min(-(-self.left // self.block), self.num_blocks)
        last = min(max(first, (self.seq_len - self.right) // self.block), self.num_blocks)
        bounds = {0, first, last, self.num_blocks}
        for start, stop in ((0, first), (first, last), (last, self.num_blocks)):
            bounds.update(range(start, stop, most))
        bounds = sorted(bounds)
        return list(zip(bounds, bounds[1:], strict=False))

    def is_plain(self, first, last):
        """Whether no key of these blocks lies off either end, so that one mask serves them all."""
        return first * self.block >= self.left and last * self.block + self.right <= self.seq_len

    def band(self, first, last, like):
        """Additive mask [1, blocks or 1, block, span] of a range of blocks: 0 where a key is seen, -inf elsewhere."""
        stop = first + 1 if self.is_plain(first, last) else last
        starts = torch.arange(first, stop, device=like.device)[:, None, None] * self.block
        rows = starts + torch.arange(self.block, device=like.device)[:, None]
        cols = starts - self.left + torch.arange(self.span, device=like.device)  # [blocks, 1, span]
        seen = (cols >= rows - self.left) & (cols <= rows + self.right) & (cols >= 0) & (cols < self.seq_len)
        seen |= cols == rows  # rows past the end see their own zeros: a row without keys has no softmax
        return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))[None]


def _windows(problems, left, right, scale):
    """Undilated windows: problems of length N -> [P, N, D]."""
    num_problems, seq_len, head_dim = problems.query.shape
    blocks = _Blocks(seq_len, left, right, _block_size(seq_len, left + right, _explicit(problems)))
    element = problems.query.element_size()
    bytes_per_block = blocks.span * head_dim * element
    chunk = max(1, min(num_problems, CHUNK_BYTES // (blocks.num_blocks * bytes_per_block)))
    ranges = blocks.ranges(max(1, CHUNK_BYTES // (chunk * bytes_per_block)))
    scores_bytes = num_problems * blocks.num_blocks * blocks.block * blocks.span * element
    # scores, or masks that differ from row to row: what autograd would hold beside inputs and outputs
    kept = _explicit(problems) or problems.valid is not None or blocks.num_blocks < 2 * (left + right) // blocks.block
    recompute = kept and scores_bytes > KEEP_BYTES and torch.is_grad_enabled()
    outputs = []
    for part in problems.split(chunk):
        if recompute:
            outputs.append(checkpoint(_attend_blocks, part, blocks, ranges, scale, use_reentrant=False))
        else:
            outputs.append(_attend_blocks(part, blocks, ranges, scale))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _block_size(seq_len, reach, explicit):
    """Queries a block, a power of two: small blocks compute fewer masked scores, large ones multiply faster.

    SDPA is at its best with a quarter of the keys a query sees, explicit scores with half of them (docs/LOG.md).
    """
    aim = reach // (2 if explicit else 4)
    return min(seq_len, max(64, min(256, 1 << max(aim - 1, 1).bit_length())))


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
    ends = [(first * blocks.block - blocks.left, last * blocks.block + blocks.right) for first, last in ranges]
    stretches = [(max(start, 0), min(stop, blocks.seq_len)) for start, stop in ends]
    pads = [(0, 0, a - start, stop - b) for (start, stop), (a, b) in zip(ends, stretches, strict=True)]
    key_parts, value_parts = (_Stretches.apply(tensor, stretches) for tensor in (problems.key, problems.value))
    outputs, plain = [], None
    for (first, last), pad, keys, values in zip(ranges, pads, key_parts, value_parts, strict=True):
        keys = _OverlappingBlocks.apply(F.pad(keys, pad), blocks.block, blocks.span)  # [P, blocks, span, D]
        values = _OverlappingBlocks.apply(F.pad(values, pad), blocks.block, blocks.span)
        if blocks.is_plain(first, last):
            mask = plain = blocks.band(first, last, problems.query) if plain is None else plain
        else:
            mask = blocks.band(first, last, problems.query)
        if problems.valid is not None:
            mask = _mask_invalid(mask, problems.valid[..., 0], first, last, blocks)
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
    out = out.flatten(1, 2)[:, : blocks.seq_len]
    return out if problems.valid is None else out.masked_fill(~problems.valid, 0.0)


def _explicit(problems):
    """Whether scores are computed in the open: SDPA has no gradient for a bias on its fused path, and in half
    precision its backward pass takes two to three times as long on a CPU.
    """
    half = problems.query.dtype in (torch.bfloat16, torch.float16)
    return problems.position_query is not None or (half and problems.query.device.type == "cpu")


def _mask_invalid(mask, valid, first, last, blocks):
    """Add the key mask [P, N] to a band: [P, blocks, block, span]. A row keeps its own key, for a softmax needs one."""
    keys = F.pad(valid, (blocks.left, blocks.right + blocks.tail)).unfold(1, blocks.span, blocks.block)
    row = torch.arange(blocks.block, device=valid.device)[:, None]
    own = torch.arange(blocks.span, device=valid.device) == row + blocks.left
    return mask.masked_fill(~(keys[:, first:last, None] | own), float("-inf"))


def _skew(columns, span):
    """[…, block, columns] by distance -> […, block, span] by key: row i shifts right by i."""
    block, width = columns.shape[-2:]
    padded = F.pad(columns, (0, span + 1 - width)).flatten(-2)
    return padded[..., : block * span].unflatten(-1, (block, span))
