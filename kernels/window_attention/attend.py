"""The products of the blocked path: some blocks of rows, the keys they touch and the columns beside them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.window_attention.blocks import OverlappingBlocks, Stretches, skew


class _Beside(NamedTuple):
    """Columns beside the windows: key, value [P, G, D], shared by the blocks; additive mask [P, blocks, block, G]."""

    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor


def attend_blocks(problems, blocks, ranges, scale, columns, drop, explicit):
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
        if not explicit:
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


def is_explicit(problems, drop):
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
        return dropped(torch.softmax(scores, dim=-1), kept) @ values
    scores_beside = (rows.flatten(1, 2) @ beside.key.transpose(-1, -2)).view_as(beside.mask) + beside.mask
    weights = torch.softmax(torch.cat([scores, scores_beside], dim=-1), dim=-1)
    weights, weights_beside = weights.tensor_split([scores.shape[-1]], dim=-1)
    weights, weights_beside = dropped(weights, kept), dropped(weights_beside, kept_beside)
    return weights @ values + (weights_beside.flatten(1, 2) @ beside.value).view_as(rows)


def dropped(weights: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """Probabilities, zero where they are not kept; all are if None."""
    return weights if kept is None else weights.masked_fill(~kept, 0.0)
