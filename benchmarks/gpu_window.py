"""Window attention on a GPU: its cases, what they compute, the targets they are held to."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks import flex, peers
from benchmarks.cases import BOTH, DENSE, FLEX, FORWARD, LONGFORMER, OURS, LongformerSelfAttention
from benchmarks.gpu_case import FLEX_BEST, FLEX_BLOCK, MODULE, TARGET_DTYPE, Case
from benchmarks.gpu_problem import Problem
from benchmarks.roofline import Work, window_pairs
from kernels.window_attention import WindowPattern, global_rows_attention, window_attention

WINDOW, ROWS = "window", "global rows"
FLEX_SERIAL = "FlexAttention, no split"
FLASH, FLASH_PACKAGE = "FlashAttention-2 window (torch varlen)", "flash_attn window"
UNDILATED, WITHOUT_GLOBALS = "ours, undilated", "ours, without globals"
SCATTERED, PREFIX = "scattered", "prefix"
TARGET_TOKENS = 8192
MAX_OVER_NEEDED = 1.1  # peak memory over the tensors that must exist
GLOBALS_TOKENS, ROW_TOKENS = 16384, 131072
LENGTHS = (2048, 4096, 8192, 32768, 65536, 131072)  # beside the 16K of the other cases


@dataclass(frozen=True)
class WindowCase(Case):
    """Window attention; `window` counts the keys on each side.

    kind: WINDOW, attention of T rows with `num_globals` global keys; ROWS, that many global rows over T keys; MODULE,
    Longformer's self-attention with its projections, local and global.
    """

    kind: str = WINDOW
    window: int = 256
    dilation: int = 1
    causal: bool = False
    num_globals: int = 0
    spread: str = SCATTERED

    @property
    def num_rows(self) -> int:
        """Query rows of an example."""
        return self.num_globals if self.kind == ROWS else self.seq_len

    @property
    def pattern(self) -> WindowPattern:
        """Which keys of its window a row sees."""
        return WindowPattern.of(self.window, self.dilation, num_heads=self.num_heads, causal=self.causal)

    @property
    def global_positions(self) -> list[int]:
        """Positions of the global tokens: evenly spread, each in the middle of its part, or the first ones."""
        if self.spread == PREFIX or self.num_globals == 1:
            return list(range(self.num_globals))
        step = self.seq_len / max(self.num_globals, 1)
        return [int((index + 0.5) * step) for index in range(self.num_globals)]

    def global_index(self, device: str) -> torch.Tensor:
        """The same as [B, G] int64, without pads."""
        return torch.tensor([self.global_positions] * self.batch, dtype=torch.int64, device=device)

    @property
    def work(self) -> Work:
        """Operations and bytes of the attention, and of a module's six projections, one of the global tokens alone."""
        if self.kind == MODULE:
            parts = [replace(self, kind=kind).work for kind in (WINDOW, ROWS)]
            return self._module_work(parts, 6, 5 * self.seq_len + self.num_globals)
        if self.kind == ROWS:
            return self._attention_work(self.num_heads * self.num_rows * self.seq_len)
        return self._attention_work(window_pairs(self.pattern, self.seq_len, self.global_positions))

    def _own_sizes(self):
        parts = [] if self.kind == ROWS else [f"window {self.window}"]
        parts += [f"dilation {self.dilation}"] * (self.dilation > 1) + ["causal"] * self.causal
        if self.num_globals:
            parts.append(f"{self.num_globals} global" + f", {self.spread}" * (self.num_globals > 1))
        if self.num_kv_heads != self.num_heads:
            parts.append(f"{self.num_kv_heads} key heads")
        return parts

    def as_computed_by(self, contender: str) -> "WindowCase":
        """The case whose function a contender computes: this one, or another that is timed beside it."""
        if contender == UNDILATED:
            return replace(self, dilation=1)
        if contender == WITHOUT_GLOBALS:
            return replace(self, num_globals=0)
        if contender == DENSE and self.kind == WINDOW:
            return replace(self, window=self.seq_len, dilation=1, num_globals=0)
        return self

    def target(self, contender: str, passes: str) -> float | None:
        """The least ratio of the contender's time to ours that is wanted on an H100, None where nothing is."""
        if self.dtype != TARGET_DTYPE or self.seq_len < TARGET_TOKENS:
            return None
        return {WINDOW: self._window_target, ROWS: self._rows_target, MODULE: self._module_target}[self.kind](
            contender, passes
        )

    def _window_target(self, contender, passes):
        by_pass = {
            FLEX: {FORWARD: 1.3, BOTH: 1.4},
            FLEX_BEST: {FORWARD: 1.15, BOTH: 1.2},
            FLASH: {FORWARD: 1.2, BOTH: 1.1},
            FLASH_PACKAGE: {FORWARD: 1.2, BOTH: 1.1},
        }
        if contender == UNDILATED:
            return 0.95
        many = self.num_globals == 64 and self.spread == SCATTERED and self.seq_len == GLOBALS_TOKENS
        if contender == WITHOUT_GLOBALS:
            return 1 / 1.15 if many else None
        if self.num_globals:
            return 5.0 if contender == FLEX and many else None
        if self.dilation > 1:
            return 0.8 * self.dilation if contender == FLEX else None
        if contender == FLEX and (self.window % FLEX_BLOCK or self.seq_len % FLEX_BLOCK):
            return 1.5
        return by_pass.get(contender, {}).get(passes)

    def _rows_target(self, contender, passes):
        return 3.0 if contender == FLEX and self.num_globals == 1 and self.seq_len >= ROW_TOKENS else None

    def _module_target(self, contender, passes):
        return 10.0 if contender == LONGFORMER else None

    def quick(self) -> "WindowCase":
        """The same case at sizes that show no more than that it runs."""
        odd = self.seq_len % FLEX_BLOCK
        seq_len, window = 1024 + odd, 200 if self.window % FLEX_BLOCK else 128
        heads = {"num_heads": 2, "num_kv_heads": 1 if self.num_kv_heads != self.num_heads else 2}
        return replace(self, seq_len=seq_len, window=window, num_globals=min(self.num_globals, 8), **heads)


class WindowProblem(Problem):
    """Random inputs of a window case on a device."""

    def __init__(self, case: WindowCase, device: str):
        super().__init__(case, device)
        self.case: WindowCase = case
        self.index = case.global_index(device)

    def _attention(self, name):
        case, grouped = self.case.as_computed_by(name), self.case.num_heads != self.case.num_kv_heads
        if name == DENSE:
            return peers.dense_flash(case.causal, grouped, self.dtype)
        if name == FLASH:
            sizes = (case.batch, case.seq_len, case.window, case.causal)
            return peers.flash_varlen(*sizes, grouped, self.device)
        if name == FLASH_PACKAGE:
            return peers.flash_package(case.window, case.causal)
        if name in (FLEX, FLEX_SERIAL) and case.kind == ROWS:
            return flex.attention(None, options={"FORCE_USE_FLEX_ATTENTION": True} if name == FLEX_SERIAL else None)
        if name == FLEX:
            return flex.of_case(case, self.device)
        if name not in (OURS, UNDILATED, WITHOUT_GLOBALS):
            raise ValueError(f"{name} is no contender of {case.kind}")
        if case.kind == ROWS:
            return partial(global_rows_attention, global_index=self.index, impl=self.impl)
        index = self.index if case.num_globals else None
        options = {"window": case.window, "dilation": case.dilation, "causal": case.causal}
        return partial(window_attention, **options, global_index=index, impl=self.impl)

    def _module(self, name):
        """Either self-attention module with one set of seeded weights, as a function of x."""
        case = self.case
        torch.manual_seed(0)
        ours = LongformerSelfAttention(case.dim, case.num_heads, case.window, case.num_globals, impl=self.impl)
        module: torch.nn.Module = ours
        if name == LONGFORMER:
            module = theirs = peers.longformer_with_globals(case.dim, case.num_heads, case.window)
            theirs.attention.load_state_dict(ours.state_dict())
        is_global = torch.zeros(case.batch, case.seq_len, dtype=torch.bool, device=self.device)
        is_global[:, case.global_positions] = True
        return partial(module.to(self.device, self.dtype), is_global=is_global)

    def _reference(self, query, key, value, first, last):
        case, query = self.case, query[:, first:last]
        if case.kind == ROWS:
            index = self.index[:, first:last]
            return global_rows_attention(query, key, value, global_index=index, impl="reference")
        options = {"window": case.window, "dilation": case.dilation, "causal": case.causal}
        index = self.index if case.num_globals else None
        return window_attention(query, key, value, **options, global_index=index, query_start=first, impl="reference")

    def _flex_maker(self):
        return flex.maker(self.case, self.device)


def cases() -> Iterator[WindowCase]:
    """Those of windows, in the order of their weight."""
    plain = (FLEX, FLASH, FLASH_PACKAGE, DENSE)
    unmasked = (FLASH, FLASH_PACKAGE, DENSE)  # nothing to compile, so cheap
    rows = (FLEX, FLEX_SERIAL, DENSE)
    d64 = WindowCase("window-d64", "sliding window against FlexAttention at its defaults and FlashAttention-2", plain)
    dilated = WindowCase("dilation-4", "a dilation costs what none costs", (FLEX, UNDILATED), dilation=4)
    scattered = WindowCase("globals-64", "64 scattered global keys", (FLEX, WITHOUT_GLOBALS), num_globals=64)
    module = WindowCase(
        "module-8k", "Longformer's self-attention, all projections", (LONGFORMER,), MODULE, 8192, num_globals=1
    )
    row = WindowCase("row-1-128k", "one global row over a long text", rows, ROWS, ROW_TOKENS, num_globals=1)
    yield d64
    yield replace(d64, name="window-d128", head_dim=128)
    yield dilated
    yield scattered
    yield row
    yield module
    yield replace(d64, name="reach-200", purpose="a reach that is no multiple of 128", contenders=(FLEX,), window=200)
    yield replace(d64, name="length-odd", purpose="a length that is no multiple of 128", contenders=(FLEX,),
                  seq_len=16440)  # fmt: skip
    yield replace(dilated, name="dilation-2", dilation=2)
    yield replace(d64, name="options-d64", purpose="FlexAttention with its best options", contenders=(FLEX_BEST,))
    for seq_len in LENGTHS:
        name, purpose = f"length-{seq_len // 1024}k", "how time grows with the length"
        yield replace(d64, name=name, purpose=purpose, contenders=unmasked, seq_len=seq_len)
    yield replace(d64, name="options-d128", purpose="FlexAttention with its best options", contenders=(FLEX_BEST,),
                  head_dim=128)  # fmt: skip
    yield replace(d64, name="window-512", purpose="Longformer's window, every row at the ridge", window=512)
    yield replace(d64, name="causal-512", purpose="the causal window", window=512, causal=True)
    yield replace(module, name="module-16k", seq_len=16384, num_globals=64)
    yield replace(d64, name="window-128", purpose="a narrow window: memory bounds it", window=128)
    yield replace(d64, name="window-1024", purpose="a wide window: arithmetic bounds it", window=1024)
    yield replace(d64, name="window-1024-d128", purpose="a wide window and wide heads", window=1024, head_dim=128,
                  contenders=unmasked)  # fmt: skip
    yield replace(scattered, name="globals-1", purpose="one global key", num_globals=1)
    yield replace(scattered, name="globals-prefix", purpose="64 global keys, the first ones", spread=PREFIX)
    yield replace(scattered, name="globals-64-causal", purpose="64 scattered global keys", causal=True)
    yield replace(row, name="row-64-128k", purpose="64 global rows over a long text", num_globals=64)
    yield replace(row, name="row-1-16k", purpose="one global row", seq_len=16384)
    yield replace(dilated, name="dilation-4-d128", head_dim=128)
    yield replace(d64, name="key-heads", purpose="grouped-query heads, four to a key head", num_kv_heads=3)
    yield replace(d64, name="window-d64-128k", purpose="the longest text", seq_len=131072, contenders=(FLEX,))
    yield replace(d64, name="window-d128-128k", purpose="the longest text, wide heads", seq_len=131072,
                  head_dim=128, contenders=unmasked)  # fmt: skip
    yield replace(d64, name="float16", purpose="float16", dtype="float16")
    yield replace(d64, name="float32", purpose="float32", dtype="float32", seq_len=8192)
    yield replace(d64, name="window-8k", purpose="a text of 8K tokens", seq_len=8192, contenders=(FLEX,))
