"""Window attention in plain PyTorch with memory linear in the length: blocks of queries, overlapping views of keys.

Heads with the same window and dilation are computed together, dilated ones by residue classes (`residues`), so that
they cost what undilated ones do.
"""

from itertools import groupby

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels.dropout import keep_mask
from kernels.window_attention.attend import attend_blocks, dropped, is_explicit
from kernels.window_attention.blocks import Blocks, Dropout, GlobalColumns, Problems
from kernels.window_attention.global_tokens import at_real_tokens, canonical_index, gather_tokens
from kernels.window_attention.pattern import WindowPattern, valid_rows
from kernels.window_attention.residues import join_residues, residue_ranges

# bytes of overlapping keys (the gradient of the view, a real copy) that one SDPA call may cause
CHUNK_BYTES = 16 * 2**20
# bytes of explicit scores or masks that a call keeps for the backward pass; beyond it they are made again, a chunk at a
# time
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

    Nothing of T x S is made, and of T x (window + G) at most KEEP_BYTES is kept for the backward pass. The relative
    term has no columns for global keys: `global_index` and `position_query` exclude each other.
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
            keep_bytes=KEEP_BYTES * len(part) // num_heads,
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
    keep_bytes,
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
        # the classes of a range are that part of all rows
        keep = keep_bytes * residues.num_classes // dilation
        out = _windows(problems, residues.start, left, right, scale, beside, drop, keep)
        outputs.append(out.view(batch, -1, num_heads, *out.shape[1:]))
    return join_residues(outputs, seq_len)


def _head_mask(valid, num_heads):
    """[B, S] -> [B, S, H, 1]."""
    return None if valid is None else valid[:, :, None, None].expand(-1, -1, num_heads, 1)


def _windows(problems, start, left, right, scale, columns, drop, keep_bytes):
    """Undilated windows, row i at key `start + i`: problems of N rows -> [P, N, D]."""
    num_problems, num_rows, head_dim = problems.query.shape
    num_columns = 0 if columns is None else columns.key.shape[1]
    if not problems.key.shape[1] and not num_columns:
        return problems.zeros()
    explicit, masked = is_explicit(problems, drop), problems.key_valid is not None
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
    recompute = kept and kept_bytes > keep_bytes and torch.is_grad_enabled()
    if columns is not None or drop is not None:
        problems = problems._replace(number=torch.arange(num_problems, device=problems.query.device))
    options, outputs = (blocks, ranges, scale, columns, drop, explicit), []
    for part in problems.split(chunk):
        if recompute:
            out = checkpoint(attend_blocks, part, *options, use_reentrant=False)
        else:
            out = attend_blocks(part, *options)
        outputs.append(out)
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _block_size(num_rows, reach, explicit):
    """Rows a block, a power of two: small blocks compute fewer masked scores, large ones multiply faster.

    SDPA is at its best with a quarter of the keys a query sees, explicit scores with half of them (docs/LOG.md).
    """
    aim = reach // (2 if explicit else 4)
    return min(num_rows, max(64, min(256, 1 << max(aim - 1, 1).bit_length())))


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
    return dropped(torch.softmax(scores, dim=-1), kept) @ value / (1 - dropout)
