"""Nyström attention on a CPU, against transformers' NystromformerSelfAttention and dense SDPA."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import peers
from benchmarks.cases import BOTH, DENSE, FORWARD, NYSTROMFORMER, Shape
from benchmarks.tables import Mechanism, Peer
from kernels.nystrom_attention import nystrom_attention


@dataclass(frozen=True)
class NystromShape(Shape):
    """Landmarks of each head, and the taps of the convolution beside the attention."""

    num_landmarks: int = 64
    num_taps: int = 65


class NystromSelfAttention(torch.nn.Module):
    """Projections around Nyström attention with its convolution, with parameters named as in transformers.

    The pseudo-inverse begins as theirs does, with one factor for the whole batch.
    """

    def __init__(self, shape: NystromShape):
        super().__init__()
        self.heads, self.num_landmarks = (shape.num_heads, shape.head_dim), shape.num_landmarks
        self.query, self.key, self.value = (torch.nn.Linear(shape.dim, shape.dim) for _ in range(3))
        # holds their filter [H, 1, K, 1]; we convolve along another axis
        heads, taps = shape.num_heads, (shape.num_taps, 1)
        self.conv = torch.nn.Conv2d(heads, heads, taps, groups=heads, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, dim] -> [B, T, dim]."""
        query, key, value = (project(x).unflatten(-1, self.heads) for project in (self.query, self.key, self.value))
        options = {"num_landmarks": self.num_landmarks, "pinv_init": "original"}
        return nystrom_attention(query, key, value, conv_weight=self.conv.weight[:, 0, :, 0], **options).flatten(2)


def make_module(contender: str, shape: NystromShape) -> torch.nn.Module:
    """Either side of the module table, with the same seeded weights."""
    torch.manual_seed(0)
    ours = NystromSelfAttention(shape)
    if contender != NYSTROMFORMER:
        return ours
    sizes = (shape.dim, shape.num_heads, shape.seq_len, shape.num_landmarks, shape.num_taps)
    theirs = peers.nystromformer_self_attention(*sizes)
    theirs.attention.load_state_dict(ours.state_dict())
    return theirs


def attention(shape: NystromShape) -> Callable:
    """Ours alone, without the convolution, which dense attention has not."""
    return partial(nystrom_attention, num_landmarks=shape.num_landmarks)


MECHANISM = Mechanism(
    name="nystrom",
    shape=NystromShape(),
    quick=NystromShape(seq_len=256, num_heads=2, head_dim=16, num_landmarks=16, num_taps=9),
    quick_lengths=(256, 512, 1024),
    module=make_module,
    module_peer=NYSTROMFORMER,
    attention=attention,
    peers={DENSE: Peer(lambda shape: peers.dense_attention, is_same=False, note="sees every key")},
    min_ratio={FORWARD: 1.0, BOTH: 1.0},
    max_memory_ratio=1.0,
    min_kernel_ratio={(DENSE, BOTH): 5.0},
)
