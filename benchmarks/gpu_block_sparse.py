"""Block-sparse attention on a GPU: BigBird's pattern as released and with uniform blocks, beside the same BlockMask."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial

import torch

from benchmarks import flex, peers
from benchmarks.block_sparse import BlockSparseSelfAttention
from benchmarks.cases import BIGBIRD, BOTH, DENSE, FLEX, FORWARD, OURS
from benchmarks.gpu_case import FLEX_BEST, FLEX_BLOCK, MODULE, TARGET_DTYPE, Case
from benchmarks.gpu_problem import Problem
from benchmarks.roofline import Work
from kernels.block_sparse_attention import BlockPattern, block_sparse_attention

BLOCKS = "block-sparse"
PUBLISHED, UNIFORM, HF_TRAIN, EVERYTHING = "published", "uniform", "published, as hf_train", "every block"
TARGET_TOKENS = 4096
SKEWED_TOKENS = 16384  # from here on the published random blocks are the first eleven, in columns of thousands of rows
# what fits blocks of 64: the defaults for an H100 do not, they are 128 wide
TILES = {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3,
         "bwd_BLOCK_M1": 64, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 64, "bwd_num_warps": 4,
         "bwd_num_stages": 3}  # fmt: skip
FORWARD_OPTIONS = ({}, {"fwd_num_stages": 2}, {"fwd_BLOCK_N": 32}, {"fwd_num_warps": 8})
BACKWARD_OPTIONS = (
    {},
    {"bwd_num_stages": 2},
    {"bwd_BLOCK_M1": 32, "bwd_BLOCK_N2": 32},
    {"bwd_BLOCK_M1": 32, "bwd_BLOCK_N2": 32, "bwd_num_stages": 4},
)


@dataclass(frozen=True)
class BlockCase(Case):
    """Attention by blocks, BigBird's; under MODULE its self-attention with query, key and value projections.

    plan: where the random blocks come from; EVERYTHING is what dense attention computes.
    """

    kind: str = BLOCKS
    block_size: int = 64
    num_random_blocks: int = 3
    plan: str = PUBLISHED

    @property
    def pattern(self) -> BlockPattern:
        """Which blocks each row sees, seed 0; made once."""
        return _pattern(self.plan, self.seq_len, self.block_size, self.num_heads, self.num_random_blocks)

    @property
    def work(self) -> Work:
        """Operations and bytes of the attention, a repeated block counted again, and of a module's projections."""
        pairs = self.num_heads * self.seq_len**2
        attention = self._attention_work(
            pairs if self.plan == EVERYTHING else sum(self.pattern.num_pairs(self.seq_len))
        )
        return self._module_work([attention], 3, 3 * self.seq_len) if self.kind == MODULE else attention

    def _own_sizes(self):
        return [f"blocks of {self.block_size}", f"{self.num_random_blocks} random ({self.plan})"]

    def as_computed_by(self, contender: str) -> "BlockCase":
        """The case whose function a contender computes: this one, or dense attention beside it."""
        return replace(self, plan=EVERYTHING) if contender == DENSE else self

    def target(self, contender: str, passes: str) -> float | None:
        """The least ratio of the contender's time to ours that is wanted on an H100, None where nothing is."""
        if self.dtype != TARGET_DTYPE or self.seq_len < TARGET_TOKENS:
            return None
        if contender == BIGBIRD:
            return 10.0
        if contender not in (FLEX, FLEX_BEST) or passes != BOTH:
            return None
        return 2.0 if self.plan == PUBLISHED and self.seq_len >= SKEWED_TOKENS else 1.3

    def quick(self) -> "BlockCase":
        """The same case at sizes that show no more than that it runs: the shortest text the released code takes."""
        return replace(self, seq_len=12 * self.block_size, num_heads=2, num_kv_heads=2)


@lru_cache(maxsize=8)
def _pattern(plan, seq_len, block_size, num_heads, num_random_blocks):
    sizes = (seq_len, block_size, num_heads, num_random_blocks)
    if plan == UNIFORM:
        return BlockPattern.uniform(*sizes)
    return BlockPattern.bigbird(*sizes, compat="hf_train" if plan == HF_TRAIN else None)


def flex_maker(case: BlockCase, device: str) -> flex.Maker:
    """FlexAttention of a case from a block size of its mask, that of the pattern or larger, and kernel options.

    Backward over blocks of 64 exists under max-autotune alone: the default tiles are too wide for them and are passed
    over whatever the options say.
    """
    masks = {}

    def make(block_size, options):
        if block_size not in masks:
            masks[block_size] = flex.pattern_mask(case.pattern, case.seq_len, device, block_size)
        mode = "max-autotune-no-cudagraphs" if block_size < FLEX_BLOCK else None
        return flex.attention(masks[block_size], options=options, mode=mode)

    return make


class BlockProblem(Problem):
    """Random inputs of a block-sparse case on a device."""

    def __init__(self, case: BlockCase, device: str):
        super().__init__(case, device)
        self.case: BlockCase = case

    def _attention(self, name):
        if name == OURS:
            return partial(block_sparse_attention, pattern=self.case.pattern, impl=self.impl)
        if name == FLEX:
            return self._flex_maker()(self.case.block_size, TILES)
        if name == DENSE:
            return peers.dense_flash(False, False, self.dtype)
        raise ValueError(f"{name} is no contender of {self.case.kind}")

    def _module(self, name):
        case = self.case
        torch.manual_seed(0)
        ours = BlockSparseSelfAttention(case.dim, case.num_heads, case.pattern, self.impl)
        module: torch.nn.Module = ours
        if name == BIGBIRD:
            sizes = (case.batch, case.seq_len, case.block_size, case.num_random_blocks)
            module = theirs = peers.bigbird_self_attention(case.dim, case.num_heads, *sizes)
            theirs.attention.load_state_dict(ours.state_dict())
        return partial(module.to(self.device, self.dtype))

    def _flex_maker(self):
        return flex_maker(self.case, self.device)

    def _candidates(self, passes):
        options = FORWARD_OPTIONS if passes == FORWARD else BACKWARD_OPTIONS
        return [*((self.case.block_size, {**TILES, **changes}) for changes in options), (FLEX_BLOCK, {})]

    @cached_property
    def _counts(self):
        return self.case.pattern.counts(self.case.pattern.num_blocks).to(self.device)

    def _reference(self, query, key, value, first, last):
        """The rows' scores with every key, plus the logarithm of how often it counts, straight from the pattern."""
        block = torch.arange(self.case.seq_len, device=self.device) // self.case.block_size
        weights = self._counts[:, block[first:last]][:, :, block].double().log()  # [H, rows, T]
        scores = torch.einsum("bihd,bjhd->bhij", query[:, first:last], key) * query.shape[-1] ** -0.5
        return torch.einsum("bhij,bjhd->bihd", (scores + weights).softmax(-1), value)


def cases() -> Iterator[BlockCase]:
    """Those of blocks, in the order of their weight."""
    published = BlockCase("bigbird-16k", "BigBird as released, skewed: all rows draw the first blocks", (FLEX, DENSE))
    uniform = replace(published, name="uniform-16k", purpose="random blocks from the whole text", plan=UNIFORM,
                      contenders=(FLEX,))  # fmt: skip
    yield published
    yield uniform
    yield replace(published, name="bigbird-module-4k", purpose="BigBird's self-attention in training, projections",
                  contenders=(BIGBIRD,), kind=MODULE, seq_len=4096, plan=HF_TRAIN)  # fmt: skip
    for case in (published, uniform):
        name = case.name.removesuffix("-16k")
        yield replace(case, name=f"{name}-4k", seq_len=4096)
        yield replace(case, name=f"{name}-64k", seq_len=65536, contenders=(FLEX,))
    yield replace(published, name="bigbird-options", purpose="FlexAttention with its best options",
                  contenders=(FLEX_BEST,))  # fmt: skip
