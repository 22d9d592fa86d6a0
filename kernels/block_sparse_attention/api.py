"""The public door of block-sparse attention: checks the arguments, picks the path, says once which one ran."""

from collections.abc import Sequence
from functools import partial

import torch

from kernels import dispatch
from kernels.block_sparse_attention import blocked, reference
from kernels.block_sparse_attention.pattern import BlockPattern
from kernels.checks import check_dropout, check_shapes, check_tensors, empty_result, under_autocast

KERNELS = ("block_forward", "block_query_grad", "block_key_grad")
BLOCK_SIZES = (16, 128)  # smallest and largest that the kernels take


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: BlockPattern,
    *,
    valid: torch.Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """Softmax attention of each block of queries over the blocks of keys that `pattern` names (BigBird, section 2).

    Args:
        query, key, value: [B, T, H, D] in one dtype, T at most `pattern.seq_len` and any number: nothing is padded.
            Under autocast all are cast to its dtype first, as scaled_dot_product_attention does.
        pattern: which blocks, and how often each counts: a block of multiplicity m weighs as m copies of its keys.
        valid: [B, T] bool, True = real. Other keys are never seen; rows standing at them are zeros without gradient.
            What stands there must be finite, as nothing times nan or inf is nan. By default an example's pattern is
            that of its own length, up to its last valid token: what stands behind it and beside it in the batch
            changes nothing. Patterns made with `compat` take the padded length.
        scale: factor on the scores, D ** -0.5 if None.
        dropout: probability with which a pair of query and key is dropped, together with all its repetitions; the rest
            is divided by 1 - dropout. (The released code drops nothing when sparse.)
        dropout_seed: int64 of one element on the tensors' device, needed where dropout > 0: the same seed drops the
            same pairs, on every path.
        impl: "auto" (the kernels on a GPU that can run them, else "blocked"; logged once), "triton", "blocked" or
            "reference"; a named path never falls back.

    Returns:
        [B, T, H, D] in the dtype of `query`, or of autocast.

    Raises:
        ValueError: shapes, dtypes, devices or a length that do not fit, dropout outside of [0, 1) or without a seed, an
            unknown `impl`, impl="triton" where the kernels cannot run.
        NotImplementedError: fewer key heads than query heads.
    """
    if not isinstance(pattern, BlockPattern):
        raise ValueError(f"pattern must be a BlockPattern, got {type(pattern).__name__}")
    check_tensors(query=query, key=key, value=value)
    check_tensors(optional=True, valid=valid)
    query, key, value = under_autocast(query, key, value)
    check_shapes(query, key, value, valid)
    _check_fit(query, key, pattern)
    check_dropout(dropout, dropout_seed, query)
    why_not = partial(why_not_triton, block_size=pattern.block_size)
    impl = dispatch.choose_path("block_sparse_attention", impl, query, why_not)
    if query.numel() == 0:
        return empty_result(query, key, value)
    options = {
        "pattern": pattern,
        "scale": query.shape[-1] ** -0.5 if scale is None else scale,
        "valid": valid,
        "dropout": dropout,
        "dropout_seed": dropout_seed if dropout else None,
    }
    if impl == "triton":
        from kernels.block_sparse_attention import ops

        return ops.block_sparse_attention(query, key, value, **options)
    compute = reference.block_sparse_attention if impl == "reference" else blocked.block_sparse_attention
    return compute(query, key, value, **options)


def why_not_triton(
    device: torch.device,
    *,
    head_dim: int,
    block_size: int = 64,
    dtype: torch.dtype = torch.float32,
    needs: Sequence[str] = (),
) -> str | None:
    """Why the Triton kernels cannot run for tensors like these, as a clause; None where they can.

    needs: arguments of the call beyond query, key, value and the pattern: the kernels lack none. Triton is first
    imported here.
    """
    smallest, largest = BLOCK_SIZES
    if not smallest <= block_size <= largest:
        return f"the kernels take a block size of {smallest} to {largest}, not {block_size}"
    return dispatch.why_not_triton(device, head_dim=head_dim, dtype=dtype, kernels=KERNELS)


def _check_fit(query, key, pattern):
    """What goes together beyond what all attention functions check."""
    num_heads, key_heads = query.shape[2], key.shape[2]
    if query.shape[1] != key.shape[1]:
        raise ValueError(
            f"query and key must be of one length, as both have the pattern's blocks: {query.shape[1]}, {key.shape[1]}"
        )
    if num_heads != key_heads:
        raise NotImplementedError(
            f"block_sparse_attention: grouped heads ({num_heads} of query, {key_heads} of key and value) are not "
            "implemented yet"
        )
    if num_heads != pattern.num_heads:
        raise ValueError(f"query {tuple(query.shape)} has {num_heads} heads, the pattern has {pattern.num_heads}")
    pattern.blocks_of(query.shape[1])
