"""Which characters of a long text are scored after how much context, and their nats by window or by stream."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

PROTOCOLS = ("auto", "streaming", "windowed", "uncut")


def choose_protocol(protocol: str, *, context: int, stride: int, receptive_field: int) -> str:
    """The protocol to use: "auto" streams where every scored character then sees what it sees in its window."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol is {protocol!r}, it must be one of {', '.join(PROTOCOLS)}")
    if stride > context:
        raise ValueError(f"a stride of {stride} leaves gaps between windows with a context of {context}")
    if protocol != "auto":
        return protocol
    return "streaming" if receptive_field <= context - stride else "windowed"


def nats_by_stream(model: Any, text: np.ndarray, start: int, end: int, *, piece: int) -> Iterator[torch.Tensor]:
    """Nats [N] of characters start + 1 .. end of a text, each read once, in pieces of up to `piece` characters.

    The model's rolling cache carries what a piece must know of those before it. It is warmed with as many characters
    before `start` as the model can look back, so that a text may be scored in stretches.
    """
    cache = model.new_cache(1)
    for first in range(max(0, start - model.receptive_field), end, piece):
        last = min(first + piece, end)
        ids = _rows(model, [text[first : last + 1]])
        logits = model(ids[:, :-1], cache=cache)
        if last > start:
            before = max(start - first, 0)
            yield _nats(logits[:, before:], ids[:, before + 1 :])


def nats_by_window(model: Any, text: np.ndarray, batches: list[list[tuple[int, int, int]]]) -> Iterator[torch.Tensor]:
    """Nats [N] of each batch of spans, from a window of its own for each of them."""
    for batch in batches:
        begin, start, _ = batch[0]
        ids = _rows(model, [text[first : last + 1] for first, _, last in batch])
        yield _nats(model(ids[:, :-1])[:, start - begin :], ids[:, 1 + start - begin :])


def _rows(model, texts):
    rows = torch.from_numpy(np.stack(texts).astype(np.int64))
    return rows.to(next(model.parameters()).device)


def _nats(logits, targets):
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")


def scoring_spans(num_targets: int, *, context: int, stride: int, receptive_field: int) -> list[tuple[int, int, int]]:
    """(begin, start, end): positions begin..end - 1 are read, start..end - 1 scored; together each position once.

    The paper's windows are `context` long and `stride` apart and their last `stride` positions count; the first
    window counts whole, and what is left at the end is scored by one more window. A model that looks back
    `receptive_field` characters gives the same logits from a window cut to that many before the scored ones.
    """
    if receptive_field <= context - stride:
        starts = range(0, num_targets, stride)
        return [(max(0, start - receptive_field), start, min(start + stride, num_targets)) for start in starts]
    spans = [(0, 0, min(context, num_targets))]
    for start in range(context, num_targets, stride):
        end = min(start + stride, num_targets)
        spans.append((end - context, start, end))
    return spans


def span_batches(spans: list[tuple[int, int, int]], batch_tokens: int) -> Iterator[list[tuple[int, int, int]]]:
    """Neighbouring spans of one shape, as many as fit in `batch_tokens` positions, at least one."""
    for (length, _), group in groupby(spans, key=lambda span: (span[2] - span[0], span[1] - span[0])):
        group = list(group)
        size = max(1, batch_tokens // length)
        for first in range(0, len(group), size):
            yield group[first : first + size]
