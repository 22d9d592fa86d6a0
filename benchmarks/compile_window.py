"""Launches of the window kernels that the ahead-of-time report compiles."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.compile_case import WIDE, Case
from kernels import tile_table
from kernels.window_attention import global_columns, global_rows, global_rows_grad
from kernels.window_attention.forward import window_attention_fwd
from kernels.window_attention.key_grad import window_attention_key_grad
from kernels.window_attention.launch import GlobalKeys
from kernels.window_attention.pattern import WindowPattern
from kernels.window_attention.query_grad import window_attention_query_grad

WINDOWED = {
    "window_forward": "window_attention_fwd_kernel",
    "window_query_grad": "window_attention_query_grad_kernel",
    "window_key_grad": "window_attention_key_grad_kernel",
}
GLOBAL = {
    "global_columns": "global_columns_grad_kernel",
    "global_rows_forward": "global_rows_fwd_kernel",
    "global_rows_key_grad": "global_rows_key_grad_kernel",
    "global_rows_query_grad": "global_rows_query_grad_kernel",
}
# without a matrix product and without tile sizes to choose
HELPERS = {
    "global_table": "global_table_kernel",
    "global_columns_sum": "global_columns_sum_kernel",
    "global_rows_combine": "global_rows_combine_kernel",
}
TILED = {**WINDOWED, **GLOBAL}
BATCH, SEQ_LEN, NUM_HEADS = 2, 8192, 8


@dataclass(frozen=True)
class WindowCase(Case):
    """One launch of one window kernel."""

    causal: bool = False
    has_valid: bool = False
    num_globals: int = 0
    group: int = 1  # query heads of a key head

    @property
    def features(self) -> str:
        """What the launch has beside a window without a mask, joined by "+"; "plain" for nothing."""
        parts = {
            "causal": self.causal,
            "valid": self.has_valid,
            f"globals {self.num_globals}": self.num_globals,
            f"group {self.group}": self.group > 1,
            "tf32": self.tf32,
        }
        return "+".join(name for name, present in parts.items() if present) or "plain"

    def call(self) -> Callable[[], object]:
        """The launcher, bound to tensors without content."""
        return _launcher(self)


def _launcher(case: WindowCase) -> Callable[[], object]:
    def tensor(*shape, dtype: str = case.dtype):
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    scale = case.head_dim**-0.5
    num_rows = case.num_globals if case.kernel.startswith("global_rows") else SEQ_LEN
    query, out, out_grad = (tensor(BATCH, num_rows, NUM_HEADS, case.head_dim) for _ in range(3))
    key, value, key_grad, value_grad = (
        tensor(BATCH, SEQ_LEN, NUM_HEADS // case.group, case.head_dim) for _ in range(4)
    )
    lse2, delta = (tensor(BATCH, NUM_HEADS, num_rows, dtype="float32") for _ in range(2))
    valid = tensor(BATCH, SEQ_LEN, dtype="bool") if case.has_valid else None
    index = tensor(BATCH, case.num_globals, dtype="int64")
    keys = GlobalKeys(index, tensor(BATCH, dtype="int32")) if case.num_globals else None
    window = case.num_seen - 1 if case.causal else (case.num_seen - 1) // 2
    pattern = WindowPattern((window,) * NUM_HEADS, (1,) * NUM_HEADS, case.causal)
    qkv = (query, key, value)
    grads = (out_grad, *qkv, lse2, delta)
    calls = {
        "window_forward": partial(window_attention_fwd, *qkv, valid, keys, pattern, scale, 0),
        "window_query_grad": partial(
            window_attention_query_grad, out_grad, *qkv, out, lse2, valid, keys, pattern, scale, 0
        ),
        "window_key_grad": partial(window_attention_key_grad, *grads, valid, pattern, scale, 0),
        "global_table": partial(global_columns.global_table, index, valid, SEQ_LEN),
        "global_columns": partial(
            global_columns.global_columns_grad, key_grad, value_grad, *grads, keys, pattern, scale, 0
        ),
        "global_rows_forward": partial(global_rows.global_rows_fwd, *qkv, index, valid, scale, case.causal),
        "global_rows_key_grad": partial(
            global_rows_grad.global_rows_grad, out_grad, *qkv, out, lse2, index, valid, scale, case.causal
        ),
    }
    calls["global_columns_sum"] = calls["global_columns"]
    calls["global_rows_combine"] = calls["global_rows_forward"]
    calls["global_rows_query_grad"] = calls["global_rows_key_grad"]
    return calls[case.kernel]


def all_features(case: WindowCase) -> WindowCase:
    """The case with everything its kernel can have at once, which takes most registers and shared memory."""
    if case.kernel in ("window_forward", "window_query_grad"):
        return replace(case, causal=True, has_valid=True, num_globals=64)
    if case.kernel == "window_key_grad":
        return replace(case, causal=True, has_valid=True, group=4)
    causal = case.kernel != "global_table"
    return replace(case, causal=causal, has_valid=case.kernel != "global_columns", num_globals=64, group=4)


def cases() -> Iterator[Case]:
    """Each row of the tile table, what an H100 takes from an A100's rows, and features by themselves."""
    yield from _table_cases()
    yield from _inherited_cases()
    yield from _variants()


def _table_cases() -> Iterator[Case]:
    """Each row of the tile table, for the architecture it was written for."""
    for row in tile_table.rows():
        if row["kernel"] not in TILED:
            continue
        dtype = "bfloat16" if row["element_size"] == 2 else "float32"
        yield all_features(WindowCase(row["kernel"], row["arch"], dtype, row["block_d"], row["max_seen"] or WIDE))


def _inherited_cases() -> Iterator[Case]:
    """Rows of sm_80 that an H100 uses because it has none of its own; narrow heads are left to their wider kin."""
    own = {(row["kernel"], row["element_size"], row["block_d"]) for row in tile_table.rows() if row["arch"] == "sm_90"}
    for dtype, element_size in (("bfloat16", 2), ("float32", 4)):
        for kernel in (*WINDOWED, *GLOBAL):
            for head_dim in (64, 128, 256):
                if (kernel, element_size, head_dim) not in own:
                    yield all_features(WindowCase(kernel, "sm_90", dtype, head_dim))


def _variants() -> Iterator[Case]:
    """Features by themselves, other types and head dims that fill no tile, and the kernels without a table row."""
    for kernel in WINDOWED:
        for head_dim in (64, 128):
            yield WindowCase(kernel, "sm_90", "bfloat16", head_dim)
            yield WindowCase(kernel, "sm_80", "bfloat16", head_dim)
            yield all_features(WindowCase(kernel, "sm_100", "bfloat16", head_dim))
            yield all_features(WindowCase(kernel, "sm_90", "float32", head_dim, tf32=True))
            for arch in ("sm_80", "sm_90"):
                yield replace(all_features(WindowCase(kernel, arch, "bfloat16", head_dim)), causal=False)
        for arch in ("sm_80", "sm_90"):
            yield all_features(WindowCase(kernel, arch, "float32", 256, tf32=True))
        yield all_features(WindowCase(kernel, "sm_90", "bfloat16", 80))
    for kernel in GLOBAL:
        # one global token takes smaller tiles
        yield WindowCase(kernel, "sm_90", "bfloat16", 64, causal=True, num_globals=1)
    for kernel, head_dim in (("window_forward", 64), ("window_query_grad", 64), ("window_query_grad", 128)):
        yield WindowCase(kernel, "sm_90", "bfloat16", head_dim, causal=True, has_valid=True, num_globals=1)
    yield all_features(WindowCase("window_forward", "sm_90", "float16", 64))
    for kernel in HELPERS:
        yield all_features(WindowCase(kernel, "sm_90", "bfloat16", 64))


def main_case(kernel: str) -> Case:
    """The launch of a kernel that most users make."""
    return all_features(WindowCase(kernel, "sm_90", "bfloat16", 64))
