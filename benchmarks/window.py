"""Window attention on a CPU, against transformers' LongformerSelfAttention, dense SDPA and compiled FlexAttention."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import peers
from benchmarks.cases import BOTH, DENSE, FLEX, FORWARD, LONGFORMER, Shape, random_tensors
from benchmarks.tables import Mechanism, Peer
from kernels.window_attention import window_attention


@dataclass(frozen=True)
class WindowShape(Shape):
    """`window` counts the keys on each side."""

    window: int = 256


class WindowSelfAttention(torch.nn.Module):
    """Query, key and value projections around the window kernel: LongformerSelfAttention's local part."""

    def __init__(self, shape: WindowShape):
        super().__init__()
        self.shape = shape
        self.query, self.key, self.value = (torch.nn.Linear(shape.dim, shape.dim) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, dim] -> [B, T, dim]."""
        heads = (self.shape.num_heads, self.shape.head_dim)
        query, key, value = (project(x).unflatten(-1, heads) for project in (self.query, self.key, self.value))
        return window_attention(query, key, value, window=self.shape.window).flatten(2)


def make_module(contender: str, shape: WindowShape) -> torch.nn.Module:
    """Either side of the module table, with the same seeded weights."""
    torch.manual_seed(0)
    ours = WindowSelfAttention(shape)
    if contender != LONGFORMER:
        return ours
    theirs = peers.longformer_self_attention(shape.dim, shape.num_heads, shape.window)
    # not strict: the projections of global tokens have no counterpart here, and stay unused
    theirs.attention.load_state_dict(ours.state_dict(), strict=False)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("_global" not in name)
    return theirs


def attention(shape: WindowShape) -> Callable:
    """Ours."""
    return partial(window_attention, window=shape.window)


def _dense(shape):
    return peers.dense_sdpa(shape.seq_len, shape.window, shape.device, getattr(torch, shape.dtype))


def _flex(shape):
    sizes = (shape.batch, shape.seq_len, shape.num_heads, shape.head_dim)
    return peers.compiled_flex(random_tensors(3, sizes, shape, requires_grad=False), shape.window)


MECHANISM = Mechanism(
    name="window",
    shape=WindowShape(),
    quick=WindowShape(seq_len=256, num_heads=2, head_dim=16, window=32),
    quick_lengths=(256, 512, 1024),
    module=make_module,
    module_peer=LONGFORMER,
    attention=attention,
    peers={DENSE: Peer(_dense), FLEX: Peer(_flex, passes=(FORWARD,), why_not_both="no backward on CPU")},
    min_ratio={FORWARD: 2.5, BOTH: 4.0},
    max_memory_ratio=1 / 3,
)
