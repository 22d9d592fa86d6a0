"""Score a trained run: python eval.py run_dir=DIR|checkpoint=PATH [split=test] [share=…] [protocol=…].

A published model, a folder with its config.json: python eval.py checkpoint=FOLDER task=NAME data.path=… [output=DIR].
"""

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.cli import entry

SAID = ("share", "num_characters", "num_tokens", "protocol")


@dataclass
class OpenedRun:
    """A run folder with one of its checkpoints in memory: `config` as it was run, `state` as it was saved.

    Of a published model `checkpoint` is its folder and `path` that of the result.
    """

    path: Path
    config: Any
    checkpoint: Path
    state: dict[str, Any]
    task: Any
    model: Any
    precision: str


def open_run(
    run_dir: str | None,
    checkpoint: str | None,
    *,
    device: Any,
    strict: bool = True,
    num_threads: int | None = None,
    data: Mapping[str, Any] | None = None,
    choose: Callable[[Path], Path | None] | None = None,
) -> OpenedRun:
    """Build the task and the model of a run and load its newest sound checkpoint, or the one at `checkpoint`.

    `data`: entries of the run's data node to replace. `choose`: what finds the newest sound checkpoint of a folder,
    where several processes must take the same one (default `training.checkpoint.newest_sound`). Raises ConfigError
    where there is no run, CheckpointError where there is no checkpoint that fits, is whole and is ours.
    """
    import torch
    from omegaconf import OmegaConf

    from configs.phases import build_model, check_device
    from configs.run import load_run
    from configs.schema import build
    from training.checkpoint import load_checkpoint, newest_sound
    from training.errors import CheckpointError
    from training.precision import resolve_precision
    from training.run_dir import find_tokenizer

    path = Path(run_dir).expanduser() if run_dir is not None else _run_of(Path(str(checkpoint)).expanduser())
    config = load_run(path)
    chosen = Path(checkpoint).expanduser() if checkpoint is not None else (choose or newest_sound)(path)
    if chosen is None:
        raise CheckpointError(f"{path} holds no complete checkpoint yet")
    if num_threads or config.num_threads:
        torch.set_num_threads(num_threads or config.num_threads)
    node = OmegaConf.merge(config.data, {key: value for key, value in (data or {}).items() if value is not None})
    precision = resolve_precision(config.precision, device)
    check_device(config, device, precision)
    task = build(config.task, "task", data=dict(node))
    find_tokenizer(task, path)
    model = build_model(config).to(device)
    state = load_checkpoint(chosen, model=model, restore_rng=False, strict=strict)
    model.set_attention(**state["attention"])
    return OpenedRun(path, config, chosen, state, task, model, precision)


def is_published(checkpoint: str | None) -> bool:
    """Whether `checkpoint` is the folder of a published model, not a checkpoint of a run."""
    return checkpoint is not None and (Path(checkpoint).expanduser() / "config.json").is_file()


def open_published(cfg, *, device: Any) -> OpenedRun:
    """The published model in `cfg.checkpoint` with the task that `cfg.task` names, on the data of `cfg.data`."""
    import torch
    from omegaconf import OmegaConf

    from configs.phases import check_kernels, check_task
    from configs.schema import ConfigError, DataConfig, EvalConfig, build
    from models.architectures import published_config
    from models.checkpoint_files import read_config
    from models.published import PublishedModel
    from models.published_heads import TOKEN_PREDICTION, head_of
    from training.precision import resolve_precision

    path = Path(cfg.checkpoint).expanduser()
    if cfg.task is None:
        raise ConfigError(f"checkpoint={path} is a published model: say what it is scored in, as task=masked_lm")
    if cfg.num_threads:
        torch.set_num_threads(cfg.num_threads)
    data = vars(DataConfig()) | {key: value for key, value in cfg.data.items() if value is not None}
    task = build(cfg.task, "task", data=data)
    if not hasattr(task, "head"):
        raise ConfigError(f"the task {task.name} has no use for a published model: score {path} in task=masked_lm")
    found = head_of(published_config(read_config(path)))
    if found not in TOKEN_PREDICTION:
        raise ConfigError(f"checkpoint={path} holds a model with the head {found!r}: it was never trained on words")
    model = PublishedModel(config={}, source=str(path), head=task.head)
    check_task(model, task, vocab_key=f"vocab_size of {path / 'config.json'}")
    precision = resolve_precision(cfg.precision, device)
    check_kernels(model, device, precision)
    output = make_output(cfg.output, path)
    model.load_source()
    # the longest rows that the model takes and the data has, unless others are asked for
    evaluation = EvalConfig(context=min(model.max_positions, task.max_context))
    config = OmegaConf.create({"task": OmegaConf.to_container(cfg.task), "eval": vars(evaluation)})
    return OpenedRun(output, config, path, {"step": 0}, task, model.to(device).eval(), precision)


def short_name(folder: Path) -> str:
    """The name of a folder with eight letters by where it lies: exports of many runs have one name."""
    place = folder.resolve()
    return f"{place.name}-{hashlib.sha256(str(place).encode()).hexdigest()[:8]}"


def make_output(output: str | None, model: Path) -> Path:
    """The folder for the score of a published model: `output`, or one in runs/eval; ConfigError where it is no use."""
    from configs.schema import ConfigError

    folder = Path("runs", "eval", short_name(model)) if output is None else Path(output).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"the score cannot be written to {folder}: {error.strerror}. Name another folder with output=DIR"
        ) from None
    return folder


def refuse_published_keys(cfg) -> None:
    """ConfigError for a key of published models alone."""
    from configs.schema import ConfigError, EvaluateConfig

    for key in ("task", "precision", "output"):
        if cfg[key] != getattr(EvaluateConfig, key):
            raise ConfigError(f"{key} is the run's own: leave it out, it is for the folder of a published model")


def _run_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint lies in."""
    from configs.schema import ConfigError
    from training.checkpoint import check_sizes

    path = checkpoint.absolute().parent.parent
    if not (path / "config.yaml").is_file():
        check_sizes(checkpoint)  # says it first where this is no checkpoint at all
        raise ConfigError(
            f"checkpoint={checkpoint} lies in no run folder: {path} holds no config.yaml, which says how its model is "
            "built. Give a folder such as DIR/checkpoints/step-1000 of a run DIR"
        )
    return path


def main(cfg) -> None:
    """The task's official score of a checkpoint; printed and written to `eval/<split>-step-N.json` of its run.

    That of a published model is written to `output`.

    Raises NumericsError, when it is written, for a score that is not finite.
    """
    from configs.phases import check_context
    from configs.run import check_same_data, evaluation_settings
    from configs.schema import ConfigError
    from training.checkpoint import newest_sound
    from training.distributed import Distributed
    from training.evaluation import evaluate, write_evaluation
    from training.numerics import check_score
    from training.run_dir import RunDir

    with Distributed(cfg.device) as dist:

        def choose(path):
            # training may still go on: each process for itself might find another one
            newest = newest_sound(path) if dist.is_main else None
            chosen = dist.broadcast_object(None if newest is None else str(newest))
            return None if chosen is None else Path(chosen)

        published = is_published(cfg.checkpoint)
        if published:
            run = open_published(cfg, device=dist.device)
        else:
            refuse_published_keys(cfg)
            run = open_run(
                cfg.run_dir,
                cfg.checkpoint,
                device=dist.device,
                strict=cfg.strict,
                num_threads=cfg.num_threads,
                data=cfg.data,
                choose=choose,
            )
        settings = evaluation_settings(cfg, run.config)
        task, step = run.task, run.state["step"]
        if cfg.split not in task.splits:
            raise ConfigError(f"split is {cfg.split!r}, it must be one of {', '.join(task.splits)}")
        check_context(run.model, task, "context", settings["context"])
        if "data" in run.state:
            check_same_data(run.state["data"], task.fingerprint, str(run.checkpoint))
        show = print if dist.is_main else lambda line: None
        scores = evaluate(task, run.model, cfg.split, dist=dist, precision=run.precision, settings=settings, show=show)
        result = {"step": step, **scores, **({"model": short_name(run.checkpoint)} if published else {})}
        if dist.is_main:
            if cfg.split != "train":
                result["baselines"] = task.baselines(cfg.split, settings["share"])
            path, kept = write_evaluation(RunDir(run.path), result, below="" if published else "eval")
            how = ", ".join(f"{key} {result[key]}" for key in SAID if key in result)
            score = f"{cfg.split} {task.metric} {result[task.metric]!r} at step {step:,}"
            also = f"; what was there has other settings and is kept as {kept.name}" if kept else ""
            print(f"{score} ({how}) -> {path}{also}")
        check_score(result, task.metric, run.path)


if __name__ == "__main__":
    entry("eval", main)
