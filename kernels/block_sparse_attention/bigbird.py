"""BigBird's random blocks as released: two plans, drawn from NumPy's legacy generator, equal to the last bit.

Sources: google-research/bigbird, bigbird/core/attention.py; huggingface/transformers, modeling_big_bird.py, which has
the same functions. Both seed the global generator with the layer's index and draw all heads from the one stream; here
the generator is our own.
"""

import numpy as np

# lengths in tokens that use the old plan, "used in paper"; 2048 came later, and Hugging Face has not followed
OLD_PLAN_TOKENS = {"tf": (1024, 2048, 3072, 4096), "hf": (1024, 3072, 4096)}
GRID_TOKENS = 4096  # length the old plan is drawn for, whatever it is used for
FOCUS_TOKENS = 1024  # the old plan draws from the first so many tokens


def old_plan(num_grid_blocks: int, block_size: int, num_heads: int, num_random: int, seed: int) -> np.ndarray | None:
    """Slots int64 [H, G, r] of the old plan, drawn for G blocks; None where the released code stops.

    (`bigbird_block_rand_mask`.) Rows 0 and G - 1 are -1. Row i is the same whatever length uses it, as the draw is
    always that for G blocks. The last two rows may repeat blocks of their windows, and where the focus ends at the last
    block of a text that one is drawn too: both count again.
    """
    slots = np.full((num_heads, num_grid_blocks, num_random), -1)
    middle = np.arange(1, max(num_grid_blocks - 1, 1))
    last = FOCUS_TOKENS // block_size - 1 if 2 * block_size < FOCUS_TOKENS else num_grid_blocks - 1
    random = np.random.RandomState(seed)
    for head in range(num_heads):
        for row in range(1, num_grid_blocks - 1):
            if row > 2 and row >= num_grid_blocks - 3:
                candidates = middle[:last]
            else:
                candidates = np.concatenate([middle[: min(max(row - 2, 0), last)], middle[row + 1 : last]])
            drawn = random.permutation(candidates)[:num_random]
            if not _fits(len(drawn), num_random):
                return None
            slots[head, row] = drawn
    return slots


def new_plan(
    num_blocks: int, num_heads: int, num_random: int, seed: int, *, front: int = 1, back: int = 1
) -> np.ndarray | None:
    """Slots int64 [H, N, r] of the new plan for N blocks; None where the released code stops.

    (`get_rand_attn_plan`, `bigbird_block_rand_mask_with_head`.) Past 2 r + 5 blocks all are drawn from the first
    2 r + 5 and row i is the same for every N. Global rows are -1. `front` and `back` are the released function's own
    parameters for global blocks, which its callers leave at 1.
    """
    small, large = num_random + 5, 2 * num_random + 5
    if num_blocks > large:
        ends, shares = (0, large, num_blocks), (num_random, 0)
    elif num_blocks > small:
        ends, shares = (0, small, num_blocks), (num_random // 2, num_random - num_random // 2)
    else:
        ends, shares = (0, num_blocks), (num_random,)
    slots = np.full((num_heads, num_blocks, num_random), -1)
    random = np.random.RandomState(seed)
    # (rows, region) in the order in which the released loops draw them
    rows = [range(front, ends[1]), *(range(first, last) for first, last in zip(ends[1:], ends[2:], strict=False))]
    passes = [(0, 0), (0, 1), (1, 0), (1, 1)] if len(shares) == 2 else [(0, 0)]
    for part, region in passes:
        if not shares[region]:
            continue
        drawn = _draw_region(random, rows[part], ends[region : region + 2], num_heads, shares[region], front, back)
        if drawn is None:
            return None
        slot = sum(shares[:region])
        slots[:, rows[part], slot : slot + shares[region]] = drawn
    slots[:, num_blocks - back :] = -1
    return slots


def _draw_region(random, rows, region, num_heads, num_random, front, back):
    """[H, rows, r]: for each row and head the first r legal blocks of a permutation of the region, row by row.

    (`get_single_block_row_attention`.)
    """
    first, last = region
    permuted = np.array([[random.permutation(last - first) for _ in range(num_heads)] for _ in rows])
    if not len(rows):
        return np.zeros((num_heads, 0, num_random), dtype=np.int64)
    row, block = np.array(rows)[:, None], np.arange(first, last)
    illegal = (abs(block - row) <= 1) | (block < front) | (block >= last - back)
    illegal |= (row == 1) & (block == last - 2)
    illegal |= (row == last - 2) & (block == 1)
    num_legal = (~illegal).sum(axis=1)  # [rows]
    if not all(_fits(min(number, num_random), num_random) for number in num_legal):
        return None
    # legal ones first, in the order of the permutation
    order = np.take_along_axis(illegal[:, None, :].repeat(num_heads, axis=1), permuted, axis=2)
    order = order.argsort(axis=2, kind="stable")
    slots = np.minimum(np.arange(num_random), num_legal[:, None] - 1)  # [rows, r]
    places = np.take_along_axis(order, slots[:, None, :].repeat(num_heads, axis=1), axis=2)
    return first + np.take_along_axis(permuted, places, axis=2).transpose(1, 0, 2)


def _fits(number, num_random):
    """Whether NumPy assigns so many drawn blocks to r slots: a single one fills all of them."""
    return number in (1, num_random)
