"""Published checkpoints in and out: `load_pretrained` and `save_pretrained`. No code that comes with them is run."""

import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.architectures import (
    DERIVED,
    PREFIXES,
    check_entries,
    encoder_entries,
    encoder_options,
    model_type,
    published_config,
    refuse_unknown_entries,
    refuse_unsupported,
)
from models.checkpoint_files import CONFIG, TOKENIZER_FILES, WEIGHTS, folder_of, read_config, read_tensors
from models.encoder import Encoder
from models.errors import PretrainedError
from models.published_heads import (
    HEAD_ENTRY,
    HEADS,
    REPEATED,
    TOKEN_PREDICTION,
    build_head,
    class_entries,
    has_pooler,
    head_entries,
    head_of,
    may_hold,
    stock_head,
    with_labels,
)
from models.tokenizer import load_tokenizer

log = logging.getLogger(__name__)


class Published(NamedTuple):
    """Where a model comes from: its config.json and the folder with its tokenizer files; and the name of its head."""

    config: dict[str, Any]
    folder: Path
    head: str


def load_pretrained(
    path_or_name: str | Path, *, head: str | None = None, compat: str | None = None, **overrides: Any
) -> nn.Module:
    """A published checkpoint as a model of ours, in evaluation mode, float32, on the CPU.

    Args:
        path_or_name: a folder as transformers writes it (config.json with safetensors, in one file or in shards, or an
            old pickle, read without executing code), or the name of one on the Hugging Face hub.
        head: one of `published_heads.HEADS`, "none" for the bare `Encoder`; None for the one that config.json names. A
            head that the files do not hold is initialised and named in the log, and so is every tensor not used.
        compat: "hf" computes as transformers does where that differs from what was trained: docs/encoders.md.
        **overrides: entries of config.json to replace, such as `attention_window=256` or `num_labels=3`.

    Raises:
        PretrainedError: no such folder, an unknown architecture, head or entry, a file that is damaged or would execute
            code, a tensor that is missing or of another shape.
    """
    folder = folder_of(path_or_name)
    found = published_config(read_config(folder))
    refuse_unknown_entries(overrides, found)
    if "id2label" in overrides:
        found.pop("num_labels", None)
    config = {**found, **overrides}
    prefix = PREFIXES[model_type(config)]
    tensors = read_tensors(folder)
    if prefix == "longformer":  # AI2's is a RoBERTa by name
        tensors = {_replaced(name, "roberta.", "longformer."): tensor for name, tensor in tensors.items()}
    pooler = any(name.removeprefix(f"{prefix}.").startswith("pooler.") for name in tensors)
    model = build_pretrained(config, folder, head=head, compat=compat, pooler=pooler)
    _fill(model, tensors, with_head=may_hold(found, published_of(model).head))
    return model.eval()


def build_pretrained(
    config: Mapping[str, Any],
    folder: str | Path,
    *,
    head: str | None = None,
    compat: str | None = None,
    pooler: bool = False,
) -> Any:
    """The model that a config.json describes, with initial weights.

    folder: where its tokenizer files are. pooler: whether a bare encoder has one, others have what their head needs.
    """
    if compat not in (None, "hf"):
        raise PretrainedError(f"compat is {compat!r}, it must be None or 'hf'")
    config, where = dict(config), Path(folder) / CONFIG
    check_entries(config, where)
    head = head or head_of(config)
    if head not in HEADS:
        raise PretrainedError(f"head is {head!r}, it must be one of {', '.join(map(repr, HEADS))}")
    kind = model_type(config)
    refuse_unsupported(config)
    config = with_labels(config, head)
    try:
        encoder = Encoder(**encoder_options(config, compat), pooler=has_pooler(kind, head, in_files=pooler))
        model: Any = build_head(encoder, head, config, compat)
    except KeyError as error:
        raise PretrainedError(f"{where} has no entry {error}") from None
    except ValueError as error:  # sizes that do not go together
        raise PretrainedError(f"{where}: {error}") from None
    model.published = Published(config, Path(folder), head)
    return model


def save_pretrained(model: nn.Module, path: str | Path, *, tokenizer: str | Path | None = None) -> None:
    """Write a folder that transformers loads with the same outputs: config.json, model.safetensors, tokenizer files.

    The tokenizer is written as tokenizer.json under its own class, as the class that transformers takes for an
    architecture may read the same files as something else; one that cannot be read here goes along as it is. A head
    that no class of transformers has is in config.json as `longspan_head` and in tensors that it passes over.

    model: one that `load_pretrained` gave, trained further or not. tokenizer: the folder or hub name whose tokenizer
    goes along, by default the folder that the model came from.
    """
    config, source, head = published_of(model)
    _refuse_dilation(config)
    folder = Path(path)
    state = model.state_dict()
    named = {name: value for name, value in config.items() if name not in (HEAD_ENTRY, "torch_dtype")}
    # transformers takes weights into the type that is named here
    named["dtype"] = str(next(iter(state.values())).dtype).removeprefix("torch.")
    named |= class_entries(model_type(config), head)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise PretrainedError(f"{folder} cannot be written: {error.strerror}") from None
    save_file(published_tensors(model, state), folder / WEIGHTS[0], metadata={"format": "pt"})
    # that library leaves its files to their owner alone
    shutil.copymode(folder / CONFIG, folder / WEIGHTS[0])
    files = folder_of(tokenizer, "tokenizer") if tokenizer is not None else source
    if files.resolve() != folder.resolve():
        encoder: Any = getattr(model, "encoder", model)
        _write_tokenizer(files, folder, encoder.max_positions)


def _write_tokenizer(files: Path, folder: Path, max_positions: int) -> None:
    """The tokenizer of the folder `files` into another, for a model of so many positions; what is not written is said.

    The files themselves go along, for what reads them by name.
    """
    names = [name for name in TOKENIZER_FILES if (files / name).exists()]
    if not names:
        log.warning("%s: no tokenizer is written, %s holds none", folder, files)
        return
    for name in names:
        shutil.copyfile(files / name, folder / name)
    try:
        load_tokenizer(files).save(folder, max_positions=max_positions)
    except PretrainedError as error:
        log.warning("%s: the tokenizer files are copied as they are: %s", folder, error)


def published_tensors(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors shaped as parameters of a model of `load_pretrained`, such as gradients, under their published names."""
    config, _, head = published_of(model)
    tensors: dict[str, Tensor] = {}
    kind = model_type(config)
    prefix = None if stock_head(kind, head) == "none" else PREFIXES[kind]
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


def _refuse_dilation(config):
    dilation = config.get("attention_dilation") or 1
    layers = dilation if isinstance(dilation, list) else [dilation]
    if any(set(layer if isinstance(layer, list) else [layer]) != {1} for layer in layers):
        raise PretrainedError(
            f"attention_dilation is {dilation}: Longformer's class there has none, nothing is written"
        )


def _replaced(name, old, new):
    return new + name.removeprefix(old) if name.startswith(old) else name


def _names(config, head, ours: set[str], prefix: str | None) -> Iterable[tuple[str, tuple[str, ...]]]:
    """(name of ours, names of theirs) of every tensor of a model that is in `ours`."""
    own = "" if head == "none" else "encoder."
    theirs = "" if prefix is None else f"{prefix}."
    names = {name.removeprefix(own) for name in ours if name.startswith(own)}
    for entry in encoder_entries(config, names):
        yield f"{own}{entry.ours}", tuple(f"{theirs}{name}" for name in entry.theirs)
    yield from (entry for entry in head_entries(config, head) if entry.ours in ours)


def _fill(model, tensors, *, with_head: bool):
    """Load the tensors into the model; what is missing, left over or of another shape is an error or said."""
    config, folder, head = published_of(model)
    prefix = PREFIXES[model_type(config)]
    prefix = prefix if any(name.startswith(f"{prefix}.") for name in tensors) else None
    state, used, new, wrong = model.state_dict(), set(), [], []
    for ours, theirs in _names(config, head, set(state), prefix):
        of_head = head != "none" and not ours.startswith("encoder.")
        lacking = [name for name in theirs if name not in tensors or (of_head and not with_head)]
        if lacking:
            if of_head or "pooler." in ours:
                new += lacking
            else:
                wrong.append(f"{', '.join(lacking)}: missing")
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
        if name in tensors and head in TOKEN_PREDICTION and with_head:
            used.add(name)
            if not tensors[name].to(torch.float32).equal(state[ours]):
                wrong.append(f"{name}: not equal to {ours}, to which it is tied here")
    if wrong:
        shown = "; ".join(wrong[:5]) + (f" … and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise PretrainedError(f"{folder} does not fit: {shown}")
    model.load_state_dict(state)
    if new:
        log.warning("%s: new, not from the files: %s", folder, ", ".join(new))
    left = [name for name in sorted(set(tensors) - used) if not name.endswith(DERIVED)]
    if left:
        log.warning("%s: not used: %s", folder, ", ".join(left))
