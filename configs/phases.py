"""The phases a run will really train: the schedule under its caps; the checks that need model and data."""

import inspect
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from configs.messages import with_keys
from configs.schema import ConfigError, PhaseConfig, build, target_class


def effective_phases(cfg: DictConfig) -> list[PhaseConfig]:
    """The phases of `cfg.schedule` under `cap`; a shortened phase keeps its share of warm-up.

    Attention options that a phase does not name stay as the phase before left them, at first as the model has them:
    each phase holds all that any of them names, so that a run may also go back to an earlier one.
    """
    cap = cfg.schedule.cap
    nodes: list[Any] = [
        OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PhaseConfig), node)) for node in cfg.schedule.phases
    ]
    phases, attention = [], _model_attention(cfg, {name for phase in nodes for name in phase.attention})
    for phase in nodes:
        steps = _capped(phase.steps, cap.steps)
        phase.warmup_steps = phase.warmup_steps * steps // phase.steps
        phase.steps = steps
        phase.seq_len = _capped(phase.seq_len, cap.seq_len)
        phase.batch_size = _capped(phase.batch_size, cap.batch_size)
        if "window" in phase.attention:
            phase.attention["window"] = cap_window(phase.attention["window"], cap.window)
        phase.attention = attention = {**attention, **phase.attention}
        phases.append(phase)
    return phases


def _model_attention(cfg: DictConfig, names: set[str]) -> dict[str, Any]:
    """These attention options as the model has them, given or by default; what it has not is left out."""
    model: Any = OmegaConf.to_container(cfg.model, resolve=True)
    node = model.get("attention")
    if not names or not isinstance(node, dict):
        return {}
    parameters = inspect.signature(target_class(node, "model.attention")).parameters
    own = {name: node.get(name, parameters[name].default) for name in sorted(names) if name in parameters}
    if "window" in own:
        own["window"] = cap_window(own["window"], cfg.schedule.cap.window)
    return {name: value for name, value in own.items() if value is not inspect.Parameter.empty}


def cap_window(window: Any, limit: int | None) -> Any:
    """Every entry of a window option (an int, a list a layer, a list a head in it) cut to `limit`."""
    if isinstance(window, list):
        return [cap_window(entry, limit) for entry in window]
    # what is no number is refused by the layer that gets it
    return _capped(window, limit) if isinstance(window, int) else window


def build_model(cfg: DictConfig):
    """The model of a run, its window and width under `schedule.cap` too."""
    node: Any = OmegaConf.to_container(cfg.model, resolve=True)
    attention = node.get("attention")
    if isinstance(attention, dict) and "window" in attention:
        attention["window"] = cap_window(attention["window"], cfg.schedule.cap.window)
    if cfg.schedule.cap.dim is not None:
        _narrow(node, cfg.schedule.cap.dim)
    return build(node, "model")


def _narrow(node: dict, limit: int) -> None:
    """Cut the width of a model to `limit`, rounded up to a multiple of its heads; in proportion the layer between."""
    config = node.get("config")
    if isinstance(config, dict) and node.get("source") is None and limit < config["hidden_size"]:
        heads, width = config["num_attention_heads"], config["hidden_size"]
        config["hidden_size"] = -(-limit // heads) * heads
        config["intermediate_size"] = config["intermediate_size"] * config["hidden_size"] // width
    elif isinstance(node.get("dim"), int):
        node["dim"] = min(node["dim"], limit)


def set_phase_attention(model, phases: list[PhaseConfig], index: int) -> None:
    """Give a model the attention options of one phase; ConfigError names the phase."""
    if phases[index].attention:
        try:
            model.set_attention(**phases[index].attention)
        except ValueError as error:
            where = f"schedule.phases.{index}.attention"
            raise ConfigError(with_keys(str(error), phases[index].attention, where)) from None


def phase_patterns(cfg: DictConfig, phases: list[PhaseConfig]) -> list[list]:
    """The attention pattern of every layer in every phase, from a model that holds no weights."""
    with torch.device("meta"):
        model = build_model(cfg)
        patterns = []
        for index in range(len(phases)):
            set_phase_attention(model, phases, index)
            patterns.append(model.attention_patterns())
    return patterns


def check_device(cfg: DictConfig, device: torch.device, precision: str) -> None:
    """`check_kernels` of the model of a run."""
    with torch.device("meta"):
        model = build_model(cfg)
    check_kernels(model, device, precision)


def check_kernels(model: Any, device: torch.device, precision: str) -> None:
    """ConfigError where a model asks for kernels that cannot run on a device in a precision, "fp32" or "bf16"."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    try:
        model.check_device(device, dtype)
    except ValueError as error:
        raise ConfigError(f"model.attention.{error}") from None


def check_against_data(cfg: DictConfig, phases: list[PhaseConfig], task: Any, world_size: int) -> None:
    """ConfigError for a model that the task cannot use, a length they or the data cannot have, an unshareable batch."""
    with torch.device("meta"):
        model = build_model(cfg)
    check_task(model, task, "model.config.vocab_size" if "config" in cfg.model else "model.vocab_size")
    check_context(model, task, "eval.context", cfg.eval.context)
    first = getattr(model, "first_position", 0)
    if max(phase.seq_len for phase in phases) <= first:
        raise ConfigError(
            f"model.first_position is {first}, and no phase has rows longer than {first} tokens: nothing would be "
            "trained"
        )
    for index, phase in enumerate(phases):
        where = f"schedule.phases.{index}"
        is_capped = phase.seq_len < cfg.schedule.phases[index].seq_len
        check_length(model, task, "schedule.cap.seq_len" if is_capped else f"{where}.seq_len", phase.seq_len)
        if phase.seq_len > task.max_seq_len:
            raise ConfigError(
                f"{where}.seq_len is {phase.seq_len}, the training split allows at most {task.max_seq_len}: "
                "shorten the phase or give more data"
            )
        if phase.batch_size % world_size:
            raise ConfigError(
                f"{where}.batch_size is {phase.batch_size}, it must be a multiple of {world_size} (processes)"
            )


def check_task(model: Any, task: Any, vocab_key: str = "model.vocab_size") -> None:
    """ConfigError where a model has another head than its task needs, too few symbols or too few token types.

    vocab_key: what the user knows the model's number of symbols as.
    """
    needed, found = (getattr(owner, "head", None) for owner in (task, model))
    found = found if isinstance(found, str) else None  # a character model's is a layer
    if needed != found and None in (needed, found):
        fault = f"needs a model with the head {needed!r}" if needed else f"has no use for the head {found!r}"
        others = "model=roberta" if needed else "task=masked_lm or model=char_lm"
        raise ConfigError(f"the task {task.name} {fault}, this is a {type(model).__name__}: choose {others}")
    if needed != found:
        order = str(task.order).lower(), str(not task.order).lower()
        raise ConfigError(
            f"task.order is {order[0]} and model.head is {found!r}, which do not go together: give "
            f"model.head={needed}, or task.order={order[1]}"
        )
    if model.vocab_size < task.vocab_size:
        hint = f": task.tokenizer ({task.folder}) is to be the model's own" if hasattr(task, "folder") else ""
        raise ConfigError(f"{vocab_key} is {model.vocab_size}, the data needs at least {task.vocab_size}{hint}")
    if getattr(task, "order", False):
        table = model.encoder.token_type
        num_types = 0 if table is None else table.num_embeddings
        if num_types < 2:
            raise ConfigError(
                f"task.order is true, which needs two token types, this model has {num_types}: take one with two "
                "(model.config.type_vocab_size=2 where its weights are new), or task.order=false"
            )


def check_context(model: Any, task: Any, key: str, context: int) -> None:
    """ConfigError where no split can be scored in rows of `context` tokens, the value of `key`."""
    check_length(model, task, key, context)
    most = getattr(task, "max_context", None)
    if most is not None and context > most:
        raise ConfigError(f"{key} is {context}, the smallest split of the data has {most:,} tokens")


def check_length(model: Any, task: Any, key: str, seq_len: int) -> None:
    """ConfigError where a row of `seq_len` tokens, the value of `key`, holds no text or is longer than the model."""
    least = getattr(task, "min_seq_len", 1)
    if seq_len < least:
        raise ConfigError(
            f"{key} is {seq_len}, it must be at least {least}: a row has its special tokens and some text"
        )
    if model.max_positions is not None and seq_len > model.max_positions:
        raise ConfigError(
            f"{key} is {seq_len}, the position table of this model has {model.max_positions} rows: give at most that, "
            "or lengthen the model with python -m models.convert"
        )


def _capped(value, limit):
    return value if limit is None else min(value, limit)
