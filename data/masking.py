"""Masked-language-model batches: 15 % of the tokens or words hidden anew in each epoch, the same on any worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from data.steps import MASK_STREAM, random_words

IGNORED = -100


class Row(NamedTuple):
    """One sample before masking: ids [length], and of a pair of segments its types [length] and its order."""

    ids: np.ndarray
    token_type_ids: np.ndarray | None = None
    order_label: int | None = None


@dataclass(frozen=True, eq=False)
class Masking:
    """What is masked, and by what.

    special_ids: ids that are neither masked nor put in the place of others; mask_id and pad_id among them or not.
    rate: share of the other tokens that is predicted; of these `keep` stay as they are, `random` become any ordinary
    id, the rest mask_id (0.8, as BERT has it). word_start: bool [vocab_size], the ids that begin a word; with it
    words are masked whole.
    """

    mask_id: int
    pad_id: int
    vocab_size: int
    special_ids: tuple[int, ...] = ()
    rate: float = 0.15
    keep: float = 0.1
    random: float = 0.1
    word_start: np.ndarray | None = None

    def __post_init__(self) -> None:
        specials = {*self.special_ids, self.mask_id, self.pad_id}
        if not all(0 <= number < self.vocab_size for number in specials):
            raise ValueError(f"special ids {sorted(specials)} must lie in 0..{self.vocab_size - 1} (vocab_size)")
        if len(specials) >= self.vocab_size:
            raise ValueError(f"vocab_size={self.vocab_size} leaves no ordinary id beside {len(specials)} special ones")
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate={self.rate} must lie above 0 and at most at 1")
        if min(self.keep, self.random) < 0 or self.keep + self.random > 1:
            raise ValueError(f"keep={self.keep} and random={self.random} must be shares that add up to 1 at most")
        if self.word_start is not None and self.word_start.shape != (self.vocab_size,):
            raise ValueError(f"word_start must be [{self.vocab_size}] (vocab_size), got {list(self.word_start.shape)}")
        object.__setattr__(self, "special_ids", tuple(sorted(specials)))

    def num_positions(self, num_maskable: int) -> int:
        """How many of so many tokens are predicted: the share, rounded, but one at least where there is any."""
        return max(1, round(self.rate * num_maskable)) if num_maskable else 0


@dataclass
class MaskedBatch:
    """Rows with hidden tokens, what they were, and in pairs which segment came first.

    input_ids: int64 [B, T]. valid: bool [B, T], False at padding. positions: int64 [B, P], where tokens are predicted,
    ascending; a row with fewer ends in zeros. targets: int64 [B, P], the ids there, IGNORED (-100) after a row's last.
    token_type_ids: int64 [B, T]. order_labels: int64 [B], 1 where the segments were swapped. num_targets: those that
    count, known to the host before the batch is on a device.
    """

    input_ids: torch.Tensor
    valid: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    token_type_ids: torch.Tensor | None = None
    order_labels: torch.Tensor | None = None
    num_targets: int = -1

    def __post_init__(self) -> None:
        if self.num_targets < 0:
            self.num_targets = int((self.targets != IGNORED).sum())

    def __len__(self) -> int:
        return len(self.input_ids)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Name -> tensor, of those there are."""
        return {name: tensor for name, tensor in vars(self).items() if isinstance(tensor, torch.Tensor)}

    def split(self, rows: int) -> list[MaskedBatch]:
        """Batches of `rows` rows each, the last maybe of fewer."""
        parts = {name: tensor.split(rows) for name, tensor in self.tensors().items()}
        return [MaskedBatch(**dict(zip(parts, pieces, strict=True))) for pieces in zip(*parts.values(), strict=True)]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> MaskedBatch:
        """The same batch on a device."""
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self.tensors().items()}
        return MaskedBatch(**moved, num_targets=self.num_targets)


def mask_tokens(ids: np.ndarray, *, draws: np.ndarray, masking: Masking) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hide tokens of one row: (input_ids [length], positions [P], targets [P]), all int64, positions ascending.

    ids: int [length]. draws: 3 * length random uint64, which decide alone (`random_words`).

    P is `masking.num_positions` of the tokens that are no special ids. Whole words are drawn until P tokens are
    reached; one that no longer fits is passed over, so rarely P is a little less, and where none fits the first is
    hidden in part. A word that a row begins in counts from the row's first token.
    """
    input_ids = ids.astype(np.int64)
    maskable = ~np.isin(input_ids, masking.special_ids)
    places = np.flatnonzero(maskable)
    num_positions = masking.num_positions(len(places))
    which, what, other = draws.reshape(3, len(ids))
    if masking.word_start is None:
        positions = np.sort(places[np.argsort(which[places], kind="stable")[:num_positions]])
    else:
        # counted too, a special token parts what stands on its sides
        word_of = np.cumsum(masking.word_start[input_ids] | ~maskable)
        positions = _whole_words(places, word_of[places], which, num_positions)
    targets = input_ids[positions]
    share = what[positions] / 2.0**64
    is_random = (share >= masking.keep) & (share < masking.keep + masking.random)
    input_ids[positions[share >= masking.keep + masking.random]] = masking.mask_id
    input_ids[positions[is_random]] = _ordinary_ids(other[positions[is_random]], masking)
    return input_ids, positions, targets


def mask_rows(
    rows: Sequence[Row],
    *,
    masking: Masking,
    seed: int,
    epoch_rows: Sequence[tuple[int, int]],
    seq_len: int | None = None,
) -> MaskedBatch:
    """Rows masked and padded to `seq_len` or, without it, to the longest.

    epoch_rows: (epoch, number in it) of each row, which with `seed` decide its masks. P is what a full row without
    special tokens would have, so that it depends on T alone.
    """
    length = seq_len or max(len(row.ids) for row in rows)
    input_ids = np.full((len(rows), length), masking.pad_id, np.int64)
    token_types = np.zeros((len(rows), length), np.int64)
    positions = np.zeros((len(rows), masking.num_positions(length)), np.int64)
    targets = np.full_like(positions, IGNORED)
    for number, (row, (epoch, place)) in enumerate(zip(rows, epoch_rows, strict=True)):
        draws = random_words(seed, epoch, 3 * len(row.ids), stream=MASK_STREAM, row=place)
        masked, where, what = mask_tokens(row.ids, draws=draws, masking=masking)
        input_ids[number, : len(masked)] = masked
        positions[number, : len(where)] = where
        targets[number, : len(what)] = what
        if row.token_type_ids is not None:
            token_types[number, : len(masked)] = row.token_type_ids
    lengths = np.array([len(row.ids) for row in rows])
    labels = [row.order_label for row in rows]
    in_pairs = labels[0] is not None
    return MaskedBatch(
        input_ids=torch.from_numpy(input_ids),
        valid=torch.from_numpy(np.arange(length) < lengths[:, None]),
        positions=torch.from_numpy(positions),
        targets=torch.from_numpy(targets),
        token_type_ids=torch.from_numpy(token_types) if in_pairs else None,
        order_labels=torch.tensor(labels) if in_pairs else None,
    )


def _whole_words(places: np.ndarray, word_of: np.ndarray, which: np.ndarray, num_positions: int) -> np.ndarray:
    """The positions, ascending, of words drawn until `num_positions` are full. word_of: of each place, its word."""
    _, first, lengths = np.unique(word_of, return_index=True, return_counts=True)
    taken, room = [], num_positions
    order = np.argsort(which[places[first]], kind="stable")
    for word in order:
        if lengths[word] <= room:
            taken.append(places[first[word] : first[word] + lengths[word]])
            room -= lengths[word]
            if not room:
                break
    if not taken and len(order):
        taken = [places[first[order[0]] : first[order[0]] + room]]
    return np.sort(np.concatenate([np.empty(0, np.int64), *taken]))


def _ordinary_ids(draws: np.ndarray, masking: Masking) -> np.ndarray:
    """Random ids that are not special, int64, one for each draw."""
    specials = np.array(masking.special_ids)
    ranks = (draws % np.uint64(masking.vocab_size - len(specials))).astype(np.int64)
    # the k-th special id moves all ranks on by one that are not below it
    return ranks + np.searchsorted(specials - np.arange(len(specials)), ranks, side="right")
