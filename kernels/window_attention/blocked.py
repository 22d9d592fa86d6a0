"""Window attention in plain PyTorch with memory linear in the length: blocks of queries, overlapping views of keys.

Heads with the same window and dilation are computed together. A dilation d splits the sequence into its d residue
classes, each an undilated window problem on every d-th token, so a dilated head costs what an undilated one does.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels.window_attention.pattern import WindowPattern

# bytes of overlapping keys (the gradient of the view, a real copy) that one SDPA call may cause: bounds the extra memory
CHUNK_BYTES = 16 * 2**20


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
    """As `reference.window_attention`, in time and memory linear in T: nothing of T x T or T x window is kept."""
    groups: dict[tuple[int, int], list[int]] = {}
    for head, kind in enumerate(zip(pattern.window, pattern.dilation, strict=True)):
        groups.setdefault(kind, []).append(head)
    repeats = query.shape[2] // key.shape[2]
    outputs = []
    for (window, dilation), heads in groups.items():
        key_heads = [head // repeats for head in heads]
        out = _head_group(
            _take_heads(query, heads),
            _take_heads(key, key_heads),
            _take_heads(value, key_heads),
            None if position_query is None else _take_heads(position_query, heads),
            None if position_key is None else position_key[heads],
            valid,
            window=window,
            dilation=dilation,
            causal=pattern.causal,
            scale=scale,
        )
        outputs.append(out)
    if len(outputs) == 1:
        return outputs[0]
    order = sum(groups.values(), [])
    if order == sorted(order):
        return torch.cat(outputs, dim=2)
    return torch.cat(outputs, dim=2)[:, :, torch.tensor(order, device=query.device).argsort()]


def _take_heads(tensor, heads):
    """Heads of [B, T, H, D]: a view where they are neighbours, a gathered copy otherwise."""
    if heads == list(range(heads[0], heads[0] + len(heads))):
        return tensor[:, :, heads[0] : heads[0] + len(heads)]
    return tensor[:, :, heads]


def _head_group(query, key, value, position_query, position_key, valid, *, window, dilation, causal, scale):
    """Heads of one window and dilation, [B, T, H, D] -> [B, T, H, D]."""
    batch, seq_len, num_heads, _ = query.shape
    dilation = min(dilation, seq_len)  # a larger one leaves each token alone in its class too
    inputs = [query, key, value]
    if position_query is not None:
        inputs.append(position_query)
    if valid is not None:
        inputs.append(valid[:, :, None, None].expand(-1, -1, num_heads, 1))
    # a list of one or two groups of residue classes, equal in length within a group
    grouped = zip(*(_split_residues(tensor, dilation) for tensor in inputs), strict=True)
    outputs = []
    for group in grouped:
        problems = [tensor.flatten(0, 2) for tensor in group]  # [P, N, D], P = B * classes * H
        query, key, value, *rest = problems
        steps = min(window, query.shape[1] - 1)  # what a window sees beyond the ends does not exist
        valid_rows = rest.pop()[..., 0] if valid is not None else None
        columns = None
        if position_query is not None:
            columns = position_key[:, window - steps : window + 1 + (0 if causal else steps)]
            columns = columns.repeat(query.shape[0] // num_heads, 1, 1)  # [P, columns, D]
            rest = rest[0]
        out = _windows(
            query, key, value, rest if columns is not None else None, columns, valid_rows, steps, causal, scale
        )
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


def _windows(query, key, value, position_query, position_key, valid, window, causal, scale):
    """Undilated windows over P independent problems: [P, N, D] -> [P, N, D]."""
    num_problems, seq_len, head_dim = query.shape
    right = 0 if causal else window
    block = _block_size(seq_len, window, right)
    num_blocks = -(-seq_len // block)
    tail = num_blocks * block - seq_len
    span = block + window + right  # keys a block of queries touches
    pad = (0, 0, window, right + tail)
    key, value = F.pad(key, pad), F.pad(value, pad)
    if tail:
        query = F.pad(query, (0, 0, 0, tail))
        position_query = None if position_query is None else F.pad(position_query, (0, 0, 0, tail))
        valid = None if valid is None else F.pad(valid, (0, tail))

    ranges = _block_ranges(seq_len, window, right, block, num_blocks)
    masks = [_band(first, last, seq_len, window, right, block, query) for first, last in ranges]
    per_problem = num_blocks * span * head_dim * query.element_size()
    chunk = max(1, min(num_problems, CHUNK_BYTES // per_problem))
    optional = [tensor.split(chunk) if tensor is not None else None for tensor in (position_query, position_key, valid)]
    outputs = []
    for index, parts in enumerate(zip(query.split(chunk), key.split(chunk), value.split(chunk), strict=True)):
        extras = [None if pieces is None else pieces[index] for pieces in optional]
        if position_query is None:
            out = _attend_blocks(*parts, *extras, ranges, masks, block, window, span, scale)
        else:  # scores with a gradient of their own leave the fused path: do not keep them for the backward pass
            out = checkpoint(
                _attend_blocks, *parts, *extras, ranges, masks, block, window, span, scale, use_reentrant=False
            )
        outputs.append(out)
    out = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return out[:, :seq_len]


def _block_size(seq_len, window, right):
    """Queries a block: near the window keeps the masked share of the score tile near a half."""
    reach = window + right
    if seq_len <= 64:
        return seq_len
    return min(seq_len, max(32, min(256, 1 << max(reach // 2 - 1, 1).bit_length())))


def _block_ranges(seq_len, window, right, block, num_blocks):
    """Blocks by mask: those that touch the start, those that need the plain band alone, those that touch the end."""
    first = min(-(-window // block), num_blocks)
    last = max(first, (seq_len - right) // block)
    bounds = sorted({0, first, min(last, num_blocks), num_blocks})
    return list(zip(bounds, bounds[1:], strict=False))


def _band(first, last, seq_len, window, right, block, like):
    """Additive mask [1, blocks or 1, block, span] of a range of blocks: 0 where a key is seen, -inf elsewhere."""
    interior = first * block >= window and last * block + right <= seq_len
    starts = torch.arange(first, first + 1 if interior else last, device=like.device)[:, None, None] * block
    rows = starts + torch.arange(block, device=like.device)[:, None]
    cols = starts - window + torch.arange(block + window + right, device=like.device)  # [blocks, 1, span]
    seen = (cols >= rows - window) & (cols <= rows + right) & (cols >= 0) & (cols < seq_len)
    seen |= cols == rows  # rows past the end see their own zeros: a row without keys has no softmax
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))[None]


class _OverlappingBlocks(torch.autograd.Function):
    """[P, L, D] -> one view [P, blocks, span, D] a range, starts `block` apart; the backward adds shifted slices."""

    @staticmethod
    def forward(ctx, padded, ranges, block, span):
        ctx.shape, ctx.ranges, ctx.block, ctx.span = padded.shape, ranges, block, span
        problem, row, column = padded.stride()
        views = []
        for first, last in ranges:
            size = (padded.shape[0], last - first, span, padded.shape[2])
            offset = padded.storage_offset() + first * block * row
            views.append(padded.as_strided(size, (problem, block * row, row, column), offset))
        return tuple(views)

    @staticmethod
    def backward(ctx, *grads):
        num_problems, length, dim = ctx.shape
        block, pieces = ctx.block, -(-ctx.span // ctx.block)
        num_blocks = ctx.ranges[-1][1]
        total = grads[0].new_zeros(num_problems, num_blocks - 1 + pieces, block, dim)
        for (first, last), grad in zip(ctx.ranges, grads, strict=True):
            for piece in range(pieces):
                part = grad[:, :, piece * block : (piece + 1) * block]
                total[:, first + piece : last + piece, : part.shape[2]] += part
        return total.flatten(1, 2)[:, :length], None, None, None


def _attend_blocks(query, key, value, position_query, position_key, valid, ranges, masks, block, window, span, scale):
    """[P, blocks * block, D] queries against padded keys and values; one SDPA call a range."""
    num_problems, _, head_dim = query.shape
    query = query.view(num_problems, -1, block, head_dim)
    key_views = _OverlappingBlocks.apply(key, ranges, block, span)
    value_views = _OverlappingBlocks.apply(value, ranges, block, span)
    outputs = []
    for (first, last), mask, keys, values in zip(ranges, masks, key_views, value_views, strict=True):
        if valid is not None:
            mask = _mask_invalid(mask, valid, first, last, block, window, span)
        queries = query[:, first:last]
        if position_query is None:
            out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
        else:
            rows = position_query.view(num_problems, -1, block, head_dim)[:, first:last]
            scores = queries @ keys.transpose(-1, -2) + _skew(rows @ position_key[:, None].transpose(-1, -2), span)
            out = torch.softmax(scores * scale + mask, dim=-1) @ values
        outputs.append(out)
    out = (torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]).flatten(1, 2)
    return out if valid is None else out.masked_fill(~valid[..., None], 0.0)


def _mask_invalid(mask, valid, first, last, block, window, span):
    """Add the key mask to a band: [P, blocks, block, span]. A row keeps its own key, for a softmax needs one."""
    right = span - block - window
    padded = F.pad(valid, (window, right))
    keys = padded.unfold(1, span, block)[:, first:last, None]  # [P, blocks, 1, span]
    row = torch.arange(block, device=valid.device)[:, None]
    own = torch.arange(span, device=valid.device) == row + window
    return mask.masked_fill(~(keys | own), float("-inf"))


def _skew(columns, span):
    """[…, block, columns] by distance -> […, block, span] by key: row i shifts right by i."""
    block, width = columns.shape[-2:]
    padded = F.pad(columns, (0, span + 1 - width)).flatten(-2)
    return padded[..., : block * span].unflatten(-1, (block, span))
