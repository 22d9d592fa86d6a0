"""Attention options that may be given once, per layer, or per layer and head."""

import difflib
from collections.abc import Iterable, Sequence


def layer_option(value: int | Sequence, name: str, *, layer: int, num_layers: int) -> int | tuple[int, ...]:
    """The entry of `layer` in an option: an int for all layers, or one entry a layer, each an int or one int a head.

    Raises ValueError where the list does not have one entry a layer, or an entry is no whole number.
    """
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != num_layers:
            raise ValueError(f"{name} has {len(value)} entries, the model has {num_layers} layers")
        value = value[layer]
        if isinstance(value, Sequence) and not isinstance(value, str):
            return tuple(_whole(entry, f"{name} of layer {layer}") for entry in value)
    return _whole(value, f"{name} of layer {layer}")


def refuse_unknown(given: Iterable[str], known: Iterable[str]) -> None:
    """ValueError naming the first option that is not known and the nearest one that is."""
    known = list(known)
    for name in given:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f", did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"unknown attention option {name}{hint} (known: {', '.join(known)})")


def _whole(value, what):
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{what} is {value!r}, it must be a whole number")
    return value
