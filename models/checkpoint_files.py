"""Folders of published checkpoints: where they are, their config.json and tensors. No code in them is run."""

import json
import pickle
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from models.errors import PretrainedError, first_line

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
PICKLES = (b"PK", b"\x80")  # how the files of torch.save begin, of today and of before 1.6
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


# what is asked of a folder: how it is called, and the files of it that are fetched
WANTED = {
    "model": (f"{CONFIG} and weights", (CONFIG, *TOKENIZER_FILES, "*.safetensors", "*.safetensors.index.json")),
    "config": (f"{CONFIG} and weights", (CONFIG,)),
    "tokenizer": ("tokenizer files", (CONFIG, *TOKENIZER_FILES)),
}


def folder_of(path_or_name: str | Path, wanted: Literal["model", "config", "tokenizer"] = "model") -> Path:
    """A folder as it is, or that of a model of the Hugging Face hub, with what is wanted of it fetched.

    PretrainedError for neither.
    """
    what, patterns = WANTED[wanted]
    folder = Path(path_or_name).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_name)
    if folder.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise PretrainedError(f"{path_or_name} is no folder with {what}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        found = Path(snapshot_download(name, allow_patterns=list(patterns)))
        if wanted == "model" and not any((found / file).exists() for file in WEIGHTS):
            found = Path(snapshot_download(name, allow_patterns=[*patterns, "pytorch_model*.bin*"]))
        return found
    except HFValidationError:
        raise PretrainedError(
            f"{name!r} is neither a folder here nor a name that a model of the Hugging Face hub can have"
        ) from None
    except RepositoryNotFoundError:
        raise PretrainedError(f"{name} is neither a folder here nor a public model of the Hugging Face hub") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise PretrainedError(
            f"{name} is no folder here, and the Hugging Face hub cannot be reached ({type(error).__name__}): download "
            "the model where there is a network and give the folder"
        ) from None


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder; PretrainedError where there is none or it is no JSON object."""
    path = folder / CONFIG
    if not path.exists():
        raise PretrainedError(f"{folder} holds no {CONFIG}: is it the folder of a model?")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; PretrainedError where it cannot be read or holds something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise PretrainedError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise PretrainedError(f"{path} holds a {type(found).__name__}, it must be an object of entries by name")
    return found


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name, those of LayerNorm under today's names."""
    for name in WEIGHTS:
        path = folder / name
        if not path.exists():
            continue
        files = [path]
        if name.endswith(".json"):
            files = [folder / shard for shard in _shards(path)]
        tensors: dict[str, Tensor] = {}
        for file in files:
            tensors |= _read_file(file)
        return {_renamed(name): tensor for name, tensor in tensors.items()}
    raise PretrainedError(f"{folder} holds none of {', '.join(WEIGHTS)}")


def _shards(index: Path) -> list[str]:
    """Names of the files that an index names, which lie beside it."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise PretrainedError(f"{index} has no weight_map: it must say which file holds which tensor")
    for tensor, file in places.items():
        if not isinstance(file, str) or file in ("", ".", "..") or "/" in file or "\\" in file:
            raise PretrainedError(f"{index} has {file!r} for {tensor}: it must be the name of a file beside it")
    return sorted(set(places.values()))


def _read_file(path):
    if not path.exists():
        raise PretrainedError(f"{path} is missing: the index names it")
    try:
        path.open("rb").close()  # what may not be read is not missing, as the library would have it
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            start = file.read(16)
        if not start.startswith(PICKLES):
            raise PretrainedError(f"{path} is damaged (it begins with {start}): copy or download it again") from None
        raise PretrainedError(
            f"{path} is a pickle that holds more than tensors and is refused, as loading it would run code "
            f"({first_line(error)})"
        ) from None
    except OSError as error:
        raise PretrainedError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # bytes that are anything: no one class of errors
        raise PretrainedError(f"{path} is damaged ({first_line(error)}): copy or download it again") from None
    if not isinstance(found, dict):
        raise PretrainedError(f"{path} holds a {type(found).__name__}, it must be tensors by name")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise PretrainedError(f"{path} holds a {type(tensor).__name__} as {name!r}, it must be tensors by name")
    return found


def _renamed(name):
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name
