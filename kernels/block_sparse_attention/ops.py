"""The Triton kernels as operators that PyTorch knows: shapes for the compiler, gradients, no synchronisation.

Only this module and what it imports need Triton; `api` imports it where a call asks for the kernels.
"""

import torch
from torch import Tensor

from kernels.block_sparse_attention.forward import block_attention_fwd
from kernels.block_sparse_attention.key_grad import block_attention_key_grad
from kernels.block_sparse_attention.launch import BlockLaunch
from kernels.block_sparse_attention.lengths import block_lengths
from kernels.block_sparse_attention.lists import constants
from kernels.block_sparse_attention.pattern import BlockPattern
from kernels.block_sparse_attention.query_grad import block_attention_query_grad
from kernels.block_sparse_attention.tables import Tables, device_tables
from kernels.launch import interpreted_inputs


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pattern: BlockPattern,
    scale: float,
    valid: Tensor | None = None,
    dropout: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """As `reference.block_sparse_attention`, by the Triton kernels: [B, T, H, D]."""
    # the kernels take the largest score first, which a factor that is not positive would turn round
    query, scale = (query, scale) if scale > 0 else (query * scale, 1.0)
    dtype = query.dtype
    query, key, value = interpreted_inputs(query, key, value)
    tables = device_tables(pattern, query.device, -(-query.shape[1] // pattern.block_size))
    lengths = None
    if valid is not None:
        lengths = _block_lengths(valid, tables.plan_of_length, pattern.block_size, pattern.follows_length)
    out, _ = _forward(
        query, key, value, valid, lengths, dropout_seed if dropout else None, constants(tables),
        pattern.block_size, pattern.front, pattern.back, pattern.window, scale, dropout,
    )  # fmt: skip
    return out.to(dtype)


@torch.library.custom_op("longspan::block_lengths", mutates_args=())
def _block_lengths(valid: Tensor, plan_of_length: Tensor, block_size: int, follows_length: bool) -> Tensor:
    return block_lengths(valid, plan_of_length, block_size, follows_length)


@_block_lengths.register_fake
def _(valid, plan_of_length, block_size, follows_length):
    return valid.new_empty((valid.shape[0], 3), dtype=torch.int32)


@torch.library.custom_op("longspan::block_sparse_attention", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None, lengths: Tensor | None, seed: Tensor | None,
    tables: list[Tensor], block_size: int, front: int, back: int, window: int, scale: float, dropout: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return block_attention_fwd(
        BlockLaunch(
            query, key, scale, value, valid, lengths, Tables(*tables), block_size, front, back, window, dropout, seed
        )
    )


@_forward.register_fake
def _(query, key, value, valid, lengths, seed, tables, block_size, front, back, window, scale, dropout):
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, seq_len, num_heads, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((batch, num_heads, seq_len), dtype=dtype)


@torch.library.custom_op("longspan::block_sparse_attention_backward", mutates_args=())
def _backward(
    out_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse2: Tensor,
    valid: Tensor | None, lengths: Tensor | None, seed: Tensor | None,
    tables: list[Tensor], block_size: int, front: int, back: int, window: int, scale: float, dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    launch = BlockLaunch(
        query, key, scale, value, valid, lengths, Tables(*tables), block_size, front, back, window, dropout, seed
    )
    query_grad, delta = block_attention_query_grad(launch, out_grad, out, lse2)
    return query_grad, *block_attention_key_grad(launch, out_grad, lse2, delta)


@_backward.register_fake
def _(out_grad, query, key, value, *rest):
    return query.new_empty(query.shape), key.new_empty(key.shape), key.new_empty(key.shape)


def _setup(ctx, inputs, output):
    query, key, value, valid, lengths, seed, tables, *options = inputs
    out, lse2 = output
    ctx.save_for_backward(query, key, value, out, lse2, valid, lengths, seed, *tables)
    ctx.options = options
    ctx.mark_non_differentiable(lse2)
    ctx.set_materialize_grads(False)


def _grads(ctx, out_grad, lse2_grad):
    # valid, lengths, seed, the tables, all that is no tensor
    none = (None, None, None, [None] * len(Tables._fields), *[None] * len(ctx.options))
    if out_grad is None:
        return None, None, None, *none
    saved = ctx.saved_tensors
    tables = list(saved[-len(Tables._fields) :])
    return *_backward(out_grad, *saved[: -len(tables)], tables, *ctx.options), *none


_forward.register_autograd(_grads, setup_context=_setup)
