"""Which launches the ahead-of-time report compiles: every row of the tile table, and features that change the code."""

from dataclasses import replace

from benchmarks import compile_block_sparse, compile_nystrom, compile_window
from benchmarks.compile_case import Case

MECHANISMS = (compile_window, compile_block_sparse, compile_nystrom)
TILED_KERNELS = {name: function for mechanism in MECHANISMS for name, function in mechanism.TILED.items()}
HELPER_KERNELS = {name: function for mechanism in MECHANISMS for name, function in mechanism.HELPERS.items()}
KERNELS = {**TILED_KERNELS, **HELPER_KERNELS}
# whose products must be wgmma on sm_90 at the head dims that most models have
WGMMA_KERNELS = {*compile_window.WINDOWED, *compile_block_sparse.TILED}
MAX_CASES = 150


def all_cases() -> list[Case]:
    """Every launch worth a row, each named once, what most users run first."""
    few = subset()
    cases = dict.fromkeys([*few, *(case for mechanism in MECHANISMS for case in mechanism.cases())])
    return sorted(cases, key=lambda case: (case not in few, case.dtype == "float32", case.head_dim not in (64, 128)))


def shipped_cases() -> list[Case]:
    """The report: the first MAX_CASES of all."""
    return all_cases()[:MAX_CASES]


def subset() -> list[Case]:
    """The 20 rows that the tests compile: each kernel of the tile table, and another type and head dim."""
    cases = [mechanism.main_case(kernel) for mechanism in MECHANISMS for kernel in mechanism.TILED]
    first = compile_window.main_case("window_forward")
    return [*cases, replace(first, dtype="float32"), replace(first, dtype="float16", head_dim=80)]
