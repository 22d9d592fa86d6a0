"""Window attention in plain PyTorch with memory linear in the length: blocks of queries, overlapping views of keys.

Heads with the same window and dilation are computed together, dilated ones by residue classes (`residues`), so that
they cost what undilated ones do.
"""

from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels.dropout import keep_mask
from kernels.window_attention.blocks import (
    Blocks,
    Dropout,
    GlobalColumns,
    OverlappingBlocks,
    Problems,
    Stretches,
    skew,
)
from kernels.window_attention.global_tokens import at_real_tokens, canonical_index, gather_tokens
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
    global_index: torch.Tensor | None = None,
    position_query: torch.Tensor | None = None,
    position_key: torch.Tensor | None = None,
    query_start: int = 0,
    dropout: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `reference.window_attention`, in time and memory linear in T, however many keys there are.

    Nothing of T x S is made, and of T x (window + G) at most KEEP_BYTES a group of heads is kept for the backward
    pass. The relative term has no columns for global keys: `global_index` and `position_query` exclude each other.
    """
    batch, seq_len, num_heads, head_dim = query.shape
    first, last = _reachable(pattern.reach, pattern.causal, seq_len, key.shape[1], query_start)
    kinds = list(zip(pattern.window, pattern.dilation, strict=True))
    # heads of one window and dilation together, in parts whose overlapping keys (about five copies) fit CHUNK_BYTES;
    # split and concatenated by head, inputs, results and gradients are written once, in the layout they come in
    order = sorted(range(num_heads), key=lambda head: kinds.index(kinds[head]))
    longest = max(seq_len, last - first)
    most = max(1, CHUNK_BYTES // (5 * batch * longest * head_dim * query.element_size()))
    parts = [part for _, group in groupby(order, key=lambda head: kinds[head]) for part in _parts(list(group), most)]
    sizes = [len(part) for part in parts]
    shared = [head // (num_heads // key.shape[2]) for head in order]
    queries, positions = (_by_head(tensor, order, sizes) for tensor in (query, position_query))
    keys, values = (_by_head(tensor[:, first:last], shared, sizes) for tensor in (key, value))
    global_keys = _global_keys(key, value, global_index, valid, shared, sizes)
    row_valid = valid_rows(valid, query_start, seq_len)
    key_valid = None if valid is None else valid[:, first:last]
    outputs = []
    for index, part in enumerate(parts):
        window, dilation = kinds[part[0]]
        drop = None
        if dropout_seed is not None:
            drop = Dropout(dropout, dropout_seed, torch.tensor(part, device=query.device), num_heads)
        out = _head_group(
            queries[index],
            keys[index],
            values[index],
            positions[index],
            None if position_key is None else position_key[part],
            row_valid,
            key_valid,
            global_keys[index],
            drop,
            window=window,
            dilation=dilation,
            causal=pattern.causal,
            scale=scale,
            query_start=query_start,
            first_key=first,
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


def _global_keys(key, value, global_index, valid, heads, sizes):
    """Global keys and values [B, G, H, D] of each part of the heads, and their positions [B, G], -1 pads; or None."""
    if global_index is None:
        return [None] * len(sizes)
    position = canonical_index(global_index, key.shape[1], valid)
    tensors = (_by_head(gather_tokens(tensor, position), heads, sizes) for tensor in (key, value))
    return [(*part, position) for part in zip(*tensors, strict=True)]


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
    global_keys,
    drop,
    *,
    window,
    dilation,
    causal,
    scale,
    query_start,
    first_key,
):
    """Heads of one window and dilation: T rows and S keys, key 0 at `first_key`, [B, T, H, D] -> [B, T, H, D]."""
    batch, seq_len, num_heads, _ = query.shape
    first, last = _reachable(window * dilation, causal, seq_len, key.shape[1], query_start - first_key)
    start = query_start - first_key - first
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
        problems = Problems(**{name: tensor.flatten(0, 2) for name, tensor in split.items()})
        # what a window sees beyond the ends does not exist
        left = min(window, residues.start + residues.num_rows - 1)
        right = 0 if causal else min(window, max(residues.num_keys - 1 - residues.start, 0))
        if position_key is not None:
            columns = position_key[:, window - left : window + 1 + right]
            problems = problems._replace(position_key=columns.repeat(len(problems.query) // num_heads, 1, 1))
        beside = None
        if global_keys is not None:
            first_row = query_start + residues.first_row
            beside = GlobalColumns.of(*global_keys, first_row, dilation, residues.num_classes, causal)
        if drop is not None:
            drop = drop._replace(
                first_row=query_start + residues.first_row,
                first_key=first_key + first + residues.first_key,
                dilation=dilation,
                num_classes=residues.num_classes,
            )
        out = _windows(problems, residues.start, left, right, scale, beside, drop)
        outputs.append(out.view(batch, -1, num_heads, *out.shape[1:]))
    return join_residues(outputs, seq_len)


def _head_mask(valid, num_heads):
    """[B, S] -> [B, S, H, 1]."""
    return None if valid is None else valid[:, :, None, None].expand(-1, -1, num_heads, 1)


def _windows(problems, start, left, right, scale, columns, drop):
    """Undilated windows, row i at key `start + i`: problems of N rows -> [P, N, D]."""
    num_problems, num_rows, head_dim = problems.query.shape
    num_columns = 0 if columns is None else columns.key.shape[1]
    if not problems.key.shape[1] and not num_columns:
        return problems.zeros()
    explicit, masked = _explicit(problems, drop), problems.key_valid is not None
    block = _block_size(num_rows, left + right + num_columns, explicit)
    blocks = Blocks(num_rows, problems.key.shape[1], start, left, right, block)
    element = problems.query.element_size()
    touched = blocks.span + num_columns
    bytes_per_block = touched * head_dim * element
    if drop is not None:  # a hash of 64 bits for each score
        bytes_per_block = max(bytes_per_block, touched * blocks.block * 8)
    chunk = max(1, min(num_problems, CHUNK_BYTES // (blocks.num_blocks * bytes_per_block)))
    ranges = blocks.ranges(max(1, CHUNK_BYTES // (chunk * bytes_per_block)))
    # scores, or masks that differ from row to row: what autograd would hold beside inputs and outputs
    kept_bytes = num_problems * blocks.num_blocks * blocks.block * touched * element
    kept = explicit or masked or num_columns or blocks.num_blocks < 2 * (left + right) // blocks.block
    if drop is not None:  # the probabilities that stay, and which they are
        kept_bytes += kept_bytes + kept_bytes // element
    if num_columns and not explicit:  # keys and values with columns beside them are copies
        kept_bytes += num_problems * blocks.num_blocks * 2 * bytes_per_block
    recompute = kept and kept_bytes > KEEP_BYTES and torch.is_grad_enabled()
    if columns is not None or drop is not None:
        problems = problems._replace(number=torch.arange(num_problems, device=problems.query.device))
    outputs = []
    for part in problems.split(chunk):
        if recompute:
            out = checkpoint(_attend_blocks, part, blocks, ranges, scale, columns, drop, use_reentrant=False)
        else:
            out = _attend_blocks(part, blocks, ranges, scale, columns, drop)
        outputs.append(out)
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _block_size(num_rows, reach, explicit):
    """Rows a block, a power of two: small blocks compute fewer masked scores, large ones multiply faster.

    SDPA is at its best with a quarter of the keys a query sees, explicit scores with half of them (docs/LOG.md).
    """
    aim = reach // (2 if explicit else 4)
    return min(num_rows, max(64, min(256, 1 << max(aim - 1, 1).bit_length())))


class _Beside(NamedTuple):
    """Columns beside the windows: key, value [P, G, D], shared by the blocks; additive mask [P, blocks, block, G]."""

    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor


def _attend_blocks(problems, blocks, ranges, scale, columns, drop):
    """Some of the problems, one range of blocks at a time: [P, N, D]."""
    rows_pad = (0, 0, 0, blocks.tail)
    # without a tail F.pad would copy
    query = F.pad(problems.query, rows_pad) if blocks.tail else problems.query
    query = query.unflatten(1, (-1, blocks.block))  # [P, blocks, block, D]
    # a stretch of keys a range: the gradient of its overlapping copies is folded before the next one's is made
    stretches, pads = zip(*(blocks.stretch(first, last) for first, last in ranges), strict=True)
    key_parts, value_parts = (Stretches.apply(tensor, stretches) for tensor in (problems.key, problems.value))
    shared = None if columns is None else columns.of_problems(problems.number)
    outputs, plain = [], None
    for (first, last), pad, keys, values in zip(ranges, pads, key_parts, value_parts, strict=True):
        keys = OverlappingBlocks.apply(F.pad(keys, (0, 0, *pad)), blocks.block, blocks.span)  # [P, blocks, span, D]
        values = OverlappingBlocks.apply(F.pad(values, (0, 0, *pad)), blocks.block, blocks.span)
        rows = query[:, first:last]
        beside = None
        if plain is not None and blocks.is_plain(first, last):
            mask = plain
        else:
            seen, seen_beside = _seen(problems, blocks, first, last, columns)
            mask = _additive(seen, rows)
            if shared is not None:
                beside = _Beside(shared[0], shared[1], _additive(seen_beside, rows))
            elif problems.key_valid is None and blocks.is_plain(first, last):
                plain = mask
        if not _explicit(problems, drop):
            outputs.append(_fused(rows, keys, values, mask, beside, scale))
            continue
        bias = None
        if problems.position_query is not None:
            asking = F.pad(problems.position_query, rows_pad).unflatten(1, (-1, blocks.block))[:, first:last] * scale
            bias = skew(asking @ problems.position_key[:, None].transpose(-1, -2), blocks.span)
        kept = None
        if drop is not None:
            kept = drop.kept(problems.number, blocks, first, last, None if columns is None else columns.position)
        outputs.append(_in_the_open(rows * scale, keys, values, mask, bias, beside, kept))
    out = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
    out = out.flatten(1, 2)[:, : blocks.num_rows]
    if drop is not None:
        out = out / (1 - drop.probability)
    return out if problems.row_valid is None else out.masked_fill(~problems.row_valid, 0.0)


def _explicit(problems, drop):
    """Whether scores are computed in the open: SDPA has no gradient for a bias on its fused path and a dropout of its
    own, and in half precision its backward pass takes two to three times as long on a CPU.
    """
    half = problems.query.dtype in (torch.bfloat16, torch.float16)
    return problems.position_query is not None or drop is not None or (half and problems.query.device.type == "cpu")


def _seen(problems, blocks, first, last, columns):
    """What the rows of a range of blocks see: of their keys, bool [P or 1, blocks or 1, block, span], and of the
    columns, [P, blocks, block, G] or None.
    """
    device = problems.query.device
    seen, seen_beside = blocks.band(first, last, device), None
    if problems.key_valid is not None:
        seen = seen & blocks.of_keys(problems.key_valid[..., 0], first, last)
    if columns is not None:
        rows = (first * blocks.block, last * blocks.block)
        seen_beside = columns.seen(problems.number, *rows, blocks.left, blocks.right)
        seen_beside = seen_beside.unflatten(1, (last - first, blocks.block))
    if problems.key_valid is None and blocks.is_plain(first, last):
        return seen, seen_beside
    # a softmax needs a key: a row that sees none sees its own place, where zeros lie, or the row is not valid either
    alone = ~seen.any(dim=-1, keepdim=True)
    if seen_beside is not None:
        alone = alone & ~seen_beside.any(dim=-1, keepdim=True)
    return seen | (alone & blocks.own(device)), seen_beside


def _additive(seen, like):
    """A mask to add to scores: 0 where a key is seen, -inf elsewhere."""
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))


def _fused(rows, keys, values, mask, beside, scale):
    """rows [P, blocks, block, D] over keys, values [P, blocks, span, D] and the columns beside them."""
    if beside is not None:
        keys, values = (
            torch.cat([tensor, more[:, None].expand(-1, tensor.shape[1], -1, -1)], dim=2)
            for tensor, more in ((keys, beside.key), (values, beside.value))
        )
        mask = torch.cat([mask.expand(*beside.mask.shape[:3], -1), beside.mask], dim=-1)
    return F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale)


def _in_the_open(rows, keys, values, mask, bias, beside, kept):
    """As `_fused`, for rows that are scaled already, with `bias` [P, blocks, block, span] on the scores.

    kept: which probabilities of the windows and of the columns dropout leaves, not yet divided by their share; or None.
    """
    scores = rows @ keys.transpose(-1, -2) + mask
    if bias is not None:
        scores = scores + bias
    kept, kept_beside = (None, None) if kept is None else kept
    if beside is None:
        return _dropped(torch.softmax(scores, dim=-1), kept) @ values
    scores_beside = (rows.flatten(1, 2) @ beside.key.transpose(-1, -2)).view_as(beside.mask) + beside.mask
    weights = torch.softmax(torch.cat([scores, scores_beside], dim=-1), dim=-1)
    weights, weights_beside = weights.tensor_split([scores.shape[-1]], dim=-1)
    weights, weights_beside = _dropped(weights, kept), _dropped(weights_beside, kept_beside)
    return weights @ values + (weights_beside.flatten(1, 2) @ beside.value).view_as(rows)


def _dropped(weights, kept):
    return weights if kept is None else weights.masked_fill(~kept, 0.0)


def global_rows_attention(
    query_global: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    global_index: torch.Tensor,
    scale: float,
    valid: torch.Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `reference.global_rows_attention`; keys are not copied, a mask is [B, G, S] if `causal`, else [B, 1, S].

    With dropout one head's scores are there at a time, [B, G, S], and again in the backward pass.
    """
    num_keys = key.shape[1]
    seen = None if valid is None else valid[:, None, :]
    if causal:
        before = torch.arange(num_keys, device=key.device) <= global_index[:, :, None]  # [B, G, S]
        seen = before if seen is None else before & seen
    if seen is not None:
        # a softmax needs a key: a row that sees none is not computed, so it may see any
        seen = (seen | ~seen.any(dim=-1, keepdim=True))[:, None]
    query, key, value = (tensor.transpose(1, 2) for tensor in (query_global, key, value))
    if dropout_seed is not None:
        group, outputs = query.shape[1] // key.shape[1], []
        for head in range(query.shape[1]):
            tensors = (query[:, head], key[:, head // group], value[:, head // group])
            number = torch.arange(len(query), device=query.device) * query.shape[1] + head
            options = (seen, scale, global_index, number, dropout, dropout_seed)
            outputs.append(checkpoint(_rows_of_head, *tensors, *options, use_reentrant=False))
        out = torch.stack(outputs, dim=2)
    else:
        # one call for each of the query heads that share a key head: its keys are read again, never copied
        groups = query.unflatten(1, (key.shape[1], -1)).unbind(2)  # [B, Hkv, G, D] each
        outputs = [F.scaled_dot_product_attention(rows, key, value, attn_mask=seen, scale=scale) for rows in groups]
        out = torch.stack(outputs, dim=2).flatten(1, 2).transpose(1, 2)
    return out.masked_fill(~at_real_tokens(global_index, num_keys, valid)[:, :, None, None], 0.0)


def _rows_of_head(query, key, value, seen, scale, position, number, dropout, seed):
    """One head's rows [B, G, D] at `position` [B, G] over its keys [B, S, D], with dropout; number: int64 [B]."""
    scores = query * scale @ key.transpose(-1, -2)  # [B, G, S]
    if seen is not None:
        scores = scores.masked_fill(~seen[:, 0], float("-inf"))
    keys = torch.arange(key.shape[1], device=key.device)
    kept = keep_mask(seed, number[:, None, None], position.long()[:, :, None], keys, dropout)
    return _dropped(torch.softmax(scores, dim=-1), kept) @ value / (1 - dropout)
