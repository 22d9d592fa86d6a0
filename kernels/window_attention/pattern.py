"""Which keys a query may see under a dilated sliding window: the one definition of the pattern."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.checks import check_count


def per_head(value: int | Sequence[int], num_heads: int, name: str, minimum: int) -> tuple[int, ...]:
    """One int a head from an int or a sequence of `num_heads` ints, each at least `minimum`.

    Raises ValueError naming the argument, the value and the limit.
    """
    if isinstance(value, int):
        values = (value,) * num_heads
    elif not isinstance(value, Iterable):
        raise ValueError(f"{name} is {value!r}, it must be a whole number, or one a head")
    else:
        values = tuple(value)
        if len(values) != num_heads:
            raise ValueError(f"{name} has {len(values)} entries for {num_heads} heads: {list(values)}")
    for head, entry in enumerate(values):
        if not isinstance(entry, int) or isinstance(entry, bool):
            raise ValueError(f"{name} of head {head} is {entry!r}, it must be a whole number")
        if entry < minimum:
            raise ValueError(f"{name} of head {head} is {entry}, it must be at least {minimum}")
    return values


def valid_rows(valid: torch.Tensor | None, query_start: int, seq_len: int) -> torch.Tensor | None:
    """Which rows are real, [B, T], by which keys are, [B, S]: row i is key query_start + i, past the last key real."""
    if valid is None:
        return None
    rows = valid[:, query_start : query_start + seq_len]
    return F.pad(rows, (0, seq_len - rows.shape[1]), value=True)


@dataclass(frozen=True)
class WindowPattern:
    """Keys visible to a query at position i: i + dilation * t for t in [-window, window], or [-window, 0] if causal.

    `window` and `dilation` hold one int a head. Keys before position 0 or past the end do not exist
    (paper section 3.1; no wrap-around).
    """

    window: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: bool

    @classmethod
    def of(cls, window, dilation, *, num_heads: int, causal: bool) -> "WindowPattern":
        """Pattern from an int or one int a head; ValueError names an entry that is out of range."""
        return cls(
            per_head(window, num_heads, "window", 0),
            per_head(dilation, num_heads, "dilation", 1),
            bool(causal),
        )

    @property
    def num_heads(self) -> int:
        """Heads the pattern describes."""
        return len(self.window)

    @property
    def reach(self) -> int:
        """Distance in tokens from a query to the farthest key any head sees on one side."""
        return max(window * dilation for window, dilation in zip(self.window, self.dilation, strict=True))

    def mask(self, seq_len: int, *, key_len: int | None = None, query_start: int = 0, device=None) -> torch.Tensor:
        """Boolean [H, T, S], True where query row i, standing at key position `query_start + i`, sees key j."""
        key_len = seq_len if key_len is None else key_len
        rows = torch.arange(query_start, query_start + seq_len, device=device)[:, None]
        distance = rows - torch.arange(key_len, device=device)[None, :]  # [T, S]
        window = torch.tensor(self.window, device=device)[:, None, None]
        dilation = torch.tensor(self.dilation, device=device)[:, None, None]
        seen = (distance.abs() <= window * dilation) & (distance % dilation == 0)  # [H, T, S]
        return seen & (distance >= 0) if self.causal else seen

    def num_pairs(self, seq_len: int) -> list[int]:
        """Query-key pairs of each head over a sequence of `seq_len` tokens, counted exactly."""
        check_count("seq_len", seq_len, 0)
        sides = 1 if self.causal else 2
        counts = []
        for window, dilation in zip(self.window, self.dilation, strict=True):
            # steps = t contributes one pair for each position that has a key t steps to its left
            steps = min(window, (seq_len - 1) // dilation) if seq_len else 0
            counts.append(seq_len + sides * (steps * seq_len - dilation * steps * (steps + 1) // 2))
        return counts
