"""Nystrom attention on a GPU: its time over the length, beside dense attention as long and beside a short one."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from benchmarks import peers
from benchmarks.cases import BOTH, DENSE, FORWARD, OURS
from benchmarks.gpu_case import TARGET_DTYPE, Case
from benchmarks.gpu_problem import Problem
from benchmarks.roofline import BACKWARD, Work
from kernels.nystrom_attention import nystrom_attention

NYSTROM = "nystrom"
DENSE_8K = "dense SDPA at 8K"
SHORT_TOKENS, LONG_TOKENS = 8192, 65536
PINV_STEPS, PINV_PRODUCTS = 6, 4
WALK = 3.0  # deviation of queries and keys at the end of the text


@dataclass(frozen=True)
class NystromCase(Case):
    """Nystrom attention without its convolution; `num_landmarks` 0 is dense attention."""

    kind: str = NYSTROM
    num_landmarks: int = 64
    short_tokens: int = SHORT_TOKENS  # of the dense pass that DENSE_8K times

    @property
    def work(self) -> Work:
        """Operations and bytes, each product of a pair and its two gradients once; the core's at the kernels' rate."""
        if not self.num_landmarks:
            return self._attention_work(self.num_heads * self.seq_len**2)
        pairs = self.batch * self.num_heads * self.seq_len * self.num_landmarks
        cubes = self.batch * self.num_heads * self.num_landmarks**3
        core = 2 * PINV_STEPS * PINV_PRODUCTS * cubes
        moved = self.batch * self.num_heads * self.seq_len * self.head_dim * self.item_bytes
        return Work(
            flops={FORWARD: 8 * pairs * self.head_dim + core, BACKWARD: 16 * pairs * self.head_dim + 2 * core},
            num_bytes={FORWARD: 4 * moved, BACKWARD: 7 * moved},
            needed_bytes={FORWARD: 4 * moved, BOTH: 8 * moved},
        )

    def _own_sizes(self):
        return [f"{self.num_landmarks} landmarks"]

    def as_computed_by(self, contender: str) -> "NystromCase":
        """The case whose function a contender computes: this one, or dense attention beside it."""
        if contender == DENSE_8K:
            return replace(self, num_landmarks=0, seq_len=self.short_tokens)
        return replace(self, num_landmarks=0) if contender == DENSE else self

    def target(self, contender: str, passes: str) -> float | None:
        """The least ratio of the contender's time to ours that is wanted on an H100, None where nothing is."""
        wanted = contender == DENSE_8K and passes == BOTH and self.seq_len == LONG_TOKENS
        return 1.0 if wanted and self.dtype == TARGET_DTYPE else None

    def quick(self) -> "NystromCase":
        """The same case at sizes that show no more than that it runs."""
        return replace(self, seq_len=1024, short_tokens=512, num_landmarks=32, num_heads=2, num_kv_heads=2)


class NystromProblem(Problem):
    """Random inputs of a Nystrom case on a device; queries and keys walk, as neighbours in a text are alike.

    The means of independent ones would be near zero, and the output that of any landmarks.
    """

    def __init__(self, case: NystromCase, device: str):
        super().__init__(case, device)
        self.case: NystromCase = case
        for tensor in self.inputs[:2]:
            tensor.copy_(tensor.float().cumsum(1) * (WALK / case.seq_len**0.5))

    def _attention(self, name):
        if name == OURS:
            return partial(nystrom_attention, num_landmarks=self.case.num_landmarks, impl=self.impl)
        if name in (DENSE, DENSE_8K):
            return peers.dense_flash(False, False, self.dtype)
        raise ValueError(f"{name} is no contender of {self.case.kind}")

    def _reference(self, query, key, value, first, last):
        out = nystrom_attention(query, key, value, num_landmarks=self.case.num_landmarks, impl="reference")
        return out[:, first:last]


def cases() -> Iterator[NystromCase]:
    """Those of Nystrom attention, in the order of their weight."""
    long = NystromCase("nystrom-64k", "64K tokens beside one dense pass over 8K", (DENSE_8K,), seq_len=LONG_TOKENS)
    yield long
    for seq_len in (16384, 4096):
        name, purpose = f"nystrom-{seq_len // 1024}k", "how time grows, beside dense attention of the same text"
        yield replace(long, name=name, purpose=purpose, seq_len=seq_len, contenders=(DENSE,))
