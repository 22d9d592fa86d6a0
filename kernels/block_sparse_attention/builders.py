"""The plans of lists behind the builders of `BlockPattern`, and what the builders refuse."""

import numpy as np
import torch

from kernels.block_sparse_attention.bigbird import FOCUS_TOKENS, GRID_TOKENS, OLD_PLAN_TOKENS, new_plan, old_plan
from kernels.block_sparse_attention.lists import (
    BlockLists,
    draw_unseen,
    global_ends,
    lists_of_counts,
    lists_of_slots,
    unseen,
)
from kernels.checks import check_count

COMPAT = ("tf", "hf_train", "hf_eval")
LEAST_RELEASED = 4  # blocks: the released code computes rows 0, 1, N - 2 and N - 1 by themselves
MAX_UNIFORM_PLANS = 64
WINDOW = 3  # blocks of BigBird's window

Plans = tuple[tuple[BlockLists, ...], tuple[int, ...]]  # lists and plan_of_length of a pattern


def bigbird_plans(
    num_blocks: int,
    block_size: int,
    num_heads: int,
    num_random: int,
    seed: int,
    *,
    front: int,
    back: int,
    full_when_short: bool,
) -> Plans:
    """One plan for each of the released kinds and one for each length too short for them: `BlockPattern.bigbird`.

    Both released plans are drawn so that row i is the same at every length, so one of each serves all of theirs.
    """
    short = longest_short(num_random)
    # the released function of the old plan knows no other global blocks than one at each end
    old_tokens = OLD_PLAN_TOKENS["tf"] if back else ()
    old_lengths = {tokens // block_size for tokens in old_tokens if tokens % block_size == 0}
    released = {}
    if num_blocks > short:
        released["new"] = new_plan(num_blocks, num_heads, num_random, seed, front=front, back=back)
    if any(length <= num_blocks for length in old_lengths):
        released["old"] = old_plan(GRID_TOKENS // block_size, block_size, num_heads, num_random, seed)

    def kind_of(length):
        if length <= short and full_when_short:
            return length
        if length in old_lengths and released.get("old") is not None:
            return "old"
        return length if length <= short else "new"

    def lists_of(kind):
        if kind in released:
            return lists_of_slots(released[kind][:, :num_blocks], num_blocks)
        ends = global_ends(kind, front, back)
        if full_when_short:
            return _everything_else(num_heads, num_blocks, kind, *ends)
        random = np.random.RandomState([seed, kind])
        return lists_of_slots(draw_unseen(random, num_heads, kind, num_random, *ends, WINDOW), num_blocks)

    return _plans([kind_of(length) for length in range(num_blocks + 1)], lists_of)


def released_plan(
    num_blocks: int,
    block_size: int,
    num_heads: int,
    num_random: int,
    seed: int,
    compat: str,
    max_position_embeddings: int,
    full_when_short: bool,
) -> Plans:
    """The one plan of the released code for N blocks; ValueError where it has none: `BlockPattern.bigbird`."""
    one_plan = (0,) * (num_blocks + 1)
    if full_when_short and num_blocks <= longest_short(num_random):
        return (_everything_else(num_heads, num_blocks, num_blocks, *global_ends(num_blocks, 1, 1)),), one_plan
    tokens = num_blocks * block_size
    is_old = tokens in OLD_PLAN_TOKENS[compat.split("_")[0]]
    slots = None
    if num_blocks < LEAST_RELEASED:
        pass
    elif compat == "hf_eval":
        slots = np.zeros((num_heads, num_blocks, num_random), dtype=np.int64)
    elif is_old:
        grid_tokens = GRID_TOKENS if compat == "tf" else max_position_embeddings
        if grid_tokens // block_size < num_blocks:
            raise ValueError(
                f"max_position_embeddings is {max_position_embeddings}, with compat {compat!r} it must be at least the "
                f"{tokens} tokens of the sequence"
            )
        slots = old_plan(grid_tokens // block_size, block_size, num_heads, num_random, seed)
    else:
        slots = new_plan(num_blocks, num_heads, num_random, seed)
    if slots is None:
        reason = _why_released_stops(compat, block_size, num_random, is_old)
        raise ValueError(
            f"seq_len is {num_blocks} blocks of {block_size}: with compat {compat!r} and num_random_blocks "
            f"{num_random} the released code stops there, {reason} (full_when_short=True lets short ones see "
            "everything, compat=None draws from what there is)"
        )
    slots = slots[:, :num_blocks].copy()
    slots[:, [0, -1]] = -1
    return (lists_of_slots(slots, num_blocks),), one_plan


def _why_released_stops(compat, block_size, num_random, is_old):
    if is_old and compat != "hf_eval":
        return f"as its old plan has too few blocks to draw from in the first {FOCUS_TOKENS} tokens"
    if compat == "hf_eval":
        return f"it needs {LEAST_RELEASED} blocks, {LEAST_RELEASED * block_size} tokens"
    longest = longest_short(num_random)
    return f"as in some other lengths of up to {longest} blocks, {longest * block_size} tokens"


def uniform_plans(
    num_blocks: int, num_heads: int, num_random: int, seed: int, front: int, back: int, window: int
) -> Plans:
    """A draw from the whole sequence for each of up to MAX_UNIFORM_PLANS lengths: `BlockPattern.uniform`."""
    if num_blocks <= MAX_UNIFORM_PLANS:
        drawn = np.arange(1, num_blocks + 1)
    else:
        drawn = np.unique(np.geomspace(1, num_blocks, MAX_UNIFORM_PLANS).round().astype(np.int64))
    # an example longer than the draw has ordinary rows past it
    num_rows = dict(zip(drawn.tolist(), [*(drawn[1:] - 1).tolist(), num_blocks], strict=True))

    def lists_of(length):
        random, ends = np.random.RandomState([seed, length]), global_ends(length, front, back)
        slots = draw_unseen(random, num_heads, length, num_random, *ends, window, num_rows[length])
        return lists_of_slots(slots, num_blocks)

    places = np.searchsorted(drawn, np.arange(num_blocks + 1), side="right") - 1
    return _plans(drawn[np.maximum(places, 0)].tolist(), lists_of)


def longest_short(num_random: int) -> int:
    """Blocks up to which the new plan has too few to draw from, and Hugging Face's model falls back to full attention.

    (Its threshold is (5 + 2 r) * block_size tokens: modeling_big_bird.py, BigBirdModel.forward.)
    """
    return 2 * num_random + 5


def _plans(kinds, lists_of):
    """One plan for each kind, in the order in which the lengths 0, 1, … come to it."""
    order = {kind: index for index, kind in enumerate(dict.fromkeys(kinds))}
    return tuple(map(lists_of, order)), tuple(order[kind] for kind in kinds)


def _everything_else(num_heads, num_blocks, length, front, back):
    """Lists over N blocks of what the rows of an example of `length` blocks do not see otherwise."""
    counts = np.zeros((num_heads, num_blocks, num_blocks), dtype=np.int64)
    counts[:, :length, :length] = unseen(length, front, back, WINDOW)
    return lists_of_counts(counts)


def check_counts(**values: int) -> None:
    """ValueError naming the first that is no whole number of at least 1."""
    for name, value in values.items():
        check_count(name, value, 1)


def check_seed(seed: int) -> None:
    """ValueError unless NumPy's legacy generator takes it."""
    check_count("seed", seed, 0)
    if seed >= 2**32:
        raise ValueError(f"seed is {seed}, it must be at most {2**32 - 1}")


def check_window(window: int) -> None:
    """ValueError unless `window` is odd or 0."""
    check_count("window", window, 0)
    if window and window % 2 == 0:
        raise ValueError(f"window is {window} blocks, it must be odd (the row's own and as many on each side) or 0")


def check_mask(mask: torch.Tensor | np.ndarray, num_heads: int | None) -> np.ndarray:
    """int64 [H, N, N] from a bool or integer mask [N, N] or [H, N, N]; ValueError where it is something else."""
    counts = mask.detach().cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
    if counts.dtype.kind not in "biu":
        raise ValueError(f"mask must be bool or integer (how often a block counts), got {counts.dtype}")
    if counts.ndim not in (2, 3) or counts.shape[-1] != counts.shape[-2] or not counts.size:
        raise ValueError(f"mask must be [N, N] or [H, N, N] (rows, columns of blocks), got {counts.shape}")
    if counts.ndim == 2 and num_heads is None:
        raise ValueError("num_heads must be given for a mask [N, N], which all heads share")
    if num_heads is not None:
        check_count("num_heads", num_heads, 1)
        if counts.ndim == 3 and len(counts) != num_heads:
            raise ValueError(f"mask {counts.shape} is of {len(counts)} heads, num_heads is {num_heads}")
    counts = counts.astype(np.int64)
    if counts.min() < 0:
        raise ValueError(f"mask holds {counts.min()}, a block counts 0 times or more")
    return counts if num_heads is None else np.broadcast_to(counts, (num_heads, *counts.shape[-2:]))


def check_lists(plan: int, lists: BlockLists, num_heads: int, num_blocks: int) -> None:
    """ValueError where a plan of lists is not CSR over [H, N] of blocks below N."""
    if any(tensor.dtype != torch.int32 or tensor.device.type != "cpu" for tensor in lists):
        kinds = ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in lists)
        raise ValueError(f"lists of plan {plan} must be int32 on the CPU, got {kinds}")
    offsets, blocks = (tensor.numpy() for tensor in lists)
    if offsets.shape != (num_heads, num_blocks + 1) or blocks.ndim != 1:
        raise ValueError(
            f"row_offsets of plan {plan} must be {(num_heads, num_blocks + 1)} (heads, blocks + 1) and row_blocks "
            f"flat, got {offsets.shape} and {blocks.shape}"
        )
    joined = (offsets[1:, 0] == offsets[:-1, -1]).all() and (np.diff(offsets, axis=1) >= 0).all()
    if not joined or offsets[0, 0] != 0 or offsets[-1, -1] != len(blocks):
        raise ValueError(f"row_offsets of plan {plan} must rise from 0 to the {len(blocks)} entries of row_blocks")
    if len(blocks) and not 0 <= blocks.min() <= blocks.max() < num_blocks:
        raise ValueError(f"row_blocks of plan {plan} must lie in 0 … {num_blocks - 1}, some do not")
