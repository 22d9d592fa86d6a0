"""Published checkpoints in and out: `load_pretrained` and `save_pretrained`. No code that comes with them is run."""

import json
import logging
import pickle
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.architectures import (
    DERIVED,
    PREFIXES,
    REPEATED,
    Entry,
    activation_of,
    encoder_entries,
    encoder_options,
    masked_lm_entries,
    model_type,
)
from models.encoder import Encoder
from models.errors import PretrainedError
from models.heads import MaskedLM

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
CLASSES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "longformer": "Longformer",
           "big_bird": "BigBird", "nystromformer": "Nystromformer"}  # fmt: skip
HEADS = {"none": "Model", "masked_lm": "ForMaskedLM"}
log = logging.getLogger(__name__)


class Published(NamedTuple):
    """Where a model comes from: its config.json and the folder with its tokenizer files."""

    config: dict[str, Any]
    folder: Path


def load_pretrained(
    path_or_name: str | Path, *, head: str | None = None, compat: str | None = None, **overrides: Any
) -> nn.Module:
    """A published checkpoint as a model of ours, in evaluation mode, float32, on the CPU.

    Args:
        path_or_name: a folder as transformers writes it (config.json with safetensors, in one file or in shards, or an
            old pickle, read without executing code), or the name of one on the Hugging Face hub.
        head: "none" for the bare `Encoder`, "masked_lm"; None for the one that config.json names. A head that the files
            do not hold is initialised and named in the log, and so is every tensor that is not used.
        compat: "hf" computes as transformers does where that differs from what was trained; README says where.
        **overrides: entries of config.json to replace, such as `attention_window=256`.

    Raises:
        PretrainedError: no such folder, an unknown architecture, head or entry, a file that is damaged or would execute
            code, a tensor that is missing or of another shape.
    """
    folder = _folder_of(path_or_name)
    config = {**_read_config(folder), **overrides}
    tensors = _read_tensors(folder)
    prefix = PREFIXES[model_type(config)]
    has_pooler = any(name.removeprefix(f"{prefix}.").startswith("pooler.") for name in tensors)
    model = build_pretrained(config, folder, head=head, compat=compat, pooler=has_pooler)
    _fill(model, tensors)
    return model.eval()


def build_pretrained(
    config: dict[str, Any],
    folder: str | Path,
    *,
    head: str | None = None,
    compat: str | None = None,
    pooler: bool = False,
) -> Any:
    """The model that a config.json describes, with initial weights; `folder`: where its tokenizer files are."""
    if compat not in (None, "hf"):
        raise PretrainedError(f"compat is {compat!r}, it must be None or 'hf'")
    head = head or _head_of(config)
    if head not in HEADS:
        raise PretrainedError(f"head is {head!r}, it must be one of {', '.join(map(repr, HEADS))}")
    try:
        model: Any = Encoder(**encoder_options(config, compat), pooler=pooler)
        if head == "masked_lm":
            model = MaskedLM(model, activation=activation_of(config), norm_eps=config["layer_norm_eps"])
    except KeyError as error:
        raise PretrainedError(f"{CONFIG} has no entry {error}") from None
    model.published = Published(config, Path(folder))
    return model


def save_pretrained(model: nn.Module, path: str | Path, *, tokenizer: str | Path | None = None) -> None:
    """Write a folder that transformers loads with the same outputs: config.json, model.safetensors, tokenizer files.

    model: one that `load_pretrained` gave, trained further or not. tokenizer: the folder whose tokenizer files go
    along, by default the one that the model came from.
    """
    config, source = published_of(model)
    folder, head = Path(path), _head_name(model)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = published_tensors(model, model.state_dict())
    save_file(tensors, folder / WEIGHTS[0], metadata={"format": "pt"})
    named = {**config, "architectures": [CLASSES[model_type(config)] + HEADS[head]]}
    (folder / CONFIG).write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")
    files = Path(tokenizer) if tokenizer is not None else source
    for name in TOKENIZER_FILES:
        if (files / name).exists() and files.resolve() != folder.resolve():
            shutil.copy(files / name, folder / name)


def published_tensors(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors shaped as parameters of a model of `load_pretrained`, such as gradients, under their published names."""
    config, head = published_of(model).config, _head_name(model)
    tensors: dict[str, Tensor] = {}
    prefix = None if head == "none" else PREFIXES[model_type(config)]
    for ours, theirs in _names(config, head, set(state), prefix):
        for name, part in zip(theirs, state[ours].chunk(len(theirs)), strict=True):
            tensors[name] = (part[:, None, :, None] if name.endswith("conv.weight") else part).contiguous()
    return tensors


def published_of(model: nn.Module) -> Published:
    """What `load_pretrained` noted of a model; PretrainedError for any other model."""
    published: Any = getattr(model, "published", None)
    if published is None:
        raise PretrainedError("the model was not made by load_pretrained: nothing says which architecture it is")
    return published


def _folder_of(path_or_name):
    folder = Path(path_or_name).expanduser()
    if folder.is_dir():
        return folder
    name = str(path_or_name)
    if folder.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise PretrainedError(f"{path_or_name} is no folder with {CONFIG} and weights")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    patterns = [CONFIG, *TOKENIZER_FILES, "*.safetensors", "*.safetensors.index.json"]
    try:
        found = Path(snapshot_download(name, allow_patterns=patterns))
        if not any((found / file).exists() for file in WEIGHTS):
            found = Path(snapshot_download(name, allow_patterns=[*patterns, "pytorch_model*.bin*"]))
        return found
    except RepositoryNotFoundError:
        raise PretrainedError(f"{name} is neither a folder here nor a public model of the Hugging Face hub") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise PretrainedError(
            f"{name} is no folder here, and the Hugging Face hub cannot be reached ({type(error).__name__}): download "
            "the model where there is a network and give the folder"
        ) from None


def read_config(path_or_name: str | Path) -> dict[str, Any]:
    """The config.json of a folder or hub name; PretrainedError where there is none that is known."""
    return _read_config(_folder_of(path_or_name))


def _read_config(folder):
    path = folder / CONFIG
    if not path.exists():
        raise PretrainedError(f"{folder} holds no {CONFIG}: is it the folder of a model?")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PretrainedError(f"{path} is no JSON: {error}") from None
    model_type(config)
    return config


def _head_of(config):
    """The head that a configuration's `architectures` names."""
    names = config.get("architectures") or ["Model"]
    for head, ending in HEADS.items():
        if names[0].endswith(ending):
            return head
    raise PretrainedError(f"architectures names {names[0]}, known heads are {', '.join(HEADS)}: choose one with head=")


def _head_name(model):
    return {Encoder: "none", MaskedLM: "masked_lm"}[type(model)]


def _names(config, head, ours: set[str], prefix: str | None) -> Iterable[tuple[str, tuple[str, ...]]]:
    """(name of ours, names of theirs) of every tensor of a model."""
    own = "" if head == "none" else "encoder."
    theirs = "" if prefix is None else f"{prefix}."
    names = {name.removeprefix(own) for name in ours}
    for entry in encoder_entries(config, names):
        yield f"{own}{entry.ours}", tuple(f"{theirs}{name}" for name in entry.theirs)
    head_entries: Iterable[Entry] = masked_lm_entries(config) if head == "masked_lm" else ()
    yield from head_entries


def _fill(model, tensors):
    """Load the tensors into the model; what is missing, left over or of another shape is an error or said."""
    (config, folder), head = published_of(model), _head_name(model)
    prefix = PREFIXES[model_type(config)]
    prefix = prefix if any(name.startswith(f"{prefix}.") for name in tensors) else None
    state, used, new, wrong = model.state_dict(), set(), [], []
    for ours, theirs in _names(config, head, set(state), prefix):
        lacking = [name for name in theirs if name not in tensors]
        if lacking:
            (new if head != "none" and not ours.startswith("encoder.") else wrong).append(
                f"{', '.join(lacking)}: missing"
            )
            continue
        parts = [tensors[name] for name in theirs]
        if ours.endswith("conv_weight"):
            parts = [part.flatten(1) for part in parts]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        if whole.shape != state[ours].shape:
            found, wanted = tuple(parts[0].shape), (state[ours].shape[0] // len(parts), *state[ours].shape[1:])
            wrong.append(f"{theirs[0]}: the file has {found}, {CONFIG} says {tuple(wanted)}")
            continue
        state[ours] = whole.to(torch.float32)
        used.update(theirs)
    for name, ours in REPEATED.items():
        if name in tensors and ours in state:
            used.add(name)
            if not tensors[name].to(torch.float32).equal(state[ours]):
                wrong.append(f"{name}: not equal to {ours}, to which it is tied here")
    if wrong:
        shown = "; ".join(wrong[:5]) + (f" … and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise PretrainedError(f"{folder} does not fit: {shown}")
    model.load_state_dict(state)
    if new:
        log.warning("%s: new, not from the files: %s", folder, "; ".join(new))
    left = [name for name in sorted(set(tensors) - used) if not name.endswith(DERIVED)]
    if left:
        log.warning("%s: not used: %s", folder, ", ".join(left))


def _read_tensors(folder):
    """All tensors of a folder by name, those of LayerNorm under today's names."""
    for name in WEIGHTS:
        path = folder / name
        if not path.exists():
            continue
        files = [path]
        if name.endswith(".json"):
            files = [folder / shard for shard in sorted(set(json.loads(path.read_text())["weight_map"].values()))]
        tensors: dict[str, Tensor] = {}
        for file in files:
            tensors |= _read_file(file)
        return {_renamed(name): tensor for name, tensor in tensors.items()}
    raise PretrainedError(f"{folder} holds none of {', '.join(WEIGHTS)}")


def _read_file(path):
    if not path.exists():
        raise PretrainedError(f"{path} is missing: the index names it")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise PretrainedError(f"{path} is damaged ({error}): copy or download it again") from None
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise PretrainedError(
            f"{path} is a pickle that holds more than tensors and is refused, as loading it would run code ({reason})"
        ) from None
    except (RuntimeError, EOFError) as error:
        raise PretrainedError(f"{path} is damaged ({str(error).splitlines()[0]}): copy or download it again") from None


def _renamed(name):
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name
