"""Whether two contenders compute the same: nothing is timed that does not."""

from collections.abc import Sequence

import torch

from benchmarks.cases import BOTH, FORWARD

# relative rms difference of two results in one dtype, of the worst row. In bf16 rounding gives some 1e-2 where scores
# are rounded too, as transformers does; a window of 256 each side that is a key too wide or too narrow gives 0.4.
TOLERANCE = {
    "bfloat16": {FORWARD: 3e-2, BOTH: 4e-2},
    "float16": {FORWARD: 5e-3, BOTH: 1e-2},
    "float32": {FORWARD: 2e-3, BOTH: 5e-3},  # with room for the 10-bit products of tf32
}


class Disagreement(Exception):
    """Outputs that should be equal are not: their times would mean nothing."""


def worst_row(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest rms difference of a row over its own rms, or over the mean row's where that is larger.

    A row is what one token of one example holds: all but the first two dims of [B, T, ...]; of a matrix, its rows; a
    vector is one row.
    """
    num_rows = expected.shape[: max(0, min(2, expected.dim() - 1))].numel()
    found, expected = (tensor.detach().float().reshape(num_rows, -1) for tensor in (found, expected))
    difference = (found - expected).square().mean(-1).sqrt()
    size = expected.square().mean(-1)
    # gradients of rows that hardly depend on anything are rounding alone
    return (difference / torch.maximum(size, size.mean()).sqrt().clamp(min=1e-30)).max().item()


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Rms difference over the rms of the truth."""
    return ((found.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt().clamp(min=1e-30)).item()


def check(name: str, found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float) -> float:
    """Largest absolute difference; Disagreement names the contender where a row differs by more than `tolerance`."""
    largest = 0.0
    for index, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        error = worst_row(mine, theirs)
        if not error <= tolerance:  # also where it is nan
            what = "its output" if len(found) == 1 else f"gradient {index}"
            raise Disagreement(
                f"{name}: {what} differs from the expected one by {error:.3g} of a row, more than {tolerance:.3g}: "
                "it is not timed"
            )
        largest = max(largest, (mine.float() - theirs.float()).abs().max().item())
    return largest


def in_a_line(error: Exception, limit: int = 120) -> str:
    """An error's kind and the first line of its message, cut at `limit` characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:limit]
