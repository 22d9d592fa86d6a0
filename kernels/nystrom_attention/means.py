"""Landmarks by a kernel: means of segments of the text, each token read once."""

import torch
import triton
import triton.language as tl

from kernels.launch import Launch, on_device
from kernels.nystrom_attention.launch import Tables

BLOCK_T, BLOCK_C = 64, 128  # tokens and channels, of all heads, of a tile


@triton.jit(do_not_specialize=["table_stride", "index_stride", "num_landmarks"])
def segment_means_kernel(
    tensor_ptr,                       # in,  [B, T, H, D], any strides
    start_ptr, index_ptr, share_ptr,  # in,  [B or 1, N + 1] int64, [B or 1, T] int32, [B or 1, N], contiguous
    means_ptr,                        # out, [B, N, H, D], contiguous
    stride_b, stride_t, stride_h, stride_d, table_stride, index_stride, num_landmarks,
    H: tl.constexpr, D: tl.constexpr, ROUND: tl.constexpr, ACC: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C channels of one landmark; ROUND to the 10 bits of mantissa that tf32 products read."""
    batch = (tl.program_id(0) // num_landmarks).to(tl.int64)
    landmark = tl.program_id(0) % num_landmarks
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < H * D
    base = tensor_ptr + batch * stride_b
    across = (channels // D).to(tl.int64) * stride_h + (channels % D).to(tl.int64) * stride_d
    table = batch * table_stride
    start = tl.load(start_ptr + table * (num_landmarks + 1) + landmark)
    end = tl.load(start_ptr + table * (num_landmarks + 1) + landmark + 1)
    sums = tl.zeros([BLOCK_C], ACC)
    for first in range(start, end, BLOCK_T):
        tokens = first + tl.arange(0, BLOCK_T)
        there = tokens < end
        there = there & (tl.load(index_ptr + batch * index_stride + tokens, mask=there, other=-1) >= 0)
        tile = base + tokens.to(tl.int64)[:, None] * stride_t + across[None, :]
        sums += tl.sum(tl.load(tile, mask=there[:, None] & channel_mask[None, :], other=0.0).to(ACC), 0)
    mean = sums * tl.load(share_ptr + table * num_landmarks + landmark)
    if ROUND:
        bits = mean.to(tl.int32, bitcast=True)
        mean = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    place = (batch * num_landmarks + landmark) * H * D + channels
    tl.store(means_ptr + place, mean, mask=channel_mask)


def segment_means(tensor: torch.Tensor, tables: Tables) -> torch.Tensor:
    """[B, T, H, D] -> [B, N, H, D] in the type of sums; from half precision in what a tf32 product holds exactly."""
    launch = Launch(tensor, tensor, 1.0)
    batch, _, num_heads, head_dim = tensor.shape
    num_landmarks = tables.share.shape[1]
    means = torch.empty(batch, num_landmarks, num_heads, head_dim, dtype=launch.accumulator, device=tensor.device)
    with on_device(launch.query):
        segment_means_kernel[(batch * num_landmarks, triton.cdiv(num_heads * head_dim, BLOCK_C))](
            tensor, tables.start, tables.index, tables.share, means,
            *tensor.stride(), int(len(tables.start) > 1), tables.index_stride, num_landmarks,
            H=num_heads, D=head_dim, ROUND=tensor.dtype.itemsize == 2, ACC=launch.types()["ACC"],
            BLOCK_T=BLOCK_T, BLOCK_C=BLOCK_C,
        )  # fmt: skip
    return means
