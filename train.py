"""Train a model: python train.py [experiment=NAME] [key=value …] [run_dir=DIR] [-m]."""

import logging
import math
import time
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from configs.cli import entry

log = logging.getLogger(__name__)


def main(cfg) -> None:
    """One run from its configuration to its result and report; the same `run_dir` goes on where it stopped."""
    # torch and what needs it load here, so that a typo or --help is answered at once
    from configs.phases import check_against_data, effective_phases, phase_patterns
    from configs.schema import build
    from training.distributed import Distributed

    phases = effective_phases(cfg)
    phase_patterns(cfg, phases)  # refuses options no layer can have
    with Distributed(cfg.device) as dist:
        task = build(cfg.task, "task", data=dict(cfg.data))
        check_against_data(cfg, phases, task, dist.world_size)
        path = Path(dist.broadcast_object(str(choose_run_dir(cfg)) if dist.is_main else None))
        run(cfg, phases, task, path, dist)


def choose_run_dir(cfg) -> Path:
    """The folder the user named (in a sweep: the job's own below it), or a new one under runs/."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from configs.compose import job_folder
    from training.run_dir import create_run_dir

    if cfg.run_dir is None:
        return create_run_dir("runs", cfg.experiment_name)
    parent = Path(cfg.run_dir).expanduser().absolute()
    is_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return parent / job_folder() if is_sweep else parent


def run(cfg, phases, task, path, dist) -> None:
    """Take the run folder, train in it, and leave word of how that ended."""
    import torch

    from configs.run import check_same_run
    from training.run_dir import RunDir

    check_same_run(path, cfg)
    folder = RunDir(path)
    if folder.read_status().get("status") == "finished":
        if dist.is_main:
            print(f"finished already: {path} (start anew with another run_dir, or remove it)")
        return
    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)
    with ExitStack() as on_exit:
        if dist.is_main:
            on_exit.enter_context(folder.lock())
            on_exit.enter_context(folder.log_file())
        dist.barrier()
        try:
            train(cfg, phases, task, folder, dist, on_exit)
        except BaseException as error:
            if dist.is_main:
                folder.status("failed", reason=f"{type(error).__name__}: {error}")
                log.error("the run failed", exc_info=not hasattr(error, "exit_code"))
            raise


def train(cfg, phases, task, folder, dist, on_exit) -> None:
    """The loop: phases of steps, a step of micro-batches; log, evaluate and save on the way, the result at the end."""
    import torch

    from configs.phases import set_phase_attention
    from reports.summary import opening
    from training.checkpoint import save_checkpoint
    from training.evaluation import evaluate
    from training.meter import Meter
    from training.precision import autocast, resolve_precision
    from training.progress import ProgressReporter, peak_memory_bytes, reset_peak_memory
    from training.schedule import learning_rate, locate

    device, precision = dist.device, resolve_precision(cfg.precision, dist.device)
    reset_peak_memory(device)
    phase_steps = [phase.steps for phase in phases]
    model, optimizer, state = restore(cfg, phases, task, folder, dist)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    progress = ProgressReporter(sum(phase_steps), len(phases), enabled=dist.is_main)
    on_exit.callback(progress.close)
    where = f"{precision} on {device}" + (f" x {dist.world_size}" if dist.world_size > 1 else "")
    progress.message(opening(cfg.experiment_name, phases, num_parameters, where, folder.path, state["step"]))
    tracker = open_folder(cfg, folder, state["step"], on_exit) if dist.is_main else None
    forward = dist.wrap(torch.compile(model) if cfg.compile else model)
    settings = {"context": cfg.eval.context, "stride": cfg.eval.stride, "batch_tokens": cfg.eval.batch_tokens}
    score = partial(evaluate, task, model, dist=dist, precision=precision)

    meter, batches = Meter(), None
    for step in range(state["step"], sum(phase_steps)):
        index, phase_step = locate(step, phase_steps)
        phase = phases[index]
        if phase_step == 0 or batches is None:
            set_phase_attention(model, phases, index)
            if phase.reset_optimizer and phase_step == 0 and index > 0:
                optimizer = make_optimizer(cfg, model)
            batches = phase_batches(task, phase, cfg.seed * 1009 + index, phase_step, dist)
        lr = learning_rate(
            phase_step,
            lr=phase.lr,
            steps=phase.steps,
            warmup_steps=phase.warmup_steps,
            decay=phase.decay,
            final_lr_ratio=phase.final_lr_ratio,
        )
        optimizer.set_lr(lr)
        # what is dropped is a function of seed, step and process, so that a resumed run drops the same
        torch.manual_seed((cfg.seed * 2**32 + step) * 2**12 + dist.rank)
        rows = max(1, (cfg.schedule.micro_batch_tokens or phase.seq_len * phase.batch_size) // phase.seq_len)
        micro_batches = next(batches).split(rows)
        targets = torch.zeros((), device=device)
        for number, batch in enumerate(micro_batches, start=1):
            with nullcontext() if number == len(micro_batches) else dist.no_sync(forward):
                with autocast(precision, device):
                    loss_sum, num_targets, metrics = task.loss(forward, batch.to(device, non_blocking=True))
                (loss_sum * dist.world_size).backward()  # DDP averages over processes, this is a sum
            targets += num_targets
            meter.add({"loss": loss_sum, **metrics}, num_targets)
        mean = 1 / dist.all_reduce_sum(targets)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(mean)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        meter.step(phase.batch_size * phase.seq_len)
        state["step"], state["tokens"] = step + 1, state["tokens"] + phase.batch_size * phase.seq_len

        last = state["step"] == sum(phase_steps)
        save = last or state["step"] % cfg.train.checkpoint_every == 0
        # a checkpoint ends an interval: a resumed run logs what the straight one does, and no bad loss is saved
        if save or state["step"] % cfg.train.log_every == 0 or phase_step + 1 == phase.steps:
            metrics, seconds = meter.report(dist.all_reduce_sum)
            state["train_seconds"] += seconds
            metrics |= {
                "step": state["step"],
                "phase": index,
                "optim/lr": lr,
                "optim/grad_norm": grad_norm.item(),
                "progress/tokens": state["tokens"],
                "time/train_s": state["train_seconds"],
                "mem/peak_gib": peak_memory_bytes(device) / 2**30,
            }
            check_finite(metrics)
            progress.update(metrics)
            if tracker:
                tracker.log(metrics, state["step"])
        if not last and state["step"] % cfg.train.eval_every == 0:
            started = time.perf_counter()
            valid = score("valid", settings={**settings, "share": cfg.eval.valid_share})
            progress.message(f"step {state['step']:,}: validation {task.metric} {valid[task.metric]:.4f}")
            if tracker:
                numbers = {f"valid/{name}": valid[name] for name in ("loss", task.metric)}
                seconds = time.perf_counter() - started
                tracker.log({"step": state["step"], "phase": index, **numbers, "time/eval_s": seconds}, state["step"])
            meter.restart()
        if save:
            if dist.is_main:
                kept = {**state, "phase": index, "attention": dict(phase.attention)}
                keep = cfg.train.keep_checkpoints
                save_checkpoint(folder.path, state["step"], model=model, optimizer=optimizer, state=kept, keep=keep)
                folder.status("running", step=state["step"])
            meter.restart()
    progress.close()
    facts = {
        "step": state["step"],
        "num_parameters": num_parameters,
        "tokens_per_second": state["tokens"] / state["train_seconds"],
        "train_seconds": state["train_seconds"],
        "peak_memory_bytes": peak_memory_bytes(device),
        "seed": cfg.seed,
    }
    result = score("test", settings={**settings, "share": cfg.eval.share}, show=progress.message) | facts
    if dist.is_main:
        finish(cfg, phases, task, model, folder, tracker, result)


def restore(cfg, phases, task, folder, dist):
    """(model, optimizer, state) at the first step, or as the newest checkpoint left them."""
    import torch

    from configs.phases import build_model, set_phase_attention
    from configs.run import check_same_data
    from training.checkpoint import latest_checkpoint, load_checkpoint, sweep_stale

    torch.manual_seed(cfg.seed)
    model = build_model(cfg).to(dist.device)
    optimizer = make_optimizer(cfg, model)
    state = {"step": 0, "tokens": 0, "train_seconds": 0.0, "data": task.fingerprint}
    if dist.is_main:
        sweep_stale(folder.path)
    dist.barrier()
    newest = latest_checkpoint(folder.path)
    if newest is not None:
        saved = load_checkpoint(newest, model=model, optimizer=optimizer)
        check_same_data(saved["data"], task.fingerprint, str(newest))
        state |= {name: saved[name] for name in state}
        set_phase_attention(model, phases, saved["phase"])
    return model, optimizer, state


def open_folder(cfg, folder, step, on_exit):
    """Write down what is run and with what, once it is certain that it can be; the tracker its metrics go to."""
    from omegaconf import OmegaConf

    from configs.run import run_files
    from training.files import write_text
    from training.tracking import Tracker

    for name, text in run_files(cfg).items():
        write_text(folder.path / name, text)
    folder.write_env()
    folder.status("running", step=step)
    folder.truncate_metrics(step)
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    tracker = Tracker(
        folder.path,
        wandb=config["tracker"]["wandb"],
        tensorboard=cfg.tracker.tensorboard,
        config=config,
        name=folder.path.name,
        resume_step=step or None,
    )
    on_exit.callback(tracker.finish)
    return tracker


def make_optimizer(cfg, model):
    """The optimizer of all phases; each step sets its learning rate."""
    from training.optim import build_optimizer

    return build_optimizer(
        model,
        name=cfg.optim.name,
        lr=1.0,
        betas=tuple(cfg.optim.betas),
        eps=cfg.optim.eps,
        weight_decay=cfg.optim.weight_decay,
        muon_lr_ratio=cfg.optim.muon_lr_ratio,
    )


def phase_batches(task, phase, seed, start_step, dist):
    """Training batches of one phase from one of its steps on, this process's share of each."""
    return iter(
        task.batches(
            "train",
            seq_len=phase.seq_len,
            batch_size=phase.batch_size,
            seed=seed,
            start_step=start_step,
            rank=dist.rank,
            world_size=dist.world_size,
        )
    )


def check_finite(metrics) -> None:
    """NumericsError where the loss or the gradient of a log line is not a number any more."""
    from training.errors import NumericsError

    for name in ("train/loss", "optim/grad_norm"):
        if not math.isfinite(metrics[name]):
            raise NumericsError(
                f"{name} is {metrics[name]} by step {metrics['step']} (lr {metrics['optim/lr']:g}); nothing of it was "
                "saved. Give another run_dir and lower the learning rate (schedule.phases.N.lr) or optim.clip_norm."
            )


def finish(cfg, phases, task, model, folder, tracker, result) -> None:
    """Baselines, sample, result.json and the report of a trained and evaluated model."""
    from configs.phases import phase_patterns
    from reports.run import write_report
    from reports.summary import closing
    from training.files import write_text

    step = result["step"]
    result = {**result, "baselines": task.baselines("test", cfg.eval.share)}
    folder.write_json(f"eval/test-step-{step}.json", result)
    sample = task.sample(model)
    (folder.path / "samples").mkdir(exist_ok=True)
    write_text(folder.path / "samples" / f"step-{step}.txt", sample)
    tracker.text("sample", sample, step)
    tracker.log({f"test/{task.metric}": result[task.metric]}, step)
    folder.write_json("result.json", result)
    folder.status("finished", step=step)
    report = write_report(folder.path, phase_patterns(cfg, phases))
    for picture in sorted((folder.path / "plots").glob("*.png")):
        tracker.image(picture.stem, picture, step)
    print(closing(result, task.metric, sample, folder.path, report))


if __name__ == "__main__":
    entry("train", main)
