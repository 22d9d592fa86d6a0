"""One launch of one kernel that the ahead-of-time report compiles; each mechanism has a kind of its own."""

import abc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels import tile_table

WIDE = 2049  # keys seen by a query of a row that holds for all widths


@dataclass(frozen=True)
class Case(abc.ABC):
    """Architecture, dtype, shape, and in subclasses the features that make different code."""

    kernel: str
    arch: str
    dtype: str
    head_dim: int
    num_seen: int = WIDE  # keys that a query sees
    tf32: bool = False  # products of float32 as tf32

    @property
    @abc.abstractmethod
    def features(self) -> str:
        """What the launch has, joined by "+"."""

    @abc.abstractmethod
    def call(self) -> Callable[[], object]:
        """The launcher, bound to tensors without content."""

    @property
    def name(self) -> str:
        """Names the row, for people."""
        seen = f" seen {self.num_seen}" if self.num_seen != WIDE else ""
        return f"{self.kernel} {self.arch} {self.dtype} D{self.head_dim}{seen} {self.features}"

    def launch(self) -> None:
        """Call the launcher with tensors that have shapes and no content; it must be kept from launching."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        try:
            with tile_table.target(self.arch):
                self.call()()
        finally:
            torch.set_float32_matmul_precision(before)
