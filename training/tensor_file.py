"""A model's tensors as one safetensors file: ties stored once, differences told before assignment."""

import difflib
import json
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
    """(tensors on the CPU by name, {tied name: name its values are stored under}) of the model's state.

    The tensors are the model's own memory where that is possible: write them out before the next step.
    """
    aliases = tied_names(model)
    stored = {}
    for name, tensor in model.state_dict().items():
        if name in aliases:
            continue
        value = tensor.detach().cpu().contiguous()
        # a part of a larger memory would be refused by the format
        partial = value.untyped_storage().nbytes() != value.numel() * value.element_size()
        stored[name] = value.clone() if partial else value
    return stored, aliases


def open_tensors(path: Path, device: str | torch.device) -> Any:
    """A safetensors file opened for reading (a context manager); CheckpointError for a broken header."""
    try:
        return safe_open(path, framework="pt", device=str(device))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error


def read_all(path: Path, device: str | torch.device) -> dict[str, Tensor]:
    """All tensors of a safetensors file by name."""
    with open_tensors(path, device) as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}


def read_model(path: Path, model: nn.Module, device: str | torch.device) -> dict[str, Tensor]:
    """The tensor of `path` for each name in the model's state, after names, shapes and dtypes were checked.

    Raises CheckpointError with a table of what differs.
    """
    own = model.state_dict()
    with open_tensors(path, device) as file:
        aliases = json.loads((file.metadata() or {}).get("aliases", "{}"))
        found = {}
        names = file.keys()
        for key in names:
            header = file.get_slice(key)
            found[key] = (DTYPES.get(header.get_dtype(), header.get_dtype()), tuple(header.get_shape()))
        found.update({alias: found[key] for alias, key in aliases.items() if key in found})
        expected = {key: (str(value.dtype).removeprefix("torch."), tuple(value.shape)) for key, value in own.items()}
        check_tensors(path, found, expected)
        by_name = {key: file.get_tensor(key) for key in {aliases.get(key, key) for key in own}}
    tensors = {key: by_name[aliases.get(key, key)] for key in own}
    _check_ties(path, model, tensors)
    return tensors


def check_tensors(path: Path, found: dict[str, tuple], expected: dict[str, tuple]) -> None:
    """Raise CheckpointError unless both mappings of name to (dtype, shape) are equal.

    The message lists the first differences; a name that is missing comes with the nearest name of the file.
    """
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
    if not rows:
        return
    more = [f"  ... and {len(rows) - MAX_ROWS} more"] if len(rows) > MAX_ROWS else []
    raise CheckpointError(
        f"{path} does not fit the model, {len(rows)} of {len(expected)} tensors differ:\n"
        + "\n".join(rows[:MAX_ROWS] + more)
        + "\nBuild the model with the configuration the checkpoint was trained with."
    )


def _check_ties(path: Path, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    for alias, name in tied_names(model).items():
        if tensors[alias] is not tensors[name] and not torch.equal(tensors[alias], tensors[name]):
            raise CheckpointError(f"{path}: {alias} and {name} differ, expected one tensor: the model ties them")


def _show(entry: tuple | None) -> str:
    return "nothing" if entry is None else f"{entry[0]} {list(entry[1])}"
