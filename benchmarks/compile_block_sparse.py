"""Launches of the block-sparse kernels that the ahead-of-time report compiles."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

import torch

from benchmarks.compile_case import Case
from kernels import tile_table
from kernels.block_sparse_attention import BlockPattern
from kernels.block_sparse_attention.forward import block_attention_fwd
from kernels.block_sparse_attention.key_grad import block_attention_key_grad
from kernels.block_sparse_attention.launch import BlockLaunch
from kernels.block_sparse_attention.lengths import block_lengths
from kernels.block_sparse_attention.query_grad import block_attention_query_grad
from kernels.block_sparse_attention.tables import Tables, device_tables

TILED = {
    "block_forward": "block_attention_fwd_kernel",
    "block_query_grad": "block_attention_query_grad_kernel",
    "block_key_grad": "block_attention_key_grad_kernel",
}
# without a matrix product and without tile sizes to choose
HELPERS = {
    "block_merge": "block_merge_kernel",
    "block_sum": "block_sum_kernel",
    "block_lengths": "block_lengths_kernel",
}
BATCH, SEQ_LEN, NUM_HEADS = 2, 8192, 8


@dataclass(frozen=True)
class BlockCase(Case):
    """One launch of one block-sparse kernel under BigBird's pattern."""

    block_size: int = 64
    has_valid: bool = False
    dropout: float = 0.0

    @property
    def features(self) -> str:
        """Block size, mask and dropout."""
        parts = {"valid": self.has_valid, "dropout": self.dropout > 0, "tf32": self.tf32}
        return "+".join([f"b{self.block_size}", *(name for name, present in parts.items() if present)])

    def call(self) -> Callable[[], object]:
        """The launcher, bound to tensors without content."""

        def tensor(*shape, dtype: str = self.dtype):
            return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

        query, key, value, out, out_grad = (tensor(BATCH, SEQ_LEN, NUM_HEADS, self.head_dim) for _ in range(5))
        lse2, delta = (tensor(BATCH, NUM_HEADS, SEQ_LEN, dtype="float32") for _ in range(2))
        valid = tensor(BATCH, SEQ_LEN, dtype="bool")
        tables = Tables(*(table.to("meta") for table in _tables(self.block_size)))
        launch = BlockLaunch(
            query, key, self.head_dim**-0.5, value,
            valid if self.has_valid else None, tensor(BATCH, 3, dtype="int32") if self.has_valid else None,
            tables, self.block_size, 1, 1, 3, self.dropout, tensor(1, dtype="int64") if self.dropout else None,
        )  # fmt: skip
        calls = {
            "block_forward": partial(block_attention_fwd, launch),
            "block_query_grad": partial(block_attention_query_grad, launch, out_grad, out, lse2),
            "block_key_grad": partial(block_attention_key_grad, launch, out_grad, lse2, delta),
            "block_lengths": partial(block_lengths, valid, tables.plan_of_length, self.block_size, True),
        }
        calls["block_merge"], calls["block_sum"] = calls["block_forward"], calls["block_key_grad"]
        return calls[self.kernel]


@cache
def _tables(block_size):
    return device_tables(BlockPattern.bigbird(SEQ_LEN, block_size, NUM_HEADS), torch.device("cpu"))


def all_features(case: BlockCase) -> BlockCase:
    """The case with a mask and dropout, which takes most registers."""
    return replace(case, has_valid=True, dropout=0.1)


def cases() -> Iterator[Case]:
    """Each row of the tile table, what an H100 takes from an A100's rows, and features by themselves."""
    rows = [row for row in tile_table.rows() if row["kernel"] in TILED]
    own = {(row["kernel"], row["element_size"], row["block_d"]) for row in rows if row["arch"] == "sm_90"}
    for row in rows:
        dtype = "bfloat16" if row["element_size"] == 2 else "float32"
        case = all_features(BlockCase(row["kernel"], row["arch"], dtype, row["block_d"]))
        yield case
        if (row["kernel"], row["element_size"], row["block_d"]) not in own:
            yield replace(case, arch="sm_90")
    for kernel in TILED:
        for head_dim in (64, 128):
            for arch in ("sm_80", "sm_90"):
                yield BlockCase(kernel, arch, "bfloat16", head_dim)
            yield all_features(BlockCase(kernel, "sm_100", "bfloat16", head_dim))
            yield all_features(BlockCase(kernel, "sm_90", "float32", head_dim, tf32=True))
        # blocks of two tiles, of tiles that stand over, and of less than a tile
        yield all_features(BlockCase(kernel, "sm_90", "bfloat16", 64, block_size=128))
        yield all_features(BlockCase(kernel, "sm_90", "bfloat16", 80, block_size=84))
        yield all_features(BlockCase(kernel, "sm_90", "float16", 80, block_size=16))
    for kernel in HELPERS:
        yield all_features(BlockCase(kernel, "sm_90", "bfloat16", 64))


def main_case(kernel: str) -> Case:
    """The launch of a kernel that most users make."""
    return all_features(BlockCase(kernel, "sm_90", "bfloat16", 64))
