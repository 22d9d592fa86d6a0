"""Rows that attend to everything, forward: keys are cut into parts, so that even one row keeps a whole GPU at work."""

import torch
import triton
import triton.language as tl

from kernels.launch import Launch, num_splits, on_device, valid_arguments
from kernels.tiles import load_tile, matmul, softmax_step, tile_offsets
from kernels.window_attention.launch import global_block


@triton.jit
def load_places(index, slots, valid, valid_stride_t, S, G: tl.constexpr, HAS_VALID: tl.constexpr):
    """(positions, which of them hold a token) of some slots of one example's index [G]."""
    places = tl.load(index + slots, mask=slots < G, other=-1)
    real = (places >= 0) & (places < S)
    if HAS_VALID:
        real = real & (tl.load(valid + places * valid_stride_t, mask=real, other=0) != 0)
    return places, real


@triton.jit
def used_slots(index, valid, valid_stride_t, S, G: tl.constexpr, HAS_VALID: tl.constexpr, BLOCK_ALL: tl.constexpr):
    """Slots of one example up to the last that holds a token: those behind them cost nothing."""
    slots = tl.arange(0, BLOCK_ALL)
    _, real = load_places(index, slots, valid, valid_stride_t, S, G, HAS_VALID)
    return tl.max(tl.where(real, slots + 1, 0), 0)


@triton.jit(do_not_specialize=["S", "chunk", "num_problems", "valid_stride_b", "valid_stride_t"])
def global_rows_fwd_kernel(
    query_ptr, key_ptr, value_ptr,          # in,  [B, G, H, D], [B, S, Hkv, D] twice, any strides
    index_ptr, valid_ptr,                   # in,  [B, G] contiguous, [B, S] uint8 or None
    partial_ptr, max_ptr, sum_ptr,          # out, [splits, B, H, G, D] and [splits, B, H, G] twice
    query_stride_b, query_stride_g, query_stride_h, query_stride_d,
    key_stride_b, key_stride_t, key_stride_h, key_stride_d,
    value_stride_b, value_stride_t, value_stride_h, value_stride_d,
    valid_stride_b, valid_stride_t,
    S, chunk, num_problems, exponent_scale,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_VALID: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: the unnormalised sums of BLOCK_M global rows of one head over `chunk` keys."""
    problem = tl.program_id(0).to(tl.int64)
    batch, head = problem // H, problem % H
    slots = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid_base = valid_ptr + batch * valid_stride_b if HAS_VALID else None
    places, real = load_places(index_ptr + batch * G, slots, valid_base, valid_stride_t, S, G, HAS_VALID)
    if tl.max(real.to(tl.int32), 0) == 0:
        return
    MASK_DIMS: tl.constexpr = D != BLOCK_D
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < D
    query_tile = query_ptr + batch * query_stride_b + head * query_stride_h
    query_tile += tile_offsets(slots, query_stride_g, dims, query_stride_d)
    query = load_tile(query_tile, real, dim_mask, True, MASK_DIMS)  # [BLOCK_M, BLOCK_D]
    key_base = key_ptr + batch * key_stride_b + head // GROUP * key_stride_h
    value_base = value_ptr + batch * value_stride_b + head // GROUP * value_stride_h

    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    row_max = tl.full([BLOCK_M], float("-inf"), ACC)
    row_sum = tl.zeros([BLOCK_M], ACC)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, S)
    if CAUSAL:
        last = tl.minimum(last, tl.max(tl.where(real, places, -1), 0).to(tl.int32) + 1)
    for start in range(first, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        there = keys < last
        key = load_tile(
            key_base + tile_offsets(keys, key_stride_t, dims, key_stride_d), there, dim_mask, True, MASK_DIMS
        )
        value = load_tile(
            value_base + tile_offsets(keys, value_stride_t, dims, value_stride_d), there, dim_mask, True, MASK_DIMS
        )
        scores = matmul(query, tl.trans(key), ACC, PRECISION)  # [BLOCK_M, BLOCK_N]
        if HAS_VALID:
            there = there & (tl.load(valid_base + keys.to(tl.int64) * valid_stride_t, mask=there, other=0) != 0)
        seen = there[None, :]
        if CAUSAL:
            seen = seen & (keys[None, :] <= places[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        acc, row_max, row_sum = softmax_step(acc, row_max, row_sum, scores, value, exponent_scale, True, PRECISION)

    statistics = ((tl.program_id(1).to(tl.int64) * num_problems) + problem) * G + slots
    tl.store(max_ptr + statistics, row_max * exponent_scale, mask=real)
    tl.store(sum_ptr + statistics, row_sum, mask=real)
    partial = partial_ptr + tile_offsets(statistics, D, dims, 1)
    tl.store(partial, acc, mask=real[:, None] & dim_mask[None, :])


@triton.jit(do_not_specialize=["S", "num_problems", "num_parts", "valid_stride_b", "valid_stride_t"])
def global_rows_combine_kernel(
    partial_ptr, max_ptr, sum_ptr,  # in,  [splits, B, H, G, D] and [splits, B, H, G] twice
    index_ptr, valid_ptr,           # in,  [B, G] contiguous, [B, S] uint8 or None
    out_ptr, lse2_ptr,              # out, [B, G, H, D] and [B, H, G], contiguous
    valid_stride_b, valid_stride_t,
    S, num_problems, num_parts,
    H: tl.constexpr, D: tl.constexpr, G: tl.constexpr, HAS_VALID: tl.constexpr, ACC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: one global row of one head from the sums of all parts."""
    slot = tl.program_id(0) % G
    problem = (tl.program_id(0) // G).to(tl.int64)
    batch, head = problem // H, problem % H
    place = tl.load(index_ptr + batch * G + slot)
    real = (place >= 0) & (place < S)
    if HAS_VALID:
        real = real & (tl.load(valid_ptr + batch * valid_stride_b + place * valid_stride_t, mask=real, other=0) != 0)
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < D
    acc = tl.zeros([BLOCK_D], ACC)
    lse2 = tl.full([1], float("-inf"), ACC)
    if real:
        row_max = tl.full([1], float("-inf"), ACC)
        row_sum = tl.zeros([1], ACC)
        for part in range(0, num_parts):
            statistics = (part * num_problems + problem) * G + slot
            part_max = tl.load(max_ptr + statistics)
            new_max = tl.maximum(row_max, part_max)
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            decay, weight = tl.exp2(row_max - shift), tl.exp2(part_max - shift)
            partial = tl.load(partial_ptr + statistics * D + dims, mask=dim_mask, other=0.0)
            acc = acc * decay + partial * weight
            row_sum = row_sum * decay + tl.load(sum_ptr + statistics) * weight
            row_max = new_max
        some = row_sum > 0
        acc = acc * tl.where(some, 1.0 / tl.where(some, row_sum, 1.0), 0.0)
        lse2 = tl.where(some, row_max + tl.log2(tl.where(some, row_sum, 1.0)), float("-inf"))
    out = out_ptr + ((batch * G + slot) * H + head) * D + dims
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=dim_mask)
    tl.store(lse2_ptr + problem * G + slot + tl.arange(0, 1), lse2)


def global_rows_fwd(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    global_index: torch.Tensor,
    valid: torch.Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, G, H, D], lse2 [B, H, G]) of rows query [B, G, H, D] over key, value [B, S, Hkv, D]."""
    launch = Launch(query, key, scale)
    batch, num_global, num_heads, head_dim = query.shape
    num_keys = key.shape[1]
    tiles = row_tile_options(launch, "global_rows_forward", num_keys, num_global)
    row_tiles = triton.cdiv(num_global, tiles["BLOCK_M"])
    splits, chunk = num_splits(num_keys, batch * num_heads * row_tiles, tiles["BLOCK_N"])
    options = {"dtype": launch.accumulator, "device": query.device}
    partial = torch.empty(splits, batch, num_heads, num_global, head_dim, **options)
    row_max, row_sum = (torch.empty(partial.shape[:-1], **options) for _ in range(2))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse2 = torch.empty(batch, num_heads, num_global, **options)
    mask, *mask_strides = valid_arguments(valid)
    types = launch.types()
    with on_device(query):
        global_rows_fwd_kernel[(batch * num_heads, splits, row_tiles)](
            query, key, value, global_index, mask, partial, row_max, row_sum,
            *query.stride(), *key.stride(), *value.stride(), *mask_strides,
            S=num_keys, chunk=chunk, num_problems=batch * num_heads,
            H=num_heads, GROUP=launch.group, G=num_global, CAUSAL=causal, HAS_VALID=valid is not None,
            **types, **tiles,
        )  # fmt: skip
        global_rows_combine_kernel[(batch * num_heads * num_global,)](
            partial, row_max, row_sum, global_index, mask, out, lse2, *mask_strides,
            S=num_keys, num_problems=batch * num_heads, num_parts=splits,
            H=num_heads, D=head_dim, G=num_global, HAS_VALID=valid is not None, ACC=types["ACC"],
            BLOCK_D=tiles["BLOCK_D"],
        )  # fmt: skip
    return out, lse2


def row_tile_options(launch: Launch, kernel: str, num_keys: int, num_global: int) -> dict[str, int]:
    """Tile sizes of a kernel of global rows, no taller than the rows there are."""
    tiles = launch.tiles(kernel, num_keys)
    return {**tiles, "BLOCK_M": min(tiles["BLOCK_M"], global_block(num_global))}
