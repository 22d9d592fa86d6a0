"""What every case of the GPU benchmark has: its sizes, its purpose, its contenders and what is wanted of ours."""

from dataclasses import dataclass

import torch

from benchmarks.cases import FORWARD
from benchmarks.roofline import BACKWARD, Work

MODULE = "module"
FLEX_BEST = "FlexAttention, best options"
FLEX_BLOCK = 128  # of its masks, where nothing else is asked for
TARGET_DTYPE = "bfloat16"


@dataclass(frozen=True)
class Case:
    """One set of sizes, measured forward and forward + backward. Each mechanism has a class of its own.

    kind names the table its rows stand in; under MODULE a self-attention is measured with its projections.
    """

    name: str
    purpose: str
    contenders: tuple[str, ...]  # beside ours
    kind: str
    seq_len: int = 16384
    head_dim: int = 64
    num_heads: int = 12
    num_kv_heads: int = 12
    batch: int = 1
    dtype: str = TARGET_DTYPE

    @property
    def dim(self) -> int:
        """Width of the model the heads belong to."""
        return self.num_heads * self.head_dim

    @property
    def num_rows(self) -> int:
        """Query rows of an example."""
        return self.seq_len

    @property
    def item_bytes(self) -> int:
        """Bytes of a number in the dtype of the case."""
        return getattr(torch, self.dtype).itemsize

    @property
    def work(self) -> Work:
        """Operations and bytes of a call."""
        raise NotImplementedError

    @property
    def sizes(self) -> str:
        """The sizes that differ from case to case, in words."""
        parts = [f"T {self.seq_len}", f"D {self.head_dim}", *self._own_sizes()]
        return ", ".join(parts + [self.dtype] * (self.dtype != TARGET_DTYPE))

    def _own_sizes(self) -> list[str]:
        """Those of the mechanism."""
        return []

    def as_computed_by(self, contender: str) -> "Case":
        """The case whose function a contender computes: this one, or another that is timed beside it."""
        return self

    def target(self, contender: str, passes: str) -> float | None:
        """The least ratio of the contender's time to ours that is wanted on an H100, None where nothing is."""
        return None

    def quick(self) -> "Case":
        """The same case at sizes that show no more than that it runs."""
        raise NotImplementedError

    def _attention_work(self, pairs: int) -> Work:
        """That of an attention over so many pairs of one example, all heads together."""
        return Work.of(
            self.batch * pairs,
            rows=self.batch * self.num_rows * self.num_heads,
            keys=self.batch * self.seq_len * self.num_kv_heads,
            head_dim=self.head_dim,
            item_bytes=self.item_bytes,
        )

    def _module_work(self, attention: list[Work], num_projections: int, num_rows: int) -> Work:
        """With projections, `num_rows` rows in all of them together; at least input, weights and output move."""
        num_tokens, weights = self.batch * self.seq_len, num_projections * self.dim * (self.dim + 1)
        projections = 2 * self.dim**2 * self.batch * num_rows
        size = num_tokens * self.dim
        return Work(
            flops={
                FORWARD: sum(work.flops[FORWARD] for work in attention) + projections,
                BACKWARD: sum(work.flops[BACKWARD] for work in attention) + 2 * projections,
            },
            num_bytes={
                FORWARD: self.item_bytes * (2 * size + weights),
                BACKWARD: self.item_bytes * (3 * size + 2 * weights),
            },
            needed_bytes={},
        )
