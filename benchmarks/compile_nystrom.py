"""Launches of the kernels of Nyström attention that the ahead-of-time report compiles."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.compile_case import WIDE, Case
from kernels import tile_table
from kernels.nystrom_attention import band, means
from kernels.nystrom_attention.key_grad import softmax_key_grad
from kernels.nystrom_attention.launch import Pass, Spread, Tables
from kernels.nystrom_attention.query_grad import softmax_query_grad
from kernels.nystrom_attention.softmax_forward import softmax_fwd

TILED = {
    "nystrom_keys_forward": "softmax_fwd_kernel",
    "nystrom_keys_query_grad": "softmax_query_grad_kernel",
    "nystrom_keys_key_grad": "softmax_key_grad_kernel",
    "nystrom_queries_forward": "softmax_fwd_kernel",
    "nystrom_queries_query_grad": "softmax_query_grad_kernel",
    "nystrom_queries_key_grad": "softmax_key_grad_kernel",
    "nystrom_convolve": "convolve_kernel",
    "nystrom_band_grad": "band_grad_kernel",
}
# without a matrix product and without tile sizes to choose
HELPERS = {"nystrom_merge": "softmax_merge_kernel", "nystrom_means": "segment_means_kernel"}
BATCH, SEQ_LEN, NUM_HEADS, NUM_TAPS = 2, 8192, 8, 65
MANY = 128  # landmarks, which fill every tile


@dataclass(frozen=True)
class NystromCase(Case):
    """One launch of one kernel of Nyström attention; `num_seen` are its landmarks."""

    has_valid: bool = False

    @property
    def features(self) -> str:
        """Mask and products."""
        parts = {"valid": self.has_valid, "tf32": self.tf32}
        return "+".join(name for name, present in parts.items() if present) or "plain"

    def call(self) -> Callable[[], object]:
        """The launcher, bound to tensors without content."""
        dtype = getattr(torch, self.dtype)
        sizes = (BATCH, SEQ_LEN, NUM_HEADS, self.head_dim)
        num_landmarks = MANY if self.num_seen == WIDE else self.num_seen

        def tensor(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device="meta")

        tokens, out_grad, out = (tensor(*sizes, dtype=dtype) for _ in range(3))
        landmarks = tensor(BATCH, num_landmarks, NUM_HEADS, self.head_dim)
        valid, real, single = None, None, None
        if self.has_valid:
            valid, real = (tensor(BATCH, length, dtype=torch.bool) for length in (SEQ_LEN, num_landmarks))
            single = tensor(BATCH, dtype=torch.bool)
        tables = Tables(
            tensor(BATCH, num_landmarks + 1, dtype=torch.int64), tensor(BATCH, SEQ_LEN, dtype=torch.int32),
            tensor(BATCH, num_landmarks), real, single,
        )  # fmt: skip
        keys = Pass("keys", landmarks, tokens, tokens, valid, None, 1.0)
        queries = Pass("queries", tokens, landmarks, landmarks, real, valid, 1.0)
        of_landmarks, of_tokens = (tensor(BATCH, NUM_HEADS, length) for length in (num_landmarks, SEQ_LEN))
        spread = Spread(tables, landmarks, landmarks if self.has_valid else None)
        calls = {
            "nystrom_keys_forward": partial(softmax_fwd, keys, torch.float32),
            "nystrom_keys_query_grad": partial(softmax_query_grad, keys, landmarks, of_landmarks, of_landmarks),
            "nystrom_keys_key_grad": partial(
                softmax_key_grad, keys, landmarks, of_landmarks, delta=of_landmarks, spread=spread
            ),
            "nystrom_queries_forward": partial(softmax_fwd, queries, dtype),
            "nystrom_queries_query_grad": partial(
                softmax_query_grad, queries, out_grad, of_tokens, of_tokens, Spread(tables, landmarks)
            ),
            "nystrom_queries_key_grad": partial(softmax_key_grad, queries, out_grad, of_tokens, out=out),
            "nystrom_convolve": partial(band.convolve, tokens, tensor(NUM_HEADS, NUM_TAPS), valid, out),
            "nystrom_band_grad": partial(band.convolve_taps_grad, tokens, out_grad, NUM_TAPS, valid),
            "nystrom_means": partial(means.segment_means, tokens, tables),
        }
        calls["nystrom_merge"] = calls["nystrom_keys_forward"]
        return calls[self.kernel]


def cases() -> Iterator[Case]:
    """Each row of the tile table, what an H100 takes from an A100's rows, and features by themselves."""
    rows = [row for row in tile_table.rows() if row["kernel"] in TILED]
    own = {(row["kernel"], row["element_size"], row["block_d"]) for row in rows if row["arch"] == "sm_90"}
    for row in rows:
        dtype = "bfloat16" if row["element_size"] == 2 else "float32"
        case = NystromCase(row["kernel"], row["arch"], dtype, row["block_d"], has_valid=True)
        yield case
        if (row["kernel"], row["element_size"], row["block_d"]) not in own:
            yield replace(case, arch="sm_90")
    for kernel in TILED:
        yield NystromCase(kernel, "sm_90", "bfloat16", 64)
        yield NystromCase(kernel, "sm_90", "float32", 64, has_valid=True, tf32=True)
    for kernel in HELPERS:
        yield NystromCase(kernel, "sm_90", "bfloat16", 64, has_valid=True)


def main_case(kernel: str) -> Case:
    """The launch of a kernel that most users make."""
    return NystromCase(kernel, "sm_90", "bfloat16", 64, has_valid=True)
