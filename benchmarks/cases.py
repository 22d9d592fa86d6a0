"""What is measured: sizes, names of contenders, random inputs, and calls without arguments."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch

from kernels.window_attention import global_positions, global_rows_attention, window_attention

FORWARD, BOTH = "forward", "forward+backward"
OURS, LONGFORMER, DENSE, FLEX = "ours", "transformers Longformer", "dense SDPA", "compiled FlexAttention"
BIGBIRD, NYSTROMFORMER, ROBERTA = "transformers BigBird", "transformers Nyströmformer", "transformers RoBERTa"


@dataclass(frozen=True)
class Shape:
    """Sizes of one case of the CPU benchmark; each mechanism adds its own, which are columns of `timing.Row`."""

    batch: int = 1
    seq_len: int = 4096
    num_heads: int = 12
    head_dim: int = 64
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def dim(self) -> int:
        """Width of the model the heads belong to."""
        return self.num_heads * self.head_dim


class LongformerSelfAttention(torch.nn.Module):
    """Longformer's self-attention: local projections, global ones, global rows in place of the local ones' output.

    The parameters have the names of transformers' module. `capacity` is the number of global tokens of every example.
    """

    def __init__(self, dim: int, num_heads: int, window: int, capacity: int, impl: str = "auto"):
        super().__init__()
        self.heads = (num_heads, dim // num_heads)
        self.window, self.capacity, self.impl = window, capacity, impl
        self.query, self.key, self.value = (torch.nn.Linear(dim, dim) for _ in range(3))
        self.query_global, self.key_global, self.value_global = (torch.nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x: torch.Tensor, is_global: torch.Tensor) -> torch.Tensor:
        """x [B, T, dim], is_global [B, T] bool -> [B, T, dim]."""
        index = global_positions(is_global, None, self.capacity)  # [B, G], no pads
        query, key, value = (project(x).unflatten(-1, self.heads) for project in (self.query, self.key, self.value))
        out = window_attention(query, key, value, window=self.window, global_index=index, impl=self.impl).flatten(2)
        places = index[:, :, None].expand(-1, -1, x.shape[-1])
        query = self.query_global(x.gather(1, places)).unflatten(-1, self.heads)
        key, value = (project(x).unflatten(-1, self.heads) for project in (self.key_global, self.value_global))
        rows = global_rows_attention(query, key, value, global_index=index, impl=self.impl)
        return out.scatter(1, places, rows.flatten(2))


def random_tensors(count: int, sizes: Iterable[int], shape: Shape, *, requires_grad: bool) -> list[torch.Tensor]:
    """Seeded normal tensors: zeros would be faster than anything real."""
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(*sizes, generator=generator) for _ in range(count)]
    return [tensor.to(shape.device, getattr(torch, shape.dtype)).requires_grad_(requires_grad) for tensor in tensors]


def make_call(
    function: Callable,
    inputs: Sequence[torch.Tensor],
    passes: str,
    parameters: Sequence[torch.Tensor] = (),
    gradient: torch.Tensor | None = None,
) -> Callable:
    """The call to time: forward under no_grad, or forward and the gradients of inputs and parameters.

    The output must have the shape of the first input; its gradient is random where none is given.
    """
    if passes == FORWARD:
        return torch.no_grad()(lambda: function(*inputs))
    wanted = [*inputs, *parameters]
    gradient = torch.randn_like(inputs[0]) if gradient is None else gradient
    return lambda: torch.autograd.grad(function(*inputs), wanted, gradient)


def matching(cases: Iterable[Any], patterns: str) -> list[Any]:
    """The cases whose `name` matches one of the comma-separated patterns (* and ?), in their order.

    ValueError where a pattern matches none.
    """
    cases, wanted = list(cases), patterns.split(",")
    for pattern in wanted:
        if not any(fnmatch(case.name, pattern) for case in cases):
            raise ValueError(f"no case matches {pattern!r} (cases: {', '.join(case.name for case in cases)})")
    return [case for case in cases if any(fnmatch(case.name, pattern) for pattern in wanted)]
