"""A dilation d splits a sequence into its d residue classes, each an undilated window problem on every d-th token."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Residues:
    """Neighbouring residue classes of a dilation whose problems have one size.

    Class c holds the rows first_row + c, first_row + c + dilation, … and the keys first_key + c, first_key + c +
    dilation, …; its first row stands at its key number `start`.
    """

    dilation: int
    num_classes: int
    first_row: int
    num_rows: int
    first_key: int
    num_keys: int
    start: int

    def rows_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """[B, T, H, D] -> [B, classes, H, N, D]."""
        return self._every(tensor, self.first_row, self.num_rows)

    def keys_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """[B, S, H, D] -> [B, classes, H, K, D]."""
        return self._every(tensor, self.first_key, self.num_keys)

    def _every(self, tensor, first, count):
        stop = first + count * self.dilation
        if stop <= tensor.shape[1]:
            steps = tensor[:, first:stop].unflatten(1, (count, self.dilation))[:, :, : self.num_classes]
        elif count == 0:
            steps = tensor[:, :0, None].expand(-1, -1, self.num_classes, -1, -1)
        else:  # the last step is cut
            stop -= self.dilation
            steps = tensor[:, first:stop].unflatten(1, (count - 1, self.dilation))[:, :, : self.num_classes]
            steps = torch.cat([steps, tensor[:, None, stop : stop + self.num_classes]], dim=1)
        return steps.permute(0, 2, 3, 1, 4)


def residue_ranges(seq_len: int, num_keys: int, start: int, dilation: int) -> Iterator["Residues"]:
    """The classes of `dilation` that hold a row, in ranges of one size, those with most rows first.

    T = `seq_len` rows stand from key number `start` on among S = `num_keys` keys.
    """
    steps, offset = divmod(start, dilation)
    num_classes = min(dilation, seq_len)
    # where the classes' rows become one fewer, where their keys begin at the front again, where those become one fewer
    cuts = {seq_len % dilation, dilation - offset, (num_keys - offset) % dilation}
    bounds = sorted({0, num_classes} | {cut for cut in cuts if 0 < cut < num_classes})
    for first, last in zip(bounds, bounds[1:], strict=False):
        wraps = first + offset >= dilation
        first_key = first + offset - (dilation if wraps else 0)
        yield Residues(
            dilation=dilation,
            num_classes=last - first,
            first_row=first,
            num_rows=-(-(seq_len - first) // dilation),
            first_key=first_key,
            num_keys=max(0, -(-(num_keys - first_key) // dilation)),
            start=steps + wraps,
        )


def join_residues(groups: list[torch.Tensor], seq_len: int) -> torch.Tensor:
    """[[B, classes, H, N, D], …] of all classes, the longer ones first -> [B, T, H, D]."""
    if len(groups) == 1 and groups[0].shape[1] == 1:
        return groups[0][:, 0].transpose(1, 2)
    length = groups[-1].shape[3]
    main = torch.cat([group[..., :length, :] for group in groups], dim=1)  # [B, d, H, N, D]
    main = main.permute(0, 3, 1, 2, 4).flatten(1, 2)
    if main.shape[1] == seq_len:
        return main
    return torch.cat([main, *(group[..., length, :] for group in groups if group.shape[3] > length)], dim=1)
