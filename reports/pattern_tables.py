"""The numbers of one named pattern as a table at the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from reports.console import console
from reports.pattern_numbers import index_label


def counted(number: int, noun: str) -> str:
    """1, "block" -> "1 block"; 1024, "block" -> "1,024 blocks"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def show_windows(numbers: Mapping[str, Any]) -> None:
    """The numbers of `window_numbers` as a table."""
    columns = {"window": lambda row: f"{row['window']:,}", "dilation": lambda row: f"{row['dilation']:,}"}
    _show_heads(numbers, columns)
    side = "to the left" if numbers["causal"] else "on each side"
    field = f"receptive field of the windows: {numbers['reach']:,} positions {side} a layer"
    gaps = f", {numbers['gaps']:,} of them in the gaps of all heads" if numbers["gaps"] else ""
    console().print(field + gaps + _paths(numbers))


def show_blocks(numbers: Mapping[str, Any]) -> None:
    """The numbers of `block_numbers` as a table, the pairs of every part beside their sum."""
    names = list(dict.fromkeys(name for row in numbers["heads"] for name in row["pairs_by_part"]))
    columns = {name: lambda row, name=name: f"{row['pairs_by_part'].get(name, 0):,}" for name in names}
    _show_heads(numbers, {**columns, "counted again": lambda row: f"{row['repeated_pairs']:,}"})
    blocks = f"{counted(numbers['num_blocks'], 'block')} of {counted(numbers['block_size'], 'position')}"
    console().print(blocks + _paths(numbers))


def show_landmarks(numbers: Mapping[str, Any]) -> None:
    """The numbers of `landmark_numbers` as a table."""
    seq_len, num_landmarks = numbers["seq_len"], numbers["num_landmarks"]
    table = Table(title=f"row of {counted(seq_len, 'position')}, {counted(num_landmarks, 'landmark')}, one head")
    for name in (*numbers["pairs_by_part"], "scores", "share of dense", "tokens of a landmark"):
        table.add_column(name, justify="right")
    scores = (f"{pairs:,}" for pairs in (*numbers["pairs_by_part"].values(), numbers["pairs"]))
    tokens = _span(numbers["shortest_segment"], numbers["longest_segment"])
    table.add_row(*scores, f"{numbers['share_of_dense']:.2%}", tokens)
    out = console()
    out.print(table)
    out.print(f"[bold]{numbers['pairs']:,} scores[/bold], {numbers['share_of_dense']:.2%} of dense" + _paths(numbers))


def _show_heads(numbers, columns):
    """A line for the heads that agree in all numbers; `columns` are those of the kind, by title."""
    sizes = f"row of {counted(numbers['seq_len'], 'position')}, {counted(numbers['num_heads'], 'head')}"
    table = Table(title=f"{sizes}, one layer")
    table.add_column("heads")
    lines = ("pairs", "share of dense", "keys of a row", "longest column", "longest, not global")
    for name in (*columns, *lines):
        table.add_column(name, justify="right")
    for row in numbers["heads"]:
        table.add_row(
            index_label("head", row["heads"]).split(" ", 1)[1],
            *(text(row) for text in columns.values()),
            f"{row['pairs']:,}",
            f"{row['pairs'] * numbers['num_heads'] / numbers['dense_pairs']:.2%}",
            _span(row["fewest_keys"], row["most_keys"]),
            _column(row["longest_column"], row["column_skew"]),
            _column(row["longest_ordinary_column"], row["ordinary_column_skew"]),
        )
    out = console()
    out.print(table)
    out.print("in tokens, repeated ones again; a column: the rows that read one key, × its length over the mean")
    out.print(f"[bold]{numbers['pairs']:,} query-key pairs[/bold], {numbers['share_of_dense']:.2%} of dense")


def _span(low, high):
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _column(longest, skew):
    return f"{longest:,}" + ("" if skew is None else f" (× {skew:.2f})")


def _paths(numbers):
    layers = numbers["layers_to_all"]
    return "" if layers is None else f"; after {counted(layers, 'layer')} every position depends on all others"
