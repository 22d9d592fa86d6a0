"""A pattern named on the command line instead of an experiment: its options, its picture, its numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from reports.errors import ReportError
from reports.pattern_blocks import RANDOM, SEEN, block_numbers
from reports.pattern_landmarks import landmark_figure, landmark_numbers, segment_lengths
from reports.pattern_mosaic import MAX_CELLS, Panel, block_panels, mosaic_figure
from reports.pattern_numbers import head_groups, index_label
from reports.pattern_options import one_of, only_known, true_or_false, whole_number, whole_numbers
from reports.pattern_tables import counted, show_blocks, show_landmarks, show_windows
from reports.pattern_windows import window_cells, window_numbers
from reports.style import label_text

MAX_SEQ_LEN = 2**20
MAX_COUNTS = 2**26  # heads x query blocks x key blocks, each counted in eight bytes


@dataclass(frozen=True)
class Drawing:
    """A named pattern: `numbers` ready for JSON, `draw()` its picture, `show()` prints the numbers."""

    numbers: dict[str, Any]
    draw: Callable[[], Figure]
    show: Callable[[], None]


def drawing(kind: str, arguments: list[str]) -> Drawing:
    """The pattern that `pattern=kind` and its `key=value` arguments describe; ReportError names what is wrong."""
    options, make = _KINDS[one_of(kind, "pattern", _KINDS)]
    only_known(arguments, f"pattern={kind}", options)
    given = {}
    for argument in arguments:
        name, is_option, text = argument.partition("=")
        if not is_option:
            raise ReportError(f"{argument}: expected {name}=value")
        given[name] = options[name](text, name)
    try:
        return make(**given)
    except ValueError as error:  # a builder's refusal names argument, value and limit
        raise ReportError(f"pattern={kind}: {error}") from error


def _window(window=None, dilation=(1,), causal=False, num_heads=None, seq_len=None, **rest):
    from kernels.window_attention import WindowPattern

    global_positions = sorted(set(rest.get("global", ())))
    window = (8,) if window is None else window
    num_heads = num_heads or max(len(window), len(dilation))
    per_head = (values[0] if len(values) == 1 else values for values in (window, dilation))
    pattern = WindowPattern.of(*per_head, num_heads=num_heads, causal=causal)
    last = global_positions[-1] if global_positions else 0
    seq_len = seq_len or min(1 << (max(32, 4 * pattern.reach, last + 1) - 1).bit_length(), MAX_SEQ_LEN)
    if last >= seq_len:
        raise ReportError(f"global={last}: with seq_len={seq_len} positions go from 0 to {seq_len - 1:,}")
    return _of_windows(pattern, seq_len, global_positions)


def _full(seq_len=32, causal=False):
    from kernels.window_attention import WindowPattern

    return _of_windows(WindowPattern((seq_len,), (1,), causal), seq_len, [])


def _of_windows(pattern, seq_len, global_positions):
    numbers = window_numbers(pattern, seq_len, global_positions)

    def draw():
        cell = -(-seq_len // MAX_CELLS)
        panels = []
        for group in head_groups(pattern):
            shares = window_cells(group, seq_len, global_positions, causal=pattern.causal, cell=cell)
            panels.append(Panel(_window_title(group, pattern, seq_len), shares))
        kind = "full attention" if numbers["share_of_dense"] == 1 else "window attention"
        title = "causal " * pattern.causal + kind + " with global tokens" * bool(global_positions)
        return mosaic_figure(panels, seq_len, cell, title=title, note=_note(seq_len, cell, "pair"))

    return Drawing(numbers, draw, partial(show_windows, numbers))


def _window_title(group, pattern, seq_len):
    heads = "" if len(group.heads) == pattern.num_heads else f"{index_label('head', group.heads)}: "
    if group.window >= seq_len - 1 and group.dilation == 1:
        return f"{heads}full"
    return f"{heads}window {group.window:,}" + (f", dilation {group.dilation}" if group.dilation > 1 else "")


def _bigbird(seq_len=1024, num_heads=12, head=0, **given):
    from kernels.block_sparse_attention import BlockPattern

    name = f"BigBird{' as ' + given['compat'] if given.get('compat') else ''}"
    return _of_builder(BlockPattern.bigbird, name, seq_len, num_heads, head, **given)


def _etc(seq_len=1024, num_heads=12, num_global_blocks=2, **given):
    from kernels.block_sparse_attention import BlockPattern

    return _of_builder(BlockPattern.etc, "ETC", seq_len, num_heads, 0, num_global_blocks=num_global_blocks, **given)


def _uniform(seq_len=1024, num_heads=12, num_random_blocks=3, seed=0, head=0, **given):
    from kernels.block_sparse_attention import BlockPattern

    given |= {"num_random_blocks": num_random_blocks, "seed": seed}
    return _of_builder(BlockPattern.uniform, "uniform random blocks", seq_len, num_heads, head, **given)


def _of_builder(build, name, seq_len, num_heads, head, block_size=64, **given):
    _fits(f"seq_len={seq_len}", -(-seq_len // block_size), num_heads, block_size)
    pattern = build(seq_len=seq_len, block_size=block_size, num_heads=num_heads, **given)
    return _of_blocks(pattern, name, head, RANDOM)


def _mask(file=None, block_size=1, head=0, seq_len=None):
    import torch

    from kernels.block_sparse_attention import BlockPattern

    if file is None:
        raise ReportError("pattern=mask: file= is missing, a .npy or .csv file with a row of entries for each block")
    path = Path(file)
    mask = _read(path)
    if mask.ndim not in (2, 3) or mask.shape[-1] != mask.shape[-2] or not mask.size:
        shape = " x ".join(map(str, mask.shape))
        raise ReportError(f"file={file}: it holds {shape} entries, expected blocks x blocks or heads x blocks x blocks")
    if mask.dtype.kind not in "bui":
        raise ReportError(f"file={file}: it holds {mask.dtype} entries, expected true and false, or how often")
    mask = mask if mask.ndim == 3 else mask[None]
    _fits(f"file={file}", mask.shape[-1], len(mask), block_size)
    pattern = BlockPattern.from_mask(torch.from_numpy(mask.astype(np.int64)), block_size, seq_len)
    return _of_blocks(pattern, label_text(path.name), head, SEEN)


def _read(path):
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix == ".csv":
            return np.loadtxt(path, delimiter=",", dtype=np.int64, ndmin=2)
    except (OSError, EOFError, ValueError) as error:
        raise ReportError(f"file={path}: {error}") from error
    raise ReportError(f"file={path}: the mask is a .npy or a .csv file")


def _fits(given, num_blocks, num_heads, block_size):
    most = int((MAX_COUNTS / num_heads) ** 0.5)
    if num_blocks > most:
        blocks = f"{counted(num_blocks, 'block')} in {counted(num_heads, 'head')}"
        raise ReportError(
            f"{given}: {blocks} are too many to count, the limit is {most:,}, {most * block_size:,} tokens"
        )


def _of_blocks(pattern, name, head, listed):
    if head >= pattern.num_heads:
        raise ReportError(f"head={head}: heads go from 0 to {pattern.num_heads - 1}")
    counts = np.asarray(pattern.counts(pattern.num_blocks))
    numbers = block_numbers(pattern, counts, listed)

    def draw():
        panels, blocks = block_panels(pattern, counts[head], listed)
        is_same = (counts == counts[head]).all()
        heads = "" if pattern.num_heads == 1 else ", all heads" if is_same else f", head {head} of {pattern.num_heads}"
        blocks_of = f"{counted(pattern.num_blocks, 'block')} of {counted(pattern.block_size, 'position')}"
        title = f"{name}, {blocks_of}{heads}"
        note = _note(pattern.seq_len, blocks, "block")
        return mosaic_figure(panels, pattern.seq_len, blocks * pattern.block_size, title=title, note=note)

    return Drawing(numbers, draw, partial(show_blocks, numbers))


def _nystrom(seq_len=1024, num_landmarks=64):
    if seq_len <= num_landmarks:  # every token is a landmark: plain softmax attention
        return _full(seq_len)
    lengths = segment_lengths(seq_len, num_landmarks)
    numbers = landmark_numbers(lengths)
    return Drawing(numbers, partial(landmark_figure, lengths), partial(show_landmarks, numbers))


def _note(seq_len, cell, unit):
    every = f"every {unit} drawn" if cell == 1 else f"cells of {cell} × {cell} {unit}s, paler where not all are seen"
    return f"row of {counted(seq_len, 'position')}, {every}"


_SEQ_LEN = partial(whole_number, low=1, high=MAX_SEQ_LEN)
_HEADS = partial(whole_number, low=1, high=1024)
_HEAD = partial(whole_number, low=0, high=1023)
_BLOCKS = partial(whole_number, low=0, high=MAX_SEQ_LEN)
_SEED = partial(whole_number, low=0, high=2**32 - 1)
_BLOCKED = {"seq_len": _SEQ_LEN, "block_size": _SEQ_LEN, "num_heads": _HEADS}
_KINDS: dict[str, tuple[dict[str, Callable[..., Any]], Callable[..., Drawing]]] = {
    "full": ({"seq_len": _SEQ_LEN, "causal": true_or_false}, _full),
    "window": (
        {
            "window": partial(whole_numbers, low=0, high=MAX_SEQ_LEN),
            "dilation": partial(whole_numbers, low=1, high=MAX_SEQ_LEN),
            "global": partial(whole_numbers, low=0, high=MAX_SEQ_LEN - 1),
            "causal": true_or_false,
            "num_heads": _HEADS,
            "seq_len": _SEQ_LEN,
        },
        _window,
    ),
    "bigbird": (
        {
            **_BLOCKED,
            "num_random_blocks": _BLOCKS,
            "seed": _SEED,
            "compat": partial(one_of, choices=("tf", "hf_train", "hf_eval")),
            "max_position_embeddings": _SEQ_LEN,
            "global_blocks": partial(one_of, choices=("ends", "front")),
            "full_when_short": true_or_false,
            "head": _HEAD,
        },
        _bigbird,
    ),
    "etc": ({**_BLOCKED, "num_global_blocks": _BLOCKS}, _etc),
    "uniform": (
        {
            **_BLOCKED,
            "num_random_blocks": _BLOCKS,
            "seed": _SEED,
            "window": _BLOCKS,
            "front": _BLOCKS,
            "back": _BLOCKS,
            "head": _HEAD,
        },
        _uniform,
    ),
    "mask": ({"file": lambda text, name: text, "block_size": _SEQ_LEN, "seq_len": _SEQ_LEN, "head": _HEAD}, _mask),
    "nystrom": ({"seq_len": _SEQ_LEN, "num_landmarks": _SEQ_LEN}, _nystrom),
}
