"""Which blocks of keys a block of queries sees, and how often each counts: the one definition of the pattern."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from weakref import WeakValueDictionary

import numpy as np
import torch

from kernels.block_sparse_attention import builders
from kernels.block_sparse_attention.lists import (
    BlockLists,
    find_global,
    first_rows,
    global_ends,
    lists_of_counts,
    no_lists,
    window_ends,
)
from kernels.checks import check_choice, check_count, check_flag

_numbers = itertools.count()
_patterns: WeakValueDictionary[str, "BlockPattern"] = WeakValueDictionary()


def pattern_of(key: str) -> "BlockPattern":
    """The pattern of that key, as long as something else holds it."""
    return _patterns[key]


@dataclass(frozen=True, eq=False)
class BlockPattern:
    """For every head and block of queries the multiset of key blocks; a block of multiplicity m weighs as m copies.

    A sequence of T tokens has ceil(T / block_size) blocks, the last one perhaps cut short. In an example of n blocks
    the first `front` and the last `back` are global: their rows see all n blocks once, and every row sees them once.
    An ordinary row i also sees, once each, the ordinary ones of blocks i - (window - 1) / 2 … i + (window - 1) / 2,
    and then every entry below n of its list, an entry that hits a block seen already counting again (as the released
    code concatenates keys: google-research/bigbird, bigbird/core/attention.py, bigbird_block_sparse_attention).
    Heads differ in their lists alone.

    seq_len: the longest sequence in tokens.
    front, back: number of global blocks; a short example has at most n, those at the front first.
    window: blocks of the window, odd, or 0 for none.
    lists: plans of lists over all `num_blocks` rows; plan_of_length: [num_blocks + 1], the plan of an example of n.
    follows_length: whether n is the example's own number of blocks, up to its last valid token, so that neither its
        padding nor its neighbours matter. If not, n is `num_blocks` for all, and so must be the sequence's.

    Equality is identity: a pattern is built once and the tables that kernels make of it are kept with it.
    """

    seq_len: int
    block_size: int
    num_heads: int
    front: int
    back: int
    window: int
    lists: tuple[BlockLists, ...] = field(repr=False)
    plan_of_length: tuple[int, ...] = field(repr=False)
    follows_length: bool = True
    key: str = field(init=False, repr=False, default="")  # its name in this process
    # what the kernels made of it, by device or by device and size, and the devices for which a call outside of a
    # compiler has made tables for all lengths
    tables: dict = field(init=False, repr=False, default_factory=dict)
    devices: set = field(init=False, repr=False, default_factory=set)

    def __post_init__(self):
        for name, minimum in {"seq_len": 1, "block_size": 1, "num_heads": 1, "front": 0, "back": 0}.items():
            check_count(name, getattr(self, name), minimum)
        builders.check_window(self.window)
        if len(self.plan_of_length) != self.num_blocks + 1:
            raise ValueError(
                f"plan_of_length has {len(self.plan_of_length)} entries, it must have one for each of 0 to "
                f"{self.num_blocks} blocks"
            )
        if not all(0 <= plan < len(self.lists) for plan in self.plan_of_length):
            raise ValueError(f"plan_of_length must hold indices of the {len(self.lists)} plans in lists")
        for plan, lists in enumerate(self.lists):
            builders.check_lists(plan, lists, self.num_heads, self.num_blocks)
        object.__setattr__(self, "key", f"block pattern {next(_numbers)}")
        _patterns[self.key] = self

    def __reduce__(self):
        """A copy, in this process or another, is a pattern of its own, with a key of its own."""
        return type(self), tuple(getattr(self, entry.name) for entry in fields(self) if entry.init)

    @classmethod
    def bigbird(
        cls,
        seq_len: int,
        block_size: int = 64,
        num_heads: int = 12,
        num_random_blocks: int = 3,
        seed: int = 0,
        compat: str | None = None,
        max_position_embeddings: int = 4096,
        global_blocks: str = "ends",
        full_when_short: bool = False,
    ) -> "BlockPattern":
        """BigBird's own pattern, ITC (section 2 of the paper): global blocks, a window of 3 and random blocks.

        The random blocks are those of the released code, drawn from one stream for all heads. An example of 1024, 2048,
        3072 or 4096 tokens (in whole blocks) has the "old plan" of the paper's models, any other the "new plan". An
        example of at most 2 r + 5 blocks, at which the released models turn to full attention or stop, gets r of the
        blocks that a row does not see yet, as far as there are, drawn without replacement.

        Args:
            seed: of the stream; the released models take the layer's index. At most 2^32 - 1.
            compat: None; or "tf", "hf_train", "hf_eval": exactly the pattern that google-research/bigbird, or Hugging
                Face's BigBird in train() or eval(), gives sequences padded to ceil(seq_len / block_size) blocks.
                Hugging Face has no old plan for 2048 tokens, and in eval() every random block is block 0.
            max_position_embeddings: for "hf_train" the length for which the old plan is drawn; TF has 4096 always.
            global_blocks: "ends", the first and the last block, as released; "front", the first two, as the paper's
                question answering has it (appendix E.2, no released code): random blocks by the new plan at every
                length, with the released function's parameters for two global blocks at the front.
            full_when_short: whether examples of at most 2 r + 5 blocks see everything once, as Hugging Face's model
                does there (and from then on at every length, which is not copied).

        Raises:
            ValueError: a count out of range, an unknown word, a length for which the released code has no pattern.
        """
        builders.check_counts(seq_len=seq_len, block_size=block_size, num_heads=num_heads)
        check_count("num_random_blocks", num_random_blocks, 0)
        builders.check_seed(seed)
        check_choice("global_blocks", global_blocks, ("ends", "front"))
        check_flag("full_when_short", full_when_short)
        num_blocks = -(-seq_len // block_size)
        front, back = (1, 1) if global_blocks == "ends" else (2, 0)
        sizes = (num_blocks, block_size, num_heads, num_random_blocks)
        if compat is None:
            plans = builders.bigbird_plans(*sizes, seed, front=front, back=back, full_when_short=full_when_short)
        else:
            check_choice("compat", compat, builders.COMPAT)
            builders.check_counts(max_position_embeddings=max_position_embeddings)
            if global_blocks != "ends":
                raise ValueError(f"compat is {compat!r}, global_blocks must be 'ends': the released code has no other")
            plans = builders.released_plan(*sizes, seed, compat, max_position_embeddings, full_when_short)
        return cls(seq_len, block_size, num_heads, front, back, builders.WINDOW, *plans, follows_length=compat is None)

    @classmethod
    def etc(cls, seq_len: int, block_size: int, num_heads: int, num_global_blocks: int) -> "BlockPattern":
        """BigBird ETC (section 2, appendix E): global tokens of their own before the text, a window of 3, no lists.

        `seq_len` counts the global tokens, which the caller puts in front: `num_global_blocks` blocks of them.
        """
        builders.check_counts(seq_len=seq_len, block_size=block_size, num_heads=num_heads)
        check_count("num_global_blocks", num_global_blocks, 0)
        num_blocks = -(-seq_len // block_size)
        if num_global_blocks > num_blocks:
            raise ValueError(
                f"num_global_blocks is {num_global_blocks}, the {seq_len} tokens of seq_len have {num_blocks} blocks "
                f"of {block_size}: seq_len counts the global tokens"
            )
        plans = ((no_lists(num_heads, num_blocks),), (0,) * (num_blocks + 1))
        return cls(seq_len, block_size, num_heads, num_global_blocks, 0, builders.WINDOW, *plans)

    @classmethod
    def uniform(
        cls,
        seq_len: int,
        block_size: int,
        num_heads: int,
        num_random_blocks: int,
        seed: int = 0,
        window: int = 3,
        front: int = 1,
        back: int = 1,
    ) -> "BlockPattern":
        """Global blocks, a window, and for each ordinary row random blocks from the whole sequence.

        `num_random_blocks` of those that the row does not see yet, or all of them where there are fewer, without
        replacement, every set as likely as every other: what section 2 of the paper describes, where the released plans
        stay within the first blocks.

        There is a draw for every length in blocks, or where there are more than 64, for about so many lengths in equal
        ratios, that of `seq_len` among them. An example of any other length takes the next shorter draw: its last
        blocks, less than a sixth where `seq_len` has up to 10,000, are no one's random blocks.
        """
        builders.check_counts(seq_len=seq_len, block_size=block_size, num_heads=num_heads)
        for name, value in {"num_random_blocks": num_random_blocks, "front": front, "back": back}.items():
            check_count(name, value, 0)
        builders.check_seed(seed)
        builders.check_window(window)
        num_blocks = -(-seq_len // block_size)
        plans = builders.uniform_plans(num_blocks, num_heads, num_random_blocks, seed, front, back, window)
        return cls(seq_len, block_size, num_heads, front, back, window, *plans)

    @classmethod
    def from_mask(
        cls,
        mask: torch.Tensor | np.ndarray,
        block_size: int,
        seq_len: int | None = None,
        num_heads: int | None = None,
    ) -> "BlockPattern":
        """Any pattern: row i sees block j where mask [N, N] or [H, N, N] is True, or as often as its integers say.

        seq_len: N * block_size if None, else of N blocks. num_heads: for a mask [N, N], which all heads share.
        """
        counts = builders.check_mask(mask, num_heads)
        num_blocks = counts.shape[-1]
        builders.check_counts(block_size=block_size)
        longest = num_blocks * block_size if seq_len is None else seq_len
        builders.check_counts(seq_len=longest)
        if -(-longest // block_size) != num_blocks:
            raise ValueError(
                f"mask is of {num_blocks} blocks, seq_len {longest} has {-(-longest // block_size)} of {block_size}"
            )
        plans = ((lists_of_counts(counts),), (0,) * (num_blocks + 1))
        return cls(longest, block_size, len(counts), 0, 0, 0, *plans)

    @classmethod
    def from_function(
        cls, function: Callable[[int, int], bool | int], seq_len: int, block_size: int, num_heads: int
    ) -> "BlockPattern":
        """Any pattern that all heads share: row i sees block j where function(i, j) is true, or that many times.

        The function is called with two ints for each of the N^2 pairs of blocks.
        """
        builders.check_counts(seq_len=seq_len, block_size=block_size, num_heads=num_heads)
        blocks = range(-(-seq_len // block_size))
        mask = np.array([[function(row, column) for column in blocks] for row in blocks])
        return cls.from_mask(mask, block_size, seq_len, num_heads)

    def shortened(self, num_blocks: int) -> "BlockPattern":
        """The same pattern for examples of at most `num_blocks` blocks."""
        plan_of_length = self.plan_of_length[: num_blocks + 1]
        used = sorted(set(plan_of_length))
        lists = tuple(first_rows(self.lists[plan], num_blocks) for plan in used)
        plans = tuple(used.index(plan) for plan in plan_of_length)
        ends = (self.front, self.back, self.window)
        return BlockPattern(num_blocks * self.block_size, self.block_size, self.num_heads, *ends, lists, plans)

    @property
    def num_blocks(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.seq_len // self.block_size)

    def blocks_of(self, seq_len: int) -> int:
        """Blocks of a sequence of `seq_len` tokens; ValueError where the pattern does not serve that length."""
        num_blocks = -(-seq_len // self.block_size)
        if seq_len > self.seq_len:
            raise ValueError(f"the sequence has {seq_len} tokens, the pattern is made for at most {self.seq_len}")
        if not self.follows_length and num_blocks != self.num_blocks:
            raise ValueError(
                f"the sequence has {seq_len} tokens, that is {num_blocks} blocks; this pattern, made with compat=, is "
                f"made for {self.num_blocks} blocks of {self.block_size} alone"
            )
        return num_blocks

    def counts(self, num_blocks: int) -> torch.Tensor:
        """int64 [H, n, n]: how often block j counts for row i of an example of n = `num_blocks` blocks."""
        served = range(self.num_blocks + 1) if self.follows_length else (self.num_blocks,)
        if num_blocks not in served:
            raise ValueError(f"num_blocks is {num_blocks}, the pattern is made for {served[0]} to {served[-1]} blocks")
        is_global, near = self.global_and_near(num_blocks)
        seen = is_global | is_global[:, None] | near
        counts = np.tile(seen.astype(np.int64), (self.num_heads, 1, 1))
        offsets, entries = (tensor.numpy() for tensor in self.lists[self.plan_of_length[num_blocks]])
        for head in range(self.num_heads):
            for row in np.flatnonzero(~is_global):
                listed = entries[offsets[head, row] : offsets[head, row + 1]]
                counts[head, row] += np.bincount(listed[listed < num_blocks], minlength=num_blocks)
        return torch.from_numpy(counts)

    def global_blocks(self, num_blocks: int) -> tuple[int, int]:
        """How many blocks at the start and at the end of an example of `num_blocks` are global."""
        return global_ends(num_blocks, self.front, self.back)

    def global_and_near(self, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
        """Of an example of n blocks: bool [n], which are global, and bool [n, n], whether j is in the window of i."""
        blocks = np.arange(num_blocks)
        distance = abs(blocks[:, None] - blocks)
        near = distance <= (self.window - 1) // 2 if self.window else np.zeros_like(distance, dtype=bool)
        return find_global(num_blocks, *self.global_blocks(num_blocks)), near

    def mask(self, seq_len: int) -> torch.Tensor:
        """bool [H, T, T], True where query token i sees key token j in a sequence without padding: for pictures."""
        seen = self.counts(self.blocks_of(seq_len)) > 0
        for dim in (1, 2):
            seen = seen.repeat_interleave(self.block_size, dim=dim).narrow(dim, 0, seq_len)
        return seen

    def num_pairs(self, seq_len: int) -> list[int]:
        """Query-key pairs of each head over `seq_len` tokens without padding, repetitions counted again."""
        check_count("seq_len", seq_len, 0)
        num_blocks = self.blocks_of(seq_len)
        front, back = self.global_blocks(num_blocks)
        sizes = np.full(num_blocks, self.block_size, dtype=np.int64)
        sizes[-1:] = seq_len - max(num_blocks - 1, 0) * self.block_size
        ordinary = slice(front, num_blocks - back)
        sums = np.concatenate([[0], sizes.cumsum()])
        first, last = window_ends(num_blocks, front, back, self.window)
        num_global = seq_len - sizes[ordinary].sum()
        shared = num_global * seq_len + (sizes * (num_global + sums[last] - sums[first]))[ordinary].sum()
        offsets, entries = (tensor.numpy() for tensor in self.lists[self.plan_of_length[num_blocks]])
        # an entry weighs as many pairs as its block has tokens times its row's, nothing past the end
        listed = np.append(sizes, np.zeros(self.num_blocks - num_blocks, dtype=np.int64))[entries]
        sums = np.concatenate([[0], listed.cumsum()])
        by_row = sums[offsets[:, 1 : num_blocks + 1]] - sums[offsets[:, :num_blocks]]  # [H, n]
        return [int(shared + pairs) for pairs in (by_row * sizes)[:, ordinary].sum(axis=1)]
