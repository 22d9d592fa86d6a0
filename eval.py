"""Score a trained run: python eval.py run_dir=DIR [split=test] [share=…]."""

from pathlib import Path

from configs.cli import entry


def main(cfg) -> None:
    """The task's official score of a run's newest checkpoint; printed and written to `eval/<split>-step-N.json`."""
    import torch
    from omegaconf import OmegaConf

    from configs.phases import build_model
    from configs.run import check_same_data, evaluation_settings, load_run
    from configs.schema import ConfigError, build
    from training.checkpoint import latest_checkpoint, load_checkpoint
    from training.distributed import Distributed
    from training.errors import CheckpointError
    from training.evaluation import evaluate
    from training.precision import resolve_precision
    from training.run_dir import RunDir

    if cfg.run_dir is None:
        raise ConfigError("run_dir has no value: give the folder of a run with run_dir=DIR")
    path = Path(cfg.run_dir).expanduser()
    run = load_run(path)
    settings = evaluation_settings(cfg, run)
    checkpoint = latest_checkpoint(path)
    if checkpoint is None:
        raise CheckpointError(f"{path} holds no complete checkpoint yet")
    if cfg.num_threads or run.num_threads:
        torch.set_num_threads(cfg.num_threads or run.num_threads)
    with Distributed(cfg.device) as dist:
        data = OmegaConf.merge(run.data, {key: value for key, value in cfg.data.items() if value is not None})
        task = build(run.task, "task", data=dict(data))
        if cfg.split not in task.splits:
            raise ConfigError(f"split is {cfg.split!r}, it must be one of {', '.join(task.splits)}")
        model = build_model(run).to(dist.device)
        state = load_checkpoint(checkpoint, model=model, restore_rng=False)
        check_same_data(state["data"], task.fingerprint, str(checkpoint))
        model.set_attention(**state["attention"])
        precision = resolve_precision(run.precision, dist.device)
        show = print if dist.is_main else lambda line: None
        result = evaluate(task, model, cfg.split, dist=dist, precision=precision, settings=settings, show=show)
        if dist.is_main:
            if cfg.split != "train":
                result["baselines"] = task.baselines(cfg.split, settings["share"])
            name = f"eval/{cfg.split}-step-{state['step']}.json"
            RunDir(path).write_json(name, {"step": state["step"], **result})
            print(f"{cfg.split} {task.metric} {result[task.metric]!r} at step {state['step']:,} -> {path / name}")


if __name__ == "__main__":
    entry("eval", main)
