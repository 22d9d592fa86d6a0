"""What is measured on a GPU: the cases of all mechanisms, in the order of their weight."""

from benchmarks import gpu_block_sparse, gpu_nystrom, gpu_window
from benchmarks.cases import matching
from benchmarks.gpu_case import Case

# one of each kind of work, and what targets hang on; the others follow, mechanism by mechanism
FIRST = ("window-d64", "bigbird-16k", "nystrom-64k", "window-d128", "uniform-16k", "dilation-4", "globals-64",
         "bigbird-module-4k", "row-1-128k", "module-8k", "bigbird-4k", "bigbird-64k", "nystrom-16k")  # fmt: skip


def _ordered():
    cases = {case.name: case for module in (gpu_window, gpu_block_sparse, gpu_nystrom) for case in module.cases()}
    return (*(cases.pop(name) for name in FIRST), *cases.values())


CASES: tuple[Case, ...] = _ordered()
# for a look at whether everything runs
QUICK_NAMES = ("window-d64", "dilation-4", "globals-64", "row-1-128k", "module-8k", "reach-200", "length-odd",
               "options-d64", "causal-512", "key-heads", "float32", "bigbird-16k", "uniform-16k", "bigbird-options",
               "bigbird-module-4k", "nystrom-64k")  # fmt: skip


def chosen(patterns: str | None, *, is_quick: bool = False) -> list[Case]:
    """The cases whose names match one of the comma-separated patterns (* and ?), in their order; all without patterns.

    ValueError where a pattern matches none.
    """
    if patterns is None:
        return [case for case in CASES if not is_quick or case.name in QUICK_NAMES]
    return matching(CASES, patterns)
