"""Global tokens for the tests of window attention: index lists by name, cases with them, global rows by loops."""

import torch
from hypothesis import strategies as st

from tests.kernels.window import MASKS, make_inputs, make_valid

# "empty" has no column, "pads" nothing but -1; masks decide which of the others stand at a token that is not valid
GLOBAL_SETS = (
    "empty",
    "pads",
    "first",
    "last",
    "middle",
    "neighbours",
    "scattered",
    "ragged",
    "repeated",
    "out_of_range",
    "all",
    "shuffled",
)


def make_global_index(kind: str, batch: int, num_keys: int, seed: int = 0) -> torch.Tensor | None:
    """An index [batch, G] of global tokens among `num_keys` by name, unsorted and different from member to member."""
    if kind == "none":
        return None
    # not the seed of make_valid, or the tokens chosen first were the ones that are not valid
    generator = torch.Generator().manual_seed(1000 + seed)
    shuffled = torch.rand(batch, num_keys, generator=generator).argsort(dim=1)
    few = shuffled[:, : max(1, num_keys // 7)]
    if kind == "ragged":  # pads anywhere, another number of tokens in each member
        few = shuffled[:, : max(2, num_keys // 5)]
        return few.where(torch.rand(few.shape, generator=generator) < torch.linspace(0.2, 0.8, batch)[:, None], -1)
    if kind == "repeated":
        return torch.cat([few, few.flip(1), few[:, :1]], dim=1)
    if kind == "out_of_range":
        beyond = torch.tensor([num_keys, -7, num_keys + 3, 2**31 - 1, -(2**31)]).expand(batch, -1)
        return torch.cat([beyond[:, :2], few, beyond[:, 2:]], dim=1).to(torch.int32)
    columns = {
        "empty": [],
        "pads": [-1, -1, -1],
        "first": [0],
        "last": [num_keys - 1],
        "middle": [num_keys // 2],
        "neighbours": [num_keys // 3 + step for step in range(4) if num_keys // 3 + step < num_keys],
        "all": range(num_keys),
    }
    if kind in columns:
        return torch.tensor(list(columns[kind]), dtype=torch.int64).expand(batch, -1)
    return {"scattered": few, "shuffled": shuffled}[kind]


# name: rows, keys, query_start, heads, key heads, window, dilation, mask, global tokens
CASES = {
    "one_token": (1, 1, 0, 2, 2, 3, 1, "none", "all"),
    "one_token_masked": (1, 1, 0, 1, 1, 0, 2, "one_all_masked", "first"),
    "two_tokens": (2, 2, 0, 2, 2, 0, 1, "none", "repeated"),
    "no_column": (90, 90, 0, 2, 2, 5, [1, 3], "holes", "empty"),
    "only_pads": (90, 90, 0, 2, 2, 5, [1, 3], "holes", "pads"),
    "first_token": (131, 131, 0, 2, 2, 9, 1, "none", "first"),
    "last_token": (131, 131, 0, 2, 2, 9, [1, 4], "none", "last"),
    "inside_some_windows": (150, 150, 0, 2, 2, [7, 40], [1, 2], "none", "neighbours"),
    "window_0": (130, 130, 0, 2, 2, 0, 1, "none", "scattered"),
    "window_0_dilated": (67, 67, 0, 2, 2, [0, 2], [3, 1], "holes", "scattered"),
    "window_over_all": (70, 70, 0, 2, 2, [1000, 69], 1, "tail", "scattered"),
    "dilation_2": (129, 129, 0, 2, 2, 9, 2, "holes", "scattered"),
    "dilation_is_length": (12, 12, 0, 2, 2, 2, 12, "none", "all"),
    "dilation_beyond_text": (9, 9, 0, 2, 2, 3, [20, 9], "tail", "scattered"),
    "dilation_leaves_rest": (311, 311, 0, 1, 1, 30, 4, "tail", "repeated"),
    "dilation_isolated": (150, 150, 0, 2, 2, 5, 7, "isolated", "shuffled"),
    "mixed_heads": (131, 131, 0, 4, 4, [4, 0, 9, 4], [1, 3, 2, 1], "none", "ragged"),
    "mixed_heads_long": (303, 303, 0, 4, 4, [40, 3, 40, 3], [1, 5, 1, 5], "holes", "ragged"),
    "grouped_query": (140, 140, 0, 4, 2, 17, 1, "holes", "scattered"),
    "grouped_query_mixed": (140, 140, 0, 6, 3, [3, 8, 8, 3, 3, 8], [1, 2, 1, 2, 1, 1], "tail", "out_of_range"),
    "one_key_head": (90, 90, 0, 3, 1, 6, [1, 2, 1], "none", "middle"),
    "all_masked": (140, 140, 0, 2, 2, 12, [1, 2], "one_all_masked", "scattered"),
    "masked_globals": (140, 140, 0, 2, 2, 12, [1, 2], "isolated", "neighbours"),
    "every_key": (140, 140, 0, 2, 2, 12, [1, 3], "holes", "all"),
    "every_key_shuffled": (140, 140, 0, 2, 1, 12, [1, 3], "tail", "shuffled"),
    "one_row_at_the_end": (1, 40, 39, 2, 2, 5, [1, 3], "none", "scattered"),
    "one_row_at_the_start": (1, 40, 0, 2, 2, 5, 2, "holes", "all"),
    "rows_in_the_middle": (23, 101, 37, 2, 2, 9, [1, 2], "tail", "scattered"),
    "rows_at_the_end": (23, 101, 78, 4, 2, [9, 30, 9, 2], [1, 2, 4, 11], "holes", "ragged"),
    "many_rows_at_the_end": (200, 311, 111, 2, 1, [40, 13], [1, 3], "holes", "repeated"),
    "globals_beyond_any_reach": (5, 500, 300, 2, 2, 4, [1, 3], "tail", "shuffled"),
    "dilation_above_rows": (5, 100, 93, 2, 2, 6, [20, 13], "holes", "scattered"),
    "dilation_above_all": (4, 30, 20, 2, 2, 3, [1000, 31], "none", "shuffled"),
    "rows_run_past_the_keys": (20, 30, 20, 2, 2, 6, [1, 3], "holes", "scattered"),
    "rows_run_far_past_the_keys": (200, 90, 60, 2, 2, 12, [1, 2], "tail", "ragged"),
    "rows_beyond_every_window": (4, 30, 90, 2, 2, 5, [1, 2], "none", "scattered"),
    "rows_beyond_no_global": (4, 30, 90, 2, 2, 5, [1, 1000], "one_all_masked", "first"),
    "more_rows_than_keys": (140, 60, 0, 2, 2, 33, [1, 4], "tail", "out_of_range"),
}


def build(case, causal, dtype=torch.float64):
    """Inputs and options of window attention for a case."""
    seq_len, key_len, start, num_heads, key_heads, window, dilation, mask, kind = case
    inputs = make_inputs(
        seq_len, key_len=key_len, num_heads=num_heads, key_heads=key_heads, head_dim=3, dtype=dtype, seed=2
    )
    options = {"window": window, "dilation": dilation, "causal": causal, "query_start": start}
    valid, index = make_valid(mask, 2, key_len), make_global_index(kind, 2, key_len)
    return inputs, {**options, "valid": valid, "global_index": index}


@st.composite
def drawn_cases(draw, longest=150, widest=60):
    """(case, causal): lengths, starts, heads, windows, dilations, masks and global tokens that nobody thought of."""
    key_heads, repeats = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    num_heads = key_heads * repeats
    windows, dilations = st.integers(0, widest), st.sampled_from([1, 1, 2, 3, 5, 8, longest + 50])
    window = draw(windows | st.lists(windows, min_size=num_heads, max_size=num_heads))
    dilation = draw(dilations | st.lists(dilations, min_size=num_heads, max_size=num_heads))
    key_len = draw(st.integers(1, longest))
    # the rows of a whole text, or some rows anywhere
    rows = draw(st.just((key_len, 0)) | st.tuples(st.integers(1, longest), st.integers(0, longest + 20)))
    mask, kind = draw(st.sampled_from(MASKS)), draw(st.sampled_from(GLOBAL_SETS))
    return (rows[0], key_len, rows[1], num_heads, key_heads, window, dilation, mask, kind), draw(st.booleans())


# no row has no gradient to compare
ROW_SETS = tuple(kind for kind in GLOBAL_SETS if kind != "empty")
# name: keys, heads, key heads, head dim, mask, positions of the rows
ROW_CASES = {
    "only_pads": (40, 2, 2, 4, "holes", "pads"),
    "one_token": (1, 2, 2, 4, "none", "all"),
    "one_token_masked": (1, 2, 1, 3, "one_all_masked", "first"),
    "first": (77, 2, 2, 4, "none", "first"),
    "last": (77, 2, 2, 4, "tail", "last"),
    "middle": (300, 1, 1, 5, "holes", "middle"),
    "scattered": (201, 4, 4, 3, "holes", "scattered"),
    "ragged": (130, 2, 2, 7, "isolated", "ragged"),
    "repeated": (130, 2, 2, 4, "tail", "repeated"),
    "out_of_range": (65, 2, 2, 4, "holes", "out_of_range"),
    "every_token": (90, 2, 2, 4, "none", "shuffled"),
    "every_token_masked": (90, 2, 2, 1, "one_all_masked", "all"),
    "grouped_query": (120, 6, 2, 4, "holes", "scattered"),
    "one_key_head": (120, 3, 1, 4, "none", "ragged"),
}


def build_rows(case, causal, dtype=torch.float64):
    """Inputs and options of global rows for a case."""
    key_len, num_heads, key_heads, head_dim, mask, kind = case
    index = make_global_index(kind, 2, key_len)
    inputs = make_inputs(
        index.shape[1], key_len=key_len, num_heads=num_heads, key_heads=key_heads, head_dim=head_dim, dtype=dtype
    )
    inputs = {"query_global": inputs.pop("query"), **inputs}
    return inputs, {"global_index": index, "valid": make_valid(mask, 2, key_len), "causal": causal}


@st.composite
def drawn_row_cases(draw, longest=200):
    """(case, causal) of global rows."""
    key_heads, repeats = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    sizes = (draw(st.integers(1, longest)), key_heads * repeats, key_heads, draw(st.integers(1, 5)))
    return (*sizes, draw(st.sampled_from(MASKS)), draw(st.sampled_from(ROW_SETS))), draw(st.booleans())


def rows_by_loops(query_global, key, value, *, global_index, valid, causal):
    """Global rows written as the definition says: one row, one key at a time."""
    batch, num_rows, num_heads, head_dim = query_global.shape
    num_keys = key.shape[1]
    shared = num_heads // key.shape[2]
    out = query_global.new_zeros(query_global.shape)
    for b in range(batch):
        for g in range(num_rows):
            here = int(global_index[b, g])
            if not 0 <= here < num_keys or (valid is not None and not valid[b, here]):
                continue
            seen = [j for j in range(here + 1 if causal else num_keys) if valid is None or valid[b, j]]
            for h in range(num_heads):
                weights = (key[b, seen, h // shared] @ query_global[b, g, h] / head_dim**0.5).exp()
                out[b, g, h] = (weights / weights.sum()) @ value[b, seen, h // shared]
    return out
