"""The convolution beside Nyström attention by kernels: each filter as a band matrix that tensor cores multiply with.

Row i of the band that belongs to BLOCK_M tokens holds the taps at its diagonal, so a tile of results is the product of
the band with the tokens from K // 2 before the tile to K // 2 behind it.
"""

import torch
import triton
import triton.language as tl

from kernels.launch import Launch, num_splits, on_device, valid_arguments
from kernels.tiles import load_tile, matmul, tile_offsets


@triton.jit
def _load_tokens(
    tensor_ptr, stride_b, stride_t, stride_h, stride_d, valid_ptr, valid_stride_b, valid_stride_t,
    batch, head, tokens, T, dims, dim_mask, HAS_VALID: tl.constexpr, MASK_DIMS: tl.constexpr,
):  # fmt: skip
    """Tokens [M, D] of one head; zero outside the text and where they are not valid."""
    there = (tokens >= 0) & (tokens < T)
    if HAS_VALID:
        valid = valid_ptr + batch * valid_stride_b + tokens.to(tl.int64) * valid_stride_t
        there = there & (tl.load(valid, mask=there, other=0) != 0)
    tile = tensor_ptr + batch * stride_b + head * stride_h + tile_offsets(tokens, stride_t, dims, stride_d)
    return load_tile(tile, there, dim_mask, True, MASK_DIMS)


@triton.jit(do_not_specialize=["T", "num_tiles", "valid_stride_b", "valid_stride_t"])
def convolve_kernel(
    base_ptr, value_ptr,  # in,  [B, T, H, D], contiguous or None, and any strides
    taps_ptr, valid_ptr,  # in,  [H, K] contiguous, [B, T] uint8 or None
    out_ptr,              # out, [B, T, H, D], contiguous
    value_stride_b, value_stride_t, value_stride_h, value_stride_d,
    valid_stride_b, valid_stride_t,
    T, num_tiles,
    H: tl.constexpr, D: tl.constexpr, K: tl.constexpr, HAS_BASE: tl.constexpr, HAS_VALID: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: the convolution of BLOCK_M tokens of one head, plus the base; zero where a token is not valid."""
    first = tl.program_id(0) % num_tiles * BLOCK_M
    problem = (tl.program_id(0) // num_tiles).to(tl.int64)
    batch, head = problem // H, problem % H
    MASK_DIMS: tl.constexpr = D != BLOCK_D
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < D
    rows = first + tl.arange(0, BLOCK_M)
    row_mask = rows < T
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for start in range(0, BLOCK_M + K - 1, BLOCK_N):
        tokens = first - K // 2 + start + tl.arange(0, BLOCK_N)
        value = _load_tokens(
            value_ptr, value_stride_b, value_stride_t, value_stride_h, value_stride_d,
            valid_ptr, valid_stride_b, valid_stride_t, batch, head, tokens, T, dims, dim_mask, HAS_VALID, MASK_DIMS,
        )  # fmt: skip
        tap = tokens[None, :] - rows[:, None] + K // 2
        band = tl.load(taps_ptr + head * K + tap, mask=(tap >= 0) & (tap < K), other=0.0)  # [BLOCK_M, BLOCK_N]
        acc += matmul(band, value.to(ACC), ACC, PRECISION)
    place = (batch * T * H + head) * D + tile_offsets(rows, H * D, dims, 1)
    if HAS_BASE:
        acc += load_tile(base_ptr + place, row_mask, dim_mask, True, MASK_DIMS).to(ACC)
    if HAS_VALID:
        valid = valid_ptr + batch * valid_stride_b + rows.to(tl.int64) * valid_stride_t
        acc = tl.where((tl.load(valid, mask=row_mask, other=0) != 0)[:, None], acc, 0.0)
    tl.store(out_ptr + place, acc.to(out_ptr.dtype.element_ty), mask=row_mask[:, None] & dim_mask[None, :])


@triton.jit(
    do_not_specialize=["T", "chunk", "num_tiles", "num_parts", "num_problems", "valid_stride_b", "valid_stride_t"],
)
def band_grad_kernel(
    out_grad_ptr, value_ptr,  # in,  [B, T, H, D] twice, any strides
    valid_ptr,                # in,  [B, T] uint8, or None
    band_grad_ptr,            # out, [parts, B, H, BLOCK_M, tiles, BLOCK_N], contiguous
    out_grad_stride_b, out_grad_stride_t, out_grad_stride_h, out_grad_stride_d,
    value_stride_b, value_stride_t, value_stride_h, value_stride_d,
    valid_stride_b, valid_stride_t,
    T, chunk, num_tiles, num_parts, num_problems,
    H: tl.constexpr, D: tl.constexpr, K: tl.constexpr, HAS_VALID: tl.constexpr,
    PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: what `chunk` tokens of one head give the gradient of BLOCK_N columns of the band."""
    program = tl.program_id(0)
    start = program % num_tiles * BLOCK_N
    part = (program // num_tiles % num_parts).to(tl.int64)
    problem = (program // num_tiles // num_parts).to(tl.int64)
    batch, head = problem // H, problem % H
    MASK_DIMS: tl.constexpr = D != BLOCK_D
    dims = tl.arange(0, BLOCK_D)
    dim_mask = dims < D
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    begin = part.to(tl.int32) * chunk
    end = tl.minimum(begin + chunk, T)
    for first in range(begin, end, BLOCK_M):
        out_grad = _load_tokens(
            out_grad_ptr, out_grad_stride_b, out_grad_stride_t, out_grad_stride_h, out_grad_stride_d,
            valid_ptr, valid_stride_b, valid_stride_t, batch, head, first + tl.arange(0, BLOCK_M), end,
            dims, dim_mask, HAS_VALID, MASK_DIMS,
        )  # fmt: skip
        value = _load_tokens(
            value_ptr, value_stride_b, value_stride_t, value_stride_h, value_stride_d,
            valid_ptr, valid_stride_b, valid_stride_t, batch, head, first - K // 2 + start + tl.arange(0, BLOCK_N), T,
            dims, dim_mask, HAS_VALID, MASK_DIMS,
        )  # fmt: skip
        acc += matmul(out_grad.to(ACC), tl.trans(value.to(ACC)), ACC, PRECISION)
    place = (part * num_problems + problem) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = start + tl.arange(0, BLOCK_N)
    tl.store(band_grad_ptr + tile_offsets(place, num_tiles * BLOCK_N, columns, 1), acc)


def convolve(
    value: torch.Tensor, taps: torch.Tensor, valid: torch.Tensor | None, base: torch.Tensor | None = None
) -> torch.Tensor:
    """`convolution.convolve` of value [B, T, H, D] where it is valid [B, T], plus base [B, T, H, D]; in value's dtype.

    taps [H, K], contiguous, in the type of sums.
    """
    launch = Launch(value, value, 1.0)
    batch, seq_len, num_heads, _ = value.shape
    out = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    tiles = launch.tiles("nystrom_convolve", taps.shape[1])
    num_tiles = triton.cdiv(seq_len, tiles["BLOCK_M"])
    mask, *mask_strides = valid_arguments(valid)
    with on_device(launch.query):
        convolve_kernel[(num_tiles * batch * num_heads,)](
            base, value, taps, mask, out, *value.stride(), *mask_strides,
            T=seq_len, num_tiles=num_tiles, H=num_heads, K=taps.shape[1],
            HAS_BASE=base is not None, HAS_VALID=valid is not None, **_types(launch), **tiles,
        )  # fmt: skip
    return out


def convolve_taps_grad(
    out_grad: torch.Tensor, value: torch.Tensor, num_taps: int, valid: torch.Tensor | None
) -> torch.Tensor:
    """[H, K] gradient of the taps, in the type of sums; out_grad, value [B, T, H, D]."""
    launch = Launch(value, value, 1.0)
    batch, seq_len, num_heads, _ = value.shape
    tiles = launch.tiles("nystrom_band_grad", num_taps)
    block_m, block_n = tiles["BLOCK_M"], tiles["BLOCK_N"]
    num_tiles = triton.cdiv(block_m + num_taps - 1, block_n)
    num_parts, chunk = num_splits(seq_len, batch * num_heads * num_tiles, block_m)
    shape = (num_parts * batch, num_heads, block_m, num_tiles * block_n)
    band_grad = torch.empty(shape, dtype=launch.accumulator, device=value.device)
    mask, *mask_strides = valid_arguments(valid)
    with on_device(launch.query):
        band_grad_kernel[(num_tiles * num_parts * batch * num_heads,)](
            out_grad, value, mask, band_grad, *out_grad.stride(), *value.stride(), *mask_strides,
            T=seq_len, chunk=chunk, num_tiles=num_tiles, num_parts=num_parts, num_problems=batch * num_heads,
            H=num_heads, K=num_taps, HAS_VALID=valid is not None, **_types(launch), **tiles,
        )  # fmt: skip
    # tap j lies at column i + j of row i
    width = num_tiles * block_n
    diagonals = band_grad.sum(0).flatten(1).unfold(1, num_taps, width + 1)  # [H, BLOCK_M, K]
    return diagonals.sum(1)


def _types(launch):
    """Constants of the kernels that follow from the dtype; half precision is multiplied with float32 taps in tf32."""
    types = launch.types()
    precision = "tf32" if launch.query.dtype.itemsize == 2 else types["PRECISION"]
    return {"D": types["D"], "ACC": types["ACC"], "PRECISION": precision}
