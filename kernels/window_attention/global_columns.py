"""Keys that every row sees: the table of them, and their gradients.

A global key collects from all rows, so the rows are cut into chunks whose sums are added up in a fixed order.
"""

import torch
import triton
import triton.language as tl

from kernels.launch import Launch, num_splits, on_device, valid_arguments
from kernels.tiles import key_grad_step, load_lse2, load_tile, tile_offsets
from kernels.window_attention.launch import GlobalKeys, global_block
from kernels.window_attention.pattern import WindowPattern


@triton.jit(do_not_specialize=["S", "index_stride_b", "valid_stride_b", "valid_stride_t"])
def global_table_kernel(
    index_ptr, valid_ptr,        # in,  [B, G] int64, [B, S] uint8 or None
    positions_ptr, counts_ptr,   # out, [B, G] int64, [B] int32
    index_stride_b, index_stride_g, valid_stride_b, valid_stride_t, S,
    G: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: the entries of one example that are positions of real keys, each once, packed to the front."""
    batch = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, BLOCK_G)
    index = index_ptr + batch * index_stride_b
    positions = tl.load(index + slots.to(tl.int64) * index_stride_g, mask=slots < G, other=-1).to(tl.int64)
    kept = (positions >= 0) & (positions < S)
    if HAS_VALID:
        valid = valid_ptr + batch * valid_stride_b
        kept = kept & (tl.load(valid + positions * valid_stride_t, mask=kept, other=0) != 0)
    repeats = tl.zeros([BLOCK_G], tl.int32)
    for first in range(0, G, BLOCK_C):
        others = first + tl.arange(0, BLOCK_C)
        other = tl.load(index + others.to(tl.int64) * index_stride_g, mask=others < G, other=-1).to(tl.int64)
        same = (positions[:, None] == other[None, :]) & (others[None, :] < slots[:, None])
        repeats += tl.sum(same.to(tl.int32), 1)
    kept = kept & (repeats == 0)
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(positions_ptr + batch * G + place, positions, mask=kept)
    tl.store(counts_ptr + batch, tl.sum(kept.to(tl.int32), 0))


def global_table(global_index: torch.Tensor, valid: torch.Tensor | None, num_keys: int) -> GlobalKeys:
    """The global keys among `num_keys` that global_index [B, G] names; what lies beyond the counts is not written."""
    batch, num_global = global_index.shape
    positions = torch.empty(batch, num_global, dtype=torch.int64, device=global_index.device)
    counts = torch.empty(batch, dtype=torch.int32, device=global_index.device)
    mask, *mask_strides = valid_arguments(valid)
    block = max(16, triton.next_power_of_2(num_global))
    with on_device(global_index):
        global_table_kernel[(batch,)](
            global_index, mask, positions, counts, *global_index.stride(), *mask_strides,
            S=num_keys, G=num_global, HAS_VALID=valid is not None,
            BLOCK_G=block, BLOCK_C=min(block, 8192 // block or 1),
        )  # fmt: skip
    return GlobalKeys(positions, counts)


@triton.jit(do_not_specialize=["T", "query_start", "chunk", "num_problems"])
def global_columns_grad_kernel(
    out_grad_ptr, query_ptr, key_ptr, value_ptr,  # in,  [B, T, H, D] twice, [B, S, Hkv, D] twice, any strides
    lse2_ptr, delta_ptr,                          # in,  [B, H, T], contiguous
    global_ptr, count_ptr,                        # in,  [B, G], [B]
    partial_ptr,                                  # out, [splits, B, Hkv, G, 2, D], contiguous
    out_grad_stride_b, out_grad_stride_t, out_grad_stride_h, out_grad_stride_d,
    query_stride_b, query_stride_t, query_stride_h, query_stride_d,
    key_stride_b, key_stride_t, key_stride_h, key_stride_d,
    value_stride_b, value_stride_t, value_stride_h, value_stride_d,
    T, query_start, chunk, num_problems, exponent_scale,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: the gradients that `chunk` rows give BLOCK_N global keys of one key head."""
    GROUP: tl.constexpr = H // HKV
    split = tl.program_id(1).to(tl.int64)
    first_slot = tl.program_id(2) * BLOCK_N
    problem = tl.program_id(0).to(tl.int64)
    batch, key_head = problem // HKV, problem % HKV
    count = tl.load(count_ptr + batch)
    if first_slot >= count:
        return
    MASK_DIMS: tl.constexpr = D != BLOCK_D
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < D
    slots = first_slot + tl.arange(0, BLOCK_N)
    real = slots < count
    columns = tl.load(global_ptr + batch * G + slots, mask=real, other=0)
    key_tile = key_ptr + batch * key_stride_b + key_head * key_stride_h
    key_tile += tile_offsets(columns, key_stride_t, dims, key_stride_d)
    value_tile = value_ptr + batch * value_stride_b + key_head * value_stride_h
    value_tile += tile_offsets(columns, value_stride_t, dims, value_stride_d)
    key = load_tile(key_tile, real, dim_mask, True, MASK_DIMS)  # [BLOCK_N, BLOCK_D]
    value = load_tile(value_tile, real, dim_mask, True, MASK_DIMS)

    key_grad = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    value_grad = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    first_row = tl.program_id(1) * chunk
    last_row = tl.minimum(first_row + chunk, T)
    if CAUSAL:
        # rows before the first of these keys see none of them
        earliest = tl.min(tl.where(real, columns, query_start + T), 0).to(tl.int32)
        first_row = tl.maximum(first_row, (earliest - query_start) // BLOCK_M * BLOCK_M)
    for group_head in range(0, GROUP):
        head = key_head * GROUP + group_head
        query_base = query_ptr + batch * query_stride_b + head * query_stride_h
        out_grad_base = out_grad_ptr + batch * out_grad_stride_b + head * out_grad_stride_h
        statistics = (batch * H + head) * T
        for start in range(first_row, last_row, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            there = rows < last_row
            query_tile = query_base + tile_offsets(rows, query_stride_t, dims, query_stride_d)
            out_grad_tile = out_grad_base + tile_offsets(rows, out_grad_stride_t, dims, out_grad_stride_d)
            query = load_tile(query_tile, there, dim_mask, True, MASK_DIMS)  # [BLOCK_M, BLOCK_D]
            out_grad = load_tile(out_grad_tile, there, dim_mask, True, MASK_DIMS)
            lse2 = load_lse2(lse2_ptr + statistics + rows, there)
            delta = tl.load(delta_ptr + statistics + rows, mask=there, other=0.0)
            key_grad, value_grad = key_grad_step(
                key_grad, value_grad, query, key, value, out_grad, lse2, delta,
                columns[:, None] <= (query_start + rows)[None, :], exponent_scale, CAUSAL, PRECISION,
            )  # fmt: skip
    place = ((split * num_problems + problem) * G * 2 * D) + tile_offsets(slots, 2 * D, dims, 1)
    mask = real[:, None] & dim_mask[None, :]
    tl.store(partial_ptr + place, key_grad, mask=mask)
    tl.store(partial_ptr + place + D, value_grad, mask=mask)


@triton.jit(do_not_specialize=["S", "num_problems", "num_parts"])
def global_columns_sum_kernel(
    partial_ptr, global_ptr, count_ptr,  # in,     [splits, B, Hkv, G, 2, D], [B, G], [B]
    key_grad_ptr, value_grad_ptr,        # in-out, [B, S, Hkv, D], contiguous
    S, num_problems, num_parts, scale,
    HKV: tl.constexpr, D: tl.constexpr, G: tl.constexpr, ACC: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: add up the chunks of one global key of one key head, over what stands in its place."""
    slot = tl.program_id(0) % G
    problem = (tl.program_id(0) // G).to(tl.int64)
    batch, key_head = problem // HKV, problem % HKV
    if slot >= tl.load(count_ptr + batch):
        return
    dims = tl.arange(0, BLOCK_D)
    mask = dims < D
    key_grad = tl.zeros([BLOCK_D], ACC)
    value_grad = tl.zeros([BLOCK_D], ACC)
    for split in range(0, num_parts):
        part = partial_ptr + ((split * num_problems + problem) * G + slot) * 2 * D
        key_grad += tl.load(part + dims, mask=mask, other=0.0)
        value_grad += tl.load(part + D + dims, mask=mask, other=0.0)
    column = tl.load(global_ptr + batch * G + slot)
    place = ((batch * S + column) * HKV + key_head) * D + dims
    tl.store(key_grad_ptr + place, (key_grad * scale).to(key_grad_ptr.dtype.element_ty), mask=mask)
    tl.store(value_grad_ptr + place, value_grad.to(value_grad_ptr.dtype.element_ty), mask=mask)


def global_columns_grad(
    key_grad: torch.Tensor,
    value_grad: torch.Tensor,
    out_grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lse2: torch.Tensor,
    delta: torch.Tensor,
    global_keys: GlobalKeys,
    pattern: WindowPattern,
    scale: float,
    query_start: int,
) -> None:
    """Write the gradients of the global keys, from all rows, into key_grad and value_grad [B, S, Hkv, D]."""
    launch = Launch(query, key, scale)
    batch, seq_len, num_heads, head_dim = query.shape
    key_heads, num_global = key.shape[2], global_keys.positions.shape[1]
    tiles = launch.tiles("global_columns", seq_len)
    tiles["BLOCK_N"] = min(tiles["BLOCK_N"], global_block(num_global))
    column_tiles = triton.cdiv(num_global, tiles["BLOCK_N"])
    splits, chunk = num_splits(seq_len, batch * key_heads * column_tiles, tiles["BLOCK_M"])
    shape = (splits, batch, key_heads, num_global, 2, head_dim)
    partial = torch.empty(shape, dtype=launch.accumulator, device=query.device)
    types = launch.types()
    with on_device(query):
        global_columns_grad_kernel[(batch * key_heads, splits, column_tiles)](
            out_grad, query, key, value, lse2, delta, *global_keys, partial,
            *out_grad.stride(), *query.stride(), *key.stride(), *value.stride(),
            T=seq_len, query_start=query_start, chunk=chunk, num_problems=batch * key_heads,
            H=num_heads, HKV=key_heads, G=num_global, CAUSAL=pattern.causal, **types, **tiles,
        )  # fmt: skip
        global_columns_sum_kernel[(batch * key_heads * num_global,)](
            partial, *global_keys, key_grad, value_grad,
            S=key.shape[1], num_problems=batch * key_heads, num_parts=splits, scale=scale,
            HKV=key_heads, D=head_dim, G=num_global, ACC=types["ACC"], BLOCK_D=tiles["BLOCK_D"],
        )  # fmt: skip
