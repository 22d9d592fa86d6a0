"""How long each example of a batch is, in blocks, found on the device."""

import torch
import triton
import triton.language as tl

from kernels.launch import on_device, valid_arguments

BLOCK = 4096


@triton.jit(do_not_specialize=["T", "num_blocks", "valid_stride_b", "valid_stride_t"])
def block_lengths_kernel(
    valid_ptr, plan_ptr,  # in,  [B, T] uint8, [N + 1]
    lengths_ptr,          # out, [B, 3]
    valid_stride_b, valid_stride_t, T, num_blocks,
    BLOCK_SIZE: tl.constexpr, FOLLOWS_LENGTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: blocks up to the last valid token of one example, their plan, and the tokens before the first that
    is not valid.
    """
    batch = tl.program_id(0).to(tl.int64)
    end = tl.zeros([BLOCK], tl.int32)
    num_open = tl.full([BLOCK], T, tl.int32)
    for start in range(0, T, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        place = valid_ptr + batch * valid_stride_b + tokens.to(tl.int64) * valid_stride_t
        valid = tl.load(place, mask=tokens < T, other=0) != 0
        end = tl.where(valid, tokens + 1, end)
        num_open = tl.where(valid, num_open, tl.minimum(num_open, tokens))
    if FOLLOWS_LENGTH:
        num_blocks = tl.cdiv(tl.max(end, 0), BLOCK_SIZE)
    place = lengths_ptr + batch * 3
    tl.store(place, num_blocks)
    tl.store(place + 1, tl.load(plan_ptr + num_blocks))
    tl.store(place + 2, tl.min(num_open, 0))


def block_lengths(
    valid: torch.Tensor, plan_of_length: torch.Tensor, block_size: int, follows_length: bool
) -> torch.Tensor:
    """int32 [B, 3]: for each row of valid [B, T] the number of its blocks, their plan, and its leading valid tokens.

    Unless `follows_length`, all rows have the blocks of T tokens.
    """
    batch, seq_len = valid.shape
    lengths = torch.empty(batch, 3, dtype=torch.int32, device=valid.device)
    with on_device(valid):
        block_lengths_kernel[(batch,)](
            valid_arguments(valid)[0], plan_of_length, lengths, *valid.stride(),
            T=seq_len, num_blocks=-(-seq_len // block_size),
            BLOCK_SIZE=block_size, FOLLOWS_LENGTH=follows_length, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return lengths
