"""Which launches the ahead-of-time report compiles: every row of the tile table, and features that change the code."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from kernels import tile_table
from kernels.window_attention import global_columns, global_rows, global_rows_grad
from kernels.window_attention.forward import window_attention_fwd
from kernels.window_attention.key_grad import window_attention_key_grad
from kernels.window_attention.launch import GlobalKeys
from kernels.window_attention.pattern import WindowPattern
from kernels.window_attention.query_grad import window_attention_query_grad

WINDOW_KERNELS = {
    "window_forward": "window_attention_fwd_kernel",
    "window_query_grad": "window_attention_query_grad_kernel",
    "window_key_grad": "window_attention_key_grad_kernel",
}
GLOBAL_KERNELS = {
    "global_columns": "global_columns_grad_kernel",
    "global_rows_forward": "global_rows_fwd_kernel",
    "global_rows_key_grad": "global_rows_key_grad_kernel",
    "global_rows_query_grad": "global_rows_query_grad_kernel",
}
# without a matrix product and without tile sizes to choose
HELPER_KERNELS = {
    "global_table": "global_table_kernel",
    "global_columns_sum": "global_columns_sum_kernel",
    "global_rows_combine": "global_rows_combine_kernel",
}
KERNELS = {**WINDOW_KERNELS, **GLOBAL_KERNELS, **HELPER_KERNELS}
BATCH, SEQ_LEN, NUM_HEADS = 2, 8192, 8
WIDE = 2049  # keys seen by a query of a row that holds for all widths
MAX_CASES = 150


@dataclass(frozen=True)
class Case:
    """One launch of one kernel: architecture, dtype, shape and the features that make different code."""

    kernel: str
    arch: str
    dtype: str
    head_dim: int
    num_seen: int = WIDE  # keys that a query sees
    causal: bool = False
    has_valid: bool = False
    num_globals: int = 0
    group: int = 1  # query heads of a key head
    tf32: bool = False  # products of float32 as tf32

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

    @property
    def name(self) -> str:
        """Names the row, for people."""
        seen = f" seen {self.num_seen}" if self.kernel in WINDOW_KERNELS and self.num_seen != WIDE else ""
        return f"{self.kernel} {self.arch} {self.dtype} D{self.head_dim}{seen} {self.features}"

    def launch(self) -> None:
        """Call the launcher with tensors that have shapes and no content; it must be kept from launching."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        try:
            with tile_table.target(self.arch):
                _launcher(self)()
        finally:
            torch.set_float32_matmul_precision(before)


def _launcher(case: Case) -> Callable[[], object]:
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


def all_features(case: Case) -> Case:
    """The case with everything its kernel can have at once, which takes most registers and shared memory."""
    if case.kernel in ("window_forward", "window_query_grad"):
        return replace(case, causal=True, has_valid=True, num_globals=64)
    if case.kernel == "window_key_grad":
        return replace(case, causal=True, has_valid=True, group=4)
    causal = case.kernel != "global_table"
    return replace(case, causal=causal, has_valid=case.kernel != "global_columns", num_globals=64, group=4)


def all_cases() -> list[Case]:
    """Every launch worth a row, each named once, what most users run first."""
    cases = dict.fromkeys([*subset(), *_table_cases(), *_inherited_cases(), *_variants()])
    few = set(subset())
    return sorted(cases, key=lambda case: (case not in few, case.head_dim < 64, case.dtype == "float32"))


def shipped_cases() -> list[Case]:
    """The report: the first MAX_CASES of all."""
    return all_cases()[:MAX_CASES]


def _table_cases() -> Iterator[Case]:
    """Each row of the tile table, for the architecture it was written for."""
    for row in tile_table.rows():
        dtype = "bfloat16" if row["element_size"] == 2 else "float32"
        yield all_features(Case(row["kernel"], row["arch"], dtype, row["block_d"], row["max_seen"] or WIDE))


def _inherited_cases() -> Iterator[Case]:
    """Rows of sm_80 that an H100 uses because it has none of its own; narrow heads are left to their wider kin."""
    own = {(row["kernel"], row["element_size"], row["block_d"]) for row in tile_table.rows() if row["arch"] == "sm_90"}
    for dtype, element_size in (("bfloat16", 2), ("float32", 4)):
        for kernel in (*WINDOW_KERNELS, *GLOBAL_KERNELS):
            for head_dim in (64, 128, 256):
                if (kernel, element_size, head_dim) not in own:
                    yield all_features(Case(kernel, "sm_90", dtype, head_dim))


def _variants() -> Iterator[Case]:
    """Features by themselves, other types and head dims that fill no tile, and the kernels without a table row."""
    for kernel in WINDOW_KERNELS:
        for head_dim in (64, 128):
            yield Case(kernel, "sm_90", "bfloat16", head_dim)
            yield Case(kernel, "sm_80", "bfloat16", head_dim)
            yield all_features(Case(kernel, "sm_100", "bfloat16", head_dim))
            yield all_features(Case(kernel, "sm_90", "float32", head_dim, tf32=True))
            for arch in ("sm_80", "sm_90"):
                yield replace(all_features(Case(kernel, arch, "bfloat16", head_dim)), causal=False)
        for arch in ("sm_80", "sm_90"):
            yield all_features(Case(kernel, arch, "float32", 256, tf32=True))
        yield all_features(Case(kernel, "sm_90", "bfloat16", 80))
    for kernel in GLOBAL_KERNELS:
        # one global token takes smaller tiles
        yield Case(kernel, "sm_90", "bfloat16", 64, causal=True, num_globals=1)
    for kernel, head_dim in (("window_forward", 64), ("window_query_grad", 64), ("window_query_grad", 128)):
        yield Case(kernel, "sm_90", "bfloat16", head_dim, causal=True, has_valid=True, num_globals=1)
    yield all_features(Case("window_forward", "sm_90", "float16", 64))
    for kernel in HELPER_KERNELS:
        yield all_features(Case(kernel, "sm_90", "bfloat16", 64))


def subset() -> list[Case]:
    """The 20 rows that the tests compile: what the issue's promises are about, and each kernel of the table."""
    window = [
        Case(kernel, arch, "bfloat16", head_dim)
        for kernel in WINDOW_KERNELS
        for arch in ("sm_90", "sm_80")
        for head_dim in (64, 128)
    ]
    others = [Case(kernel, "sm_90", "bfloat16", 64) for kernel in GLOBAL_KERNELS]
    exact = [Case(kernel, "sm_90", "float32", 64) for kernel in WINDOW_KERNELS]
    padded = [Case("window_forward", "sm_90", "float16", 80)]
    return [all_features(case) for case in (*window, *others, *exact, *padded)]
