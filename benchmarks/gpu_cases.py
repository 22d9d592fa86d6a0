"""What is measured on a GPU: cases in the order of their weight, each with its purpose, its peers and its targets."""

from dataclasses import dataclass, replace
from fnmatch import fnmatch

import torch

from benchmarks.cases import BOTH, DENSE, FLEX, FORWARD, LONGFORMER
from benchmarks.roofline import BACKWARD, Work, window_pairs
from kernels.window_attention import WindowPattern

WINDOW, ROWS, MODULE = "window", "global rows", "module"
FLEX_BEST, FLEX_SERIAL = "FlexAttention, best options", "FlexAttention, no split"
FLASH, FLASH_PACKAGE = "FlashAttention-2 window (torch varlen)", "flash_attn window"
UNDILATED, WITHOUT_GLOBALS = "ours, undilated", "ours, without globals"
SCATTERED, PREFIX = "scattered", "prefix"
FLEX_BLOCK = 128
TARGET_DTYPE, TARGET_TOKENS = "bfloat16", 8192
GLOBALS_TOKENS, ROW_TOKENS = 16384, 131072
MAX_OVER_NEEDED = 1.1
LENGTHS = (2048, 4096, 8192, 32768, 65536, 131072)  # beside the 16K of the other cases


@dataclass(frozen=True)
class Case:
    """One set of sizes, measured forward and forward + backward; `window` counts the keys on each side.

    kind: WINDOW, attention of T rows with `num_globals` global keys; ROWS, that many global rows over T keys; MODULE,
    Longformer's self-attention with its projections, local and global.
    """

    name: str
    purpose: str
    contenders: tuple[str, ...]  # beside ours
    kind: str = WINDOW
    seq_len: int = 16384
    head_dim: int = 64
    window: int = 256
    dilation: int = 1
    causal: bool = False
    num_globals: int = 0
    spread: str = SCATTERED
    num_heads: int = 12
    num_kv_heads: int = 12
    batch: int = 1
    dtype: str = TARGET_DTYPE

    @property
    def dim(self) -> int:
        """Width of the model the heads belong to."""
        return self.num_heads * self.head_dim

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
        """Operations and bytes of the attention, and of a module's projections."""
        if self.kind == MODULE:
            return self._module_work()
        num_rows = self.num_globals if self.kind == ROWS else self.seq_len
        if self.kind == ROWS:
            pairs = self.num_heads * num_rows * self.seq_len
        else:
            pairs = window_pairs(self.pattern, self.seq_len, self.global_positions)
        return Work.of(
            self.batch * pairs,
            rows=self.batch * num_rows * self.num_heads,
            keys=self.batch * self.seq_len * self.num_kv_heads,
            head_dim=self.head_dim,
            item_bytes=getattr(torch, self.dtype).itemsize,
        )

    def _module_work(self):
        """Six projections, one of them of the global tokens alone; at least input, weights and output move."""
        local, rows = replace(self, kind=WINDOW).work, replace(self, kind=ROWS).work
        num_tokens, weights = self.batch * self.seq_len, 6 * self.dim * (self.dim + 1)
        projections = 2 * self.dim**2 * (5 * num_tokens + self.batch * self.num_globals)
        item_bytes, size = getattr(torch, self.dtype).itemsize, num_tokens * self.dim
        return Work(
            flops={
                FORWARD: local.flops[FORWARD] + rows.flops[FORWARD] + projections,
                BACKWARD: local.flops[BACKWARD] + rows.flops[BACKWARD] + 2 * projections,
            },
            num_bytes={FORWARD: item_bytes * (2 * size + weights), BACKWARD: item_bytes * (3 * size + 2 * weights)},
            needed_bytes={},
        )

    @property
    def sizes(self) -> str:
        """The sizes that differ from case to case, in words."""
        parts = [f"T {self.seq_len}", f"D {self.head_dim}"]
        if self.kind != ROWS:
            parts.append(f"window {self.window}")
        parts += [f"dilation {self.dilation}"] * (self.dilation > 1) + ["causal"] * self.causal
        if self.num_globals:
            parts.append(f"{self.num_globals} global" + f", {self.spread}" * (self.num_globals > 1))
        if self.num_kv_heads != self.num_heads:
            parts.append(f"{self.num_kv_heads} key heads")
        return ", ".join(parts + [self.dtype] * (self.dtype != TARGET_DTYPE))

    def as_computed_by(self, contender: str) -> "Case":
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


def _cases():
    plain = (FLEX, FLASH, FLASH_PACKAGE, DENSE)
    unmasked = (FLASH, FLASH_PACKAGE, DENSE)  # nothing to compile, so cheap
    rows = (FLEX, FLEX_SERIAL, DENSE)
    d64 = Case("window-d64", "sliding window against FlexAttention at its defaults and FlashAttention-2", plain)
    dilated = Case("dilation-4", "a dilation costs what none costs", (FLEX, UNDILATED), dilation=4)
    scattered = Case("globals-64", "64 scattered global keys", (FLEX, WITHOUT_GLOBALS), num_globals=64)
    module = Case(
        "module-8k", "Longformer's self-attention, all projections", (LONGFORMER,), MODULE, 8192, num_globals=1
    )
    row = Case("row-1-128k", "one global row over a long text", rows, ROWS, ROW_TOKENS, num_globals=1)
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


CASES = tuple(_cases())
# one case of each kind of work, for a look at whether everything runs
QUICK_NAMES = ("window-d64", "dilation-4", "globals-64", "row-1-128k", "module-8k", "reach-200", "length-odd",
               "options-d64", "causal-512", "key-heads", "float32")  # fmt: skip


def chosen(patterns: str | None, *, is_quick: bool = False) -> list[Case]:
    """The cases whose names match one of the comma-separated patterns (* and ?), in their order; all without patterns.

    ValueError where a pattern matches none.
    """
    if patterns is None:
        return [case for case in CASES if not is_quick or case.name in QUICK_NAMES]
    wanted = patterns.split(",")
    for pattern in wanted:
        if not any(fnmatch(case.name, pattern) for case in CASES):
            raise ValueError(f"no case matches {pattern!r} (cases: {', '.join(case.name for case in CASES)})")
    return [case for case in CASES if any(fnmatch(case.name, pattern) for pattern in wanted)]


def quick(case: Case) -> Case:
    """The same case at sizes that show no more than that it runs."""
    odd = case.seq_len % FLEX_BLOCK
    seq_len, window = 1024 + odd, 200 if case.window % FLEX_BLOCK else 128
    heads = {"num_heads": 2, "num_kv_heads": 1 if case.num_kv_heads != case.num_heads else 2}
    return replace(case, seq_len=seq_len, window=window, num_globals=min(case.num_globals, 8), **heads)
