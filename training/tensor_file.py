"""A model's tensors as one safetensors file: ties stored once, differences told before assignment."""

import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from training.errors import CheckpointError

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
MAX_ROWS = 12


def tied_names(model: nn.Module) -> dict[str, str]:
    """{name in the model's state: earlier name that shows the same memory in the same way}."""
    ties: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        view = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and view in seen:
            ties[name] = seen[view]
        else:
            seen[view] = name
    return ties


def model_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, {tied name: name its values are stored under}) of the model's state.

    The tensors are the model's own memory, on its device: the next step changes them.
    """
    aliases = tied_names(model)
    return {name: value.detach() for name, value in model.state_dict().items() if name not in aliases}, aliases


def nonfinite(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """{name: number of its values that are infinite or not a number}, only of tensors that hold any."""
    found = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        # both ends are infinite or NaN where any value is, and that costs a tenth of testing each value
        if not all(math.isfinite(end.item()) for end in torch.aminmax(tensor)):
            found[name] = int(tensor.numel() - tensor.isfinite().sum())
    return found


def open_tensors(path: Path) -> Any:
    """A safetensors file opened for reading (a context manager); CheckpointError for a broken header."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error


def read_all(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file by name."""
    with open_tensors(path) as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}


def read_model(path: Path, model: nn.Module, *, strict: bool = True) -> tuple[dict[str, Tensor], list[str]]:
    """(tensor of `path` by name in the model's state, lines naming what was left out because it does not fit).

    Names, shapes and dtypes are compared first. `strict`: nothing may be left out; CheckpointError then has a table
    of what differs. Raises CheckpointError in both cases for a file of which nothing fits.
    """
    own = model.state_dict()
    with open_tensors(path) as file:
        aliases = _aliases(path, file)
        found = {}
        names = file.keys()
        for key in names:
            header = file.get_slice(key)
            found[key] = (DTYPES.get(header.get_dtype(), header.get_dtype()), tuple(header.get_shape()))
        found.update({alias: found[key] for alias, key in aliases.items() if key in found})
        expected = {key: (str(value.dtype).removeprefix("torch."), tuple(value.shape)) for key, value in own.items()}
        fitting = [key for key in own if found.get(key) == expected[key]]
        left_out = differences(found, expected)
        if left_out and (strict or not fitting):
            more = [f"  ... and {len(left_out) - MAX_ROWS} more"] if len(left_out) > MAX_ROWS else []
            raise CheckpointError(
                f"{path} does not fit the model, {len(left_out)} of {len(expected)} tensors differ:\n"
                + "\n".join(left_out[:MAX_ROWS] + more)
                + "\nBuild the model with the configuration the checkpoint was trained with."
            )
        by_name = {key: file.get_tensor(key) for key in {aliases.get(key, key) for key in fitting}}
    tensors = {key: by_name[aliases.get(key, key)] for key in fitting}
    for alias, name in tied_names(model).items():
        if not {alias, name} <= tensors.keys() or tensors[alias] is tensors[name]:
            continue
        if not torch.equal(tensors[alias], tensors[name]):
            if strict:
                raise CheckpointError(f"{path}: {alias} and {name} differ, expected one tensor: the model ties them")
            del tensors[alias]
            left_out.append(f"  {alias}: the model ties it to {name}, whose values were taken")
    return tensors, left_out


def differences(found: Mapping[str, tuple], expected: Mapping[str, tuple]) -> list[str]:
    """A line for each name whose (dtype, shape) differs; a missing name comes with the nearest name of the file."""
    unknown = found.keys() - expected.keys()
    rows = []
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) == expected.get(name):
            continue
        nearest = ""
        if name not in found:
            close = difflib.get_close_matches(name, unknown, n=1)
            nearest = f"  (nearest in the file: {close[0]})" if close else ""
        rows.append(f"  {name}: found {_show(found.get(name))}, expected {_show(expected.get(name))}{nearest}")
    return rows


def _aliases(path: Path, file: Any) -> dict[str, str]:
    try:
        aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
    except ValueError as error:
        raise CheckpointError(f"{path}: the names of tied tensors in its header are not JSON: {error}") from error
    if not isinstance(aliases, dict):
        raise CheckpointError(f"{path}: the names of tied tensors in its header are {aliases!r}, expected an object")
    return aliases


def _show(entry: tuple | None) -> str:
    return "nothing" if entry is None else f"{entry[0]} {list(entry[1])}"
