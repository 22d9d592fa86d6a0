"""Train a model: python train.py [experiment=NAME] [key=value …] [run_dir=DIR] [-m]."""

import math
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from configs.cli import entry


def main(cfg) -> None:
    """One run from its configuration to its result and report; the same `run_dir` goes on where it stopped."""
    # torch and what needs it load here, so that a typo or --help is answered at once
    from hydra.core.hydra_config import HydraConfig

    from configs.check import check
    from configs.compose import name_experiment
    from configs.phases import check_lengths, effective_phases, phase_patterns
    from configs.schema import build
    from training.distributed import Distributed

    cfg = check(name_experiment(cfg, list(HydraConfig.get().overrides.task)))
    phases = effective_phases(cfg)
    phase_patterns(cfg, phases)  # refuses options no layer can have
    with Distributed(cfg.device) as dist:
        task = build(cfg.task, "task", data=dict(cfg.data))
        check_lengths(phases, task.max_seq_len, dist.world_size)
        path = Path(dist.broadcast_object(str(choose_run_dir(cfg)) if dist.is_main else None))
        run(cfg, phases, task, path, dist)


def choose_run_dir(cfg) -> Path:
    """The folder the user named (in a sweep: the job's own below it), or a new one under runs/."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from training.run_dir import create_run_dir

    if cfg.run_dir is None:
        return create_run_dir("runs", cfg.experiment_name)
    parent = Path(cfg.run_dir).expanduser().absolute()
    hydra = HydraConfig.get() if HydraConfig.initialized() else None
    if hydra is None or hydra.mode != RunMode.MULTIRUN:
        return parent
    words = ",".join(word for word in hydra.overrides.task if not word.startswith("run_dir="))
    name = "".join(letter if letter.isalnum() or letter in "=,.-_" else "-" for letter in words)
    return parent / f"{hydra.job.num}_{name}"[:120]


def run(cfg, phases, task, path, dist) -> None:
    """Take the run folder, train in it, and leave word of how that ended."""
    import torch

    from configs.run import check_same_run, run_files
    from training.files import write_text
    from training.run_dir import RunDir

    folder = RunDir(path)
    if folder.read_status().get("status") == "finished":
        if dist.is_main:
            print(f"finished already: {path} (start anew with another run_dir, or remove it)")
        return
    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)
    check_same_run(path, cfg)
    with folder.lock() if dist.is_main else nullcontext():
        dist.barrier()
        if dist.is_main:
            for name, text in run_files(cfg).items():
                write_text(path / name, text)
            folder.write_env()
        try:
            train(cfg, phases, task, folder, dist)
        except BaseException as error:
            if dist.is_main:
                folder.status("failed", reason=f"{type(error).__name__}: {error}")
            raise


def train(cfg, phases, task, folder, dist) -> None:
    """The loop: phases of steps, a step of micro-batches; log, evaluate and save on the way, the result at the end."""
    import torch

    from configs.phases import build_model, set_phase_attention
    from training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint, sweep_stale
    from training.errors import NumericsError
    from training.evaluation import evaluate
    from training.meter import Meter
    from training.precision import autocast, resolve_precision
    from training.progress import ProgressReporter, peak_memory_bytes
    from training.schedule import learning_rate, locate

    device, precision = dist.device, resolve_precision(cfg.precision, dist.device)
    phase_steps = [phase.steps for phase in phases]
    torch.manual_seed(cfg.seed)
    model = build_model(cfg).to(device)
    optimizer = make_optimizer(cfg, model)
    # weights are the same in every process, dropped units are not
    torch.manual_seed(cfg.seed + dist.rank)
    state = {"step": 0, "tokens": 0, "train_seconds": 0.0, "data": task.fingerprint}
    if dist.is_main:
        sweep_stale(folder.path)
    dist.barrier()
    newest = latest_checkpoint(folder.path)
    if newest is not None:
        saved = load_checkpoint(newest, model=model, optimizer=optimizer, restore_rng=dist.is_main)
        check_same_data(saved["data"], task.fingerprint, newest)
        state |= {name: saved[name] for name in state}
        set_phase_attention(model, phases, saved["phase"])
    tracker = make_tracker(cfg, folder, state["step"]) if dist.is_main else None
    progress = ProgressReporter(sum(phase_steps), len(phases), enabled=dist.is_main)
    progress.message(opening(cfg, task, model, phases, precision, folder, state["step"], dist))
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
        num_targets = phase.batch_size * phase.seq_len
        rows = max(1, (cfg.schedule.micro_batch_tokens or num_targets) // phase.seq_len)
        micro_batches = next(batches).split(rows)
        for number, batch in enumerate(micro_batches, start=1):
            with nullcontext() if number == len(micro_batches) else dist.no_sync(forward):
                with autocast(precision, device):
                    loss_sum, _, metrics = task.loss(forward, batch.to(device, non_blocking=True))
                # DDP averages over processes, the loss is a mean over the targets of all of them
                (loss_sum * (dist.world_size / num_targets)).backward()
            meter.add({"loss": loss_sum, **metrics}, num_targets)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optim.clip_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        meter.step(num_targets)
        state["step"], state["tokens"] = step + 1, state["tokens"] + num_targets

        last = state["step"] == sum(phase_steps)
        if state["step"] % cfg.train.log_every == 0 or phase_step + 1 == phase.steps:
            metrics, seconds = meter.report(dist.all_reduce_sum)
            state["train_seconds"] += seconds
            if not math.isfinite(metrics["train/loss"]):
                raise NumericsError(
                    f"the loss is {metrics['train/loss']} by step {state['step']} (lr {lr:g}): lower the learning rate "
                    "of the phase or optim.clip_norm; the run goes on from its last checkpoint"
                )
            metrics |= {
                "step": state["step"],
                "phase": index,
                "optim/lr": lr,
                "optim/grad_norm": grad_norm.item(),
                "progress/tokens": state["tokens"],
                "time/train_s": state["train_seconds"],
                "mem/peak_gib": peak_memory_bytes(device) / 2**30,
            }
            progress.update(metrics)
            if tracker:
                tracker.log(metrics, state["step"])
        if not last and state["step"] % cfg.train.eval_every == 0:
            started = time.perf_counter()
            valid = score("valid", settings={**settings, "share": cfg.eval.valid_share})
            numbers = {f"valid/{name}": valid[name] for name in ("loss", task.metric)}
            progress.message(f"step {state['step']:,}: validation {task.metric} {valid[task.metric]:.4f}")
            if tracker:
                seconds = time.perf_counter() - started
                tracker.log({"step": state["step"], "phase": index, **numbers, "time/eval_s": seconds}, state["step"])
            meter.restart()
        if last or state["step"] % cfg.train.checkpoint_every == 0:
            if dist.is_main:
                attention = dict(phase.attention)
                save_checkpoint(
                    folder.path,
                    state["step"],
                    model=model,
                    optimizer=optimizer,
                    state={**state, "phase": index, "attention": attention},
                    keep=cfg.train.keep_checkpoints,
                )
                folder.status("running", step=state["step"])
            meter.restart()
    progress.close()
    result = score("test", settings={**settings, "share": cfg.eval.share}, show=progress.message)
    if dist.is_main:
        finish(cfg, phases, task, model, folder, tracker, state, result)


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


def check_same_data(saved, found, checkpoint) -> None:
    """ConfigError where a checkpoint was trained on other data than is here now."""
    from configs.schema import ConfigError

    # the same bytes may lie in another file
    keys = (saved.keys() | found.keys()) - {"source"}
    changed = sorted(key for key in keys if saved.get(key) != found.get(key))
    if changed:
        listed = ", ".join(f"{key} was {saved.get(key)}, is {found.get(key)}" for key in changed)
        raise ConfigError(f"{checkpoint} was trained on other data ({listed}): give the same, or start a new run")


def make_tracker(cfg, folder, step):
    """Where the metrics of a run go; on resume what was logged after the checkpoint is cut away first."""
    from omegaconf import OmegaConf

    from training.tracking import Tracker

    folder.truncate_metrics(step)
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    return Tracker(
        folder.path,
        wandb=config["tracker"]["wandb"],
        tensorboard=cfg.tracker.tensorboard,
        config=config,
        name=folder.path.name,
        resume_step=step or None,
    )


def opening(cfg, task, model, phases, precision, folder, step, dist) -> str:
    """What a person wants to know before the first step."""
    steps = sum(phase.steps for phase in phases)
    tokens = sum(phase.steps * phase.batch_size * phase.seq_len for phase in phases)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        f"{cfg.experiment_name}: {parameters / 1e6:.2f}M parameters, {precision} on {dist.device}"
        + (f" x {dist.world_size}" if dist.world_size > 1 else ""),
        f"{len(phases)} phase{'s' if len(phases) > 1 else ''}, {steps:,} steps, {tokens:,} tokens",
        f"run folder {folder.path}",
    ]
    return "\n".join([*lines, f"going on after step {step:,}"] if step else lines)


def finish(cfg, phases, task, model, folder, tracker, state, result) -> None:
    """Baselines, sample, result.json and the report of a trained and evaluated model."""
    from configs.phases import phase_patterns
    from reports.run import write_report
    from training.files import write_text
    from training.progress import peak_memory_bytes

    device = next(model.parameters()).device
    result = {
        "task": task.name,
        "split": "test",
        "step": state["step"],
        **result,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens_per_second": state["tokens"] / state["train_seconds"],
        "train_seconds": state["train_seconds"],
        "peak_memory_bytes": peak_memory_bytes(device),
        "seed": cfg.seed,
        "data": task.fingerprint,
        "baselines": task.baselines("test", cfg.eval.share),
    }
    folder.write_json(f"eval/test-step-{state['step']}.json", result)
    sample = task.sample(model)
    (folder.path / "samples").mkdir(exist_ok=True)
    write_text(folder.path / "samples" / f"step-{state['step']}.txt", sample)
    tracker.text("sample", sample, state["step"])
    tracker.log({f"test/{task.metric}": result[task.metric]}, state["step"])
    folder.write_json("result.json", result)
    folder.status("finished", step=state["step"])
    report = write_report(folder.path, phase_patterns(cfg, phases))
    for picture in sorted((folder.path / "plots").glob("*.png")):
        tracker.image(picture.stem, picture, state["step"])
    tracker.finish()
    print(closing(cfg, task, result, sample, folder, report))


def closing(cfg, task, result, sample, folder, report) -> str:
    """The result beside what it should be held against, where it lies, and what to try next."""
    better = sorted((bits, name) for name, bits in result["baselines"].items() if not name.startswith("train_bytes"))
    others = ", ".join(f"{name} {bits:.2f}" for bits, name in better)
    return "\n".join(
        [
            f"sample: {sample[-200:]!r}",
            f"test {task.metric} {result[task.metric]:.4f} on {result['num_characters']:,} characters "
            f"({result['share']:.0%} of the split); beside it {others}",
            f"{result['train_seconds']:.0f} s of training, {result['tokens_per_second']:,.0f} tokens/s, "
            f"peak {result['peak_memory_bytes'] / 2**30:.2f} GiB",
            f"report {report}",
            "next:",
            f"  python eval.py run_dir={folder.path}",
            "  python train.py experiment=enwik8_cpu   # a better model: 15 minutes",
            "  python train.py model.attention.window=64 seed=1   # anything is an override; --help lists the keys",
            "  python train.py -m seed=0,1,2   # several runs; then python -m reports.compare sweeps/default",
        ]
    )


if __name__ == "__main__":
    entry("train", main)
