"""What the ahead-of-time report knows of a launch of any kernel."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels import tile_table

WIDE = 2049  # keys seen by a query of a row that holds for all widths


@dataclass(frozen=True)
class Case(ABC):
    """One launch of one kernel: architecture, dtype, head dim, and in derived classes what else makes other code."""

    kernel: str
    arch: str
    dtype: str
    head_dim: int
    num_seen: int = WIDE  # what the tile table asks for: keys that a query sees, landmarks
    tf32: bool = False  # products of float32 as tf32

    @property
    @abstractmethod
    def features(self) -> str:
        """What the launch has beside the plain one, joined by "+"."""

    @abstractmethod
    def call(self) -> Callable[[], object]:
        """The launcher, bound to tensors that have shapes and no content."""

    @property
    def name(self) -> str:
        """Names the row, for people."""
        seen = f" seen {self.num_seen}" if self.num_seen != WIDE else ""
        return f"{self.kernel} {self.arch} {self.dtype} D{self.head_dim}{seen} {self.features}"

    def launch(self) -> None:
        """Call the launcher; it must be kept from launching."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        try:
            with tile_table.target(self.arch):
                self.call()()
        finally:
            torch.set_float32_matmul_precision(before)
