"""What the tests of block-sparse attention share: patterns and cases by name, masks, an implementation by loops."""

import torch
from hypothesis import strategies as st

from kernels.block_sparse_attention import BlockPattern
from kernels.dropout import keep_mask
from tests.kernels.window import MASKS, make_inputs, make_valid

# "ragged": every member of the batch has a length of its own, in blocks too
BLOCK_MASKS = (*MASKS, "ragged")


def make_block_valid(kind: str, batch: int, seq_len: int, seed: int = 0) -> torch.Tensor | None:
    """A `valid` mask [batch, seq_len] by name."""
    if kind != "ragged":
        return make_valid(kind, batch, seq_len, seed)
    lengths = torch.randint(0, seq_len + 1, (batch, 1), generator=torch.Generator().manual_seed(seed + batch))
    return torch.arange(seq_len) < lengths


def random_counts(num_heads: int, num_blocks: int, seed: int = 0) -> torch.Tensor:
    """A pattern without order, int64 [H, N, N]: empty rows, empty columns, a full column, repetitions."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_heads, num_blocks, num_blocks)
    counts = torch.randint(0, 4, shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.3)
    counts[:, num_blocks // 3] = 0
    counts[:, :, num_blocks // 2] = 0
    counts[:, :, num_blocks // 4] = 1
    counts[-1, -1] = 2
    return counts


def sees(row: int, column: int) -> bool:
    """Neighbours, and every third block: the local + strided pattern of the documentation."""
    return abs(row - column) <= 1 or column % 3 == 2


KINDS = (
    "bigbird",
    "no_random",
    "many_random",
    "front",
    "full_when_short",
    "tf",
    "hf_train",
    "hf_eval",
    "etc",
    "uniform",
    "uniform_wide",
    "only_random",
    "counts",
    "strided",
    "everything",
    "nothing",
)
FIXED_LENGTH = ("tf", "hf_train", "hf_eval")  # serve one number of blocks, which must be at least 2 r + 6 to be drawn


def make_pattern(kind: str, seq_len: int, block_size: int, num_heads: int, seed: int = 0) -> BlockPattern:
    """A pattern by name, with one random block a row unless the name says otherwise."""
    sizes = (seq_len, block_size, num_heads)
    num_blocks = -(-seq_len // block_size)
    if kind in FIXED_LENGTH:
        return BlockPattern.bigbird(*sizes, 1, seed, compat=kind)
    builders = {
        "bigbird": lambda: BlockPattern.bigbird(*sizes, 1, seed),
        "no_random": lambda: BlockPattern.bigbird(*sizes, 0, seed),
        "many_random": lambda: BlockPattern.bigbird(*sizes, 3, seed),
        "front": lambda: BlockPattern.bigbird(*sizes, 1, seed, global_blocks="front"),
        "full_when_short": lambda: BlockPattern.bigbird(*sizes, 1, seed, full_when_short=True),
        "etc": lambda: BlockPattern.etc(*sizes, min(2, num_blocks)),
        "uniform": lambda: BlockPattern.uniform(*sizes, 2, seed),
        "uniform_wide": lambda: BlockPattern.uniform(*sizes, 1, seed, window=5, front=2, back=3),
        "only_random": lambda: BlockPattern.uniform(*sizes, 3, seed, window=0, front=0, back=0),
        "counts": lambda: BlockPattern.from_mask(random_counts(num_heads, num_blocks, seed), block_size, seq_len),
        "strided": lambda: BlockPattern.from_function(sees, *sizes),
        "everything": lambda: BlockPattern.from_function(lambda row, column: True, *sizes),
        "nothing": lambda: BlockPattern.from_function(lambda row, column: False, *sizes),
    }
    return builders[kind]()


# name: pattern, blocks of the sequence, tokens that its last block lacks, blocks of the pattern, heads, mask
CASES = {
    "one_token": ("bigbird", 1, 99, 1, 2, "none"),
    "one_block": ("bigbird", 1, 0, 3, 2, "none"),
    "one_block_cut": ("bigbird", 1, 1, 9, 2, "tail"),
    "two_blocks": ("bigbird", 2, 1, 2, 2, "holes"),
    "three_blocks": ("bigbird", 3, 2, 9, 2, "none"),
    "four_blocks": ("many_random", 4, 0, 4, 2, "tail"),
    "five_blocks": ("many_random", 5, 1, 5, 2, "none"),
    "six_blocks": ("bigbird", 6, 1, 9, 2, "ragged"),
    "short_and_full": ("full_when_short", 7, 0, 9, 2, "ragged"),
    "first_of_the_new_plan": ("bigbird", 8, 1, 8, 2, "ragged"),
    "long": ("bigbird", 21, 1, 30, 1, "none"),
    "long_ragged": ("many_random", 23, 3, 23, 2, "ragged"),
    "all_masked": ("bigbird", 9, 2, 12, 2, "one_all_masked"),
    "isolated": ("many_random", 13, 1, 13, 2, "isolated"),
    "no_random": ("no_random", 10, 1, 12, 2, "holes"),
    "front": ("front", 9, 1, 11, 2, "ragged"),
    "front_of_two": ("front", 2, 1, 11, 2, "none"),
    "tf": ("tf", 9, 1, 9, 2, "tail"),
    "hf_train": ("hf_train", 10, 0, 10, 2, "ragged"),
    "hf_eval": ("hf_eval", 9, 1, 9, 2, "ragged"),
    "etc": ("etc", 7, 1, 9, 2, "ragged"),
    "uniform": ("uniform", 11, 2, 11, 2, "ragged"),
    "uniform_wide": ("uniform_wide", 12, 1, 14, 2, "ragged"),
    "uniform_wide_short": ("uniform_wide", 4, 1, 14, 2, "ragged"),
    "only_random": ("only_random", 9, 1, 9, 2, "holes"),
    "counts": ("counts", 9, 1, 9, 2, "none"),
    "counts_ragged": ("counts", 8, 2, 10, 3, "ragged"),
    "strided": ("strided", 9, 1, 10, 2, "tail"),
    "everything": ("everything", 5, 1, 6, 2, "holes"),
    "nothing": ("nothing", 3, 1, 3, 2, "none"),
}


def build(
    case: tuple,
    block_size: int = 4,
    head_dim: int = 3,
    dtype: torch.dtype = torch.float64,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[dict, dict]:
    """Inputs and options of block-sparse attention for a case."""
    kind, num_blocks, lacking, pattern_blocks, num_heads, mask = case
    seq_len = max((num_blocks - 1) * block_size + 1, num_blocks * block_size - lacking)
    pattern_len = seq_len if pattern_blocks == num_blocks else pattern_blocks * block_size
    inputs = make_inputs(seq_len, num_heads=num_heads, head_dim=head_dim, dtype=dtype, seed=seed)
    options = {
        "pattern": make_pattern(kind, pattern_len, block_size, num_heads, seed),
        "valid": make_block_valid(mask, 2, seq_len, seed),
    }
    if dropout:
        options |= {"dropout": dropout, "dropout_seed": torch.tensor([7 + seed])}
    return inputs, options


@st.composite
def drawn_cases(draw, most_blocks=14):
    """Patterns, lengths, heads and masks that nobody thought of."""
    kind = draw(st.sampled_from(KINDS))
    num_blocks = draw(st.integers(8 if kind in FIXED_LENGTH else 1, most_blocks))
    pattern_blocks = num_blocks if kind in FIXED_LENGTH else num_blocks + draw(st.integers(0, 4))
    mask = draw(st.sampled_from(BLOCK_MASKS))
    return (kind, num_blocks, draw(st.integers(0, 5)), pattern_blocks, draw(st.integers(1, 3)), mask)


def by_loops(query, key, value, *, pattern, valid=None, dropout=0.0, dropout_seed=None):
    """Block-sparse attention written as the definition says: one row, one visit of a key at a time."""
    batch, seq_len, num_heads, head_dim = query.shape
    block_size = pattern.block_size
    rows = []
    for b in range(batch):
        real = [valid is None or bool(valid[b, i]) for i in range(seq_len)]
        num_tokens = seq_len
        while pattern.follows_length and num_tokens and not real[num_tokens - 1]:
            num_tokens -= 1
        num_blocks = -(-num_tokens // block_size)
        for i in range(seq_len):
            for h in range(num_heads):
                scores, values, kept = [], [], []
                for block in blocks_seen(pattern, num_blocks, h, i // block_size) if real[i] else []:
                    for j in range(block * block_size, min((block + 1) * block_size, seq_len)):
                        if real[j]:
                            scores.append(torch.dot(query[b, i, h], key[b, j, h]) / head_dim**0.5)
                            values.append(value[b, j, h])
                            where = torch.tensor(i), torch.tensor(j)
                            keep = not dropout or keep_mask(dropout_seed, b * num_heads + h, *where, dropout).item()
                            kept.append(keep / (1 - dropout))
                if scores:
                    weights = torch.stack(scores).softmax(dim=0) * torch.tensor(kept, dtype=query.dtype)
                    rows.append(weights @ torch.stack(values))
                else:
                    rows.append(query.new_zeros(head_dim))
    return torch.stack(rows).view(query.shape)


def blocks_seen(pattern: BlockPattern, num_blocks: int, head: int, row: int) -> list[int]:
    """Key blocks that a row of blocks visits in an example of `num_blocks`, in the order of the definition."""
    if row >= num_blocks:
        return []
    front = set(range(min(pattern.front, num_blocks)))
    back = set(range(max(num_blocks - pattern.back, len(front)), num_blocks))
    if row in front | back:
        return list(range(num_blocks))
    half = pattern.window // 2
    window = range(row - half, row + half + 1) if pattern.window else ()
    near = [block for block in window if 0 <= block < num_blocks and block not in front | back]
    offsets, blocks = pattern.lists[pattern.plan_of_length[num_blocks]]
    listed = blocks[offsets[head, row] : offsets[head, row + 1]].tolist()
    return sorted(front) + near + sorted(back) + [block for block in listed if block < num_blocks]
