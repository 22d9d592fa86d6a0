"""Train a model: python train.py [experiment=NAME] [key=value …] [run_dir=DIR] [-m]."""

import logging
import shlex
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from configs.cli import entry

log = logging.getLogger(__name__)


def main(cfg) -> None:
    """One run from its configuration to its result and report; the same `run_dir` goes on where it stopped."""
    # torch and what needs it load here, so that a typo or --help is answered at once
    from configs.compose import named_run_dir
    from configs.phases import check_against_data, check_device, effective_phases, phase_patterns
    from configs.schema import build
    from training.distributed import Distributed
    from training.precision import resolve_precision
    from training.run_dir import find_tokenizer

    phases = effective_phases(cfg)
    phase_patterns(cfg, phases)  # refuses options no layer can have
    check_optimizer(cfg)
    with Distributed(cfg.device) as dist:
        check_device(cfg, dist.device, resolve_precision(cfg.precision, dist.device))
        task = build(cfg.task, "task", data=dict(cfg.data))
        find_tokenizer(task, named_run_dir(cfg))
        check_against_data(cfg, phases, task, dist.world_size)
        path = Path(dist.broadcast_object(str(choose_run_dir(cfg)) if dist.is_main else None))
        run(cfg, phases, task, path, dist)


def check_optimizer(cfg) -> None:
    """ConfigError where Muon is asked for and the model trains no matrix that it could take."""
    import torch

    from configs.phases import build_model
    from configs.schema import ConfigError
    from training.optim import parameter_roles

    with torch.device("meta"):
        model = build_model(cfg)
    if cfg.optim.name == "muon" and "matrix" not in parameter_roles(model).values():
        raise ConfigError("optim.name is muon, it needs hidden weight matrices to train: give optim=roberta")


def choose_run_dir(cfg) -> Path:
    """The folder the user named (in a sweep: the job's own below it), or a new one under runs/."""
    from configs.compose import named_run_dir
    from training.run_dir import create_run_dir

    return named_run_dir(cfg) or create_run_dir("runs", cfg.experiment_name)


def run(cfg, phases, task, path, dist) -> None:
    """Take the run folder, train in it, and leave word of how that ended."""
    import torch

    from configs.run import check_same_run
    from reports.summary import finished
    from training.files import room_for
    from training.run_dir import RunDir
    from training.signals import Interrupted, Signals

    changes = check_same_run(path, cfg)
    folder = RunDir(path)
    status, num_steps = folder.read_status(), sum(phase.steps for phase in phases)
    # with more steps than were made, a change that was let pass, it goes on
    if status.get("status") == "finished" and num_steps <= status.get("step", num_steps):
        if dist.is_main:
            print(finished(path))
        return
    if cfg.num_threads is not None:
        torch.set_num_threads(cfg.num_threads)

    def leave_word(status, **fields):
        if dist.is_main:
            folder.status(status, **fields)

    with ExitStack() as on_exit:
        if dist.is_main:
            on_exit.enter_context(folder.lock())
            on_exit.enter_context(folder.log_file())
        signals = Signals(
            on_abort=lambda name: leave_word("failed", reason=f"a second signal, {name}"),
            # what the user gave, of a sweep the folder of all its jobs
            advice=f"the same command with {shlex.quote(f'run_dir={cfg.run_dir or path}')} goes on",
        )
        on_exit.enter_context(signals)
        dist.barrier()
        session = None
        try:
            # what is opened closes before the last word: a checkpoint may still be in writing
            with room_for(path), ExitStack() as resources:
                session = open_session(cfg, phases, task, folder, dist, signals, changes, resources)
                train(session)
                finish(session)
        except BaseException as error:
            reached = {"step": session.state["step"]} if session else {}
            if isinstance(error, Interrupted):
                leave_word("preempted", reason=error.number.name, **reached)
                raise
            leave_word("failed", reason=f"{type(error).__name__}: {error}", **reached)
            if dist.is_main:
                # to train.log alone: the command itself prints it
                log.info("the run failed", exc_info=not hasattr(error, "exit_code"))
            raise


def open_session(cfg, phases, task, folder, dist, signals, changes, on_exit):
    """Everything a run needs, at its first step or where its newest checkpoint left it."""
    from configs.phases import build_model
    from reports.summary import opening
    from training.checkpoint import sweep_stale
    from training.checkpoint_writer import CheckpointWriter
    from training.precision import resolve_precision
    from training.progress import ProgressReporter, reset_peak_memory
    from training.run_dir import keep_tokenizer
    from training.session import Session

    reset_peak_memory(dist.device)
    session = Session(
        cfg,
        phases,
        task,
        folder,
        dist,
        signals,
        precision=resolve_precision(cfg.precision, dist.device),
        progress=ProgressReporter(sum(phase.steps for phase in phases), len(phases), enabled=dist.is_main),
        make_model=lambda: build_model(cfg),
        make_optimizer=lambda model: make_optimizer(cfg, model),
    )
    on_exit.callback(session.progress.close)
    if dist.is_main:
        sweep_stale(folder.path)
    dist.barrier()
    resume_or_start(session)
    where = f"{session.precision} on {dist.device}" + (f" x {dist.world_size}" if dist.world_size > 1 else "")
    step = session.state["step"]
    session.progress.message(opening(cfg.experiment_name, phases, session.num_parameters, where, folder.path, step))
    for line in changes:
        session.progress.message(line)
    if dist.is_main:
        keep_tokenizer(task, folder.path)
        session.tracker = open_folder(cfg, folder, step, on_exit)
        session.writer = CheckpointWriter(
            folder.path,
            keep=cfg.train.keep_checkpoints,
            asynchronous=cfg.train.async_checkpoints,
            max_failures=cfg.train.max_failed_saves,
        )
        on_exit.callback(session.writer.close)
    return session


def resume_or_start(session) -> None:
    """The newest sound checkpoint, of this data and in the attention of its phase; or the first step."""
    from configs.phases import set_phase_attention
    from configs.run import check_same_data, check_schedule
    from training.schedule import locate

    found = session.restore()
    if found is not None:
        path, saved = found
        step = session.state["step"]
        check_same_data(saved["data"], session.task.fingerprint, str(path))
        check_schedule(session.num_steps, step, str(path))
        processes = saved["world_size"]
        if processes != session.dist.world_size:
            session.progress.message(
                f"{path.name} is of {processes} process(es), now there are {session.dist.world_size}: the "
                "batches stay the same, sums are rounded in another order and dropout draws other numbers"
            )
        # not the phase it was saved in: the schedule may have been changed since
        done, _ = locate(max(step - 1, 0), [phase.steps for phase in session.phases])
        set_phase_attention(session.model, session.phases, done)


def open_folder(cfg, folder, step, on_exit):
    """Write down what is run and with what, once it is certain that it can be; the tracker its metrics go to."""
    from omegaconf import OmegaConf

    from configs.run import run_files
    from training.files import write_text
    from training.tracking import Tracker

    for name, text in run_files(cfg, folder.path, step).items():
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
        resume_step=step,
    )
    on_exit.callback(tracker.finish)
    return tracker


def train(session) -> None:
    """The loop: validate, step, log, save, until the last step or a signal."""
    from training.schedule import locate

    cfg, state = session.cfg, session.state
    phase_steps, started = [phase.steps for phase in session.phases], state["step"]
    with session.signals.held():
        while state["step"] < session.num_steps:
            # after the checkpoint of this step: a run that goes on from it validates once more
            if state["step"] and state["step"] % cfg.train.eval_every == 0:
                # of several processes none may leave alone: there a signal waits for the step after
                with session.signals.released() if session.dist.world_size == 1 else nullcontext():
                    validate(session)
            index, phase_step = locate(state["step"], phase_steps)
            if session.batches is None or phase_step == 0:
                session.batches = begin_phase(session, index, phase_step)
            batch = next(session.batches)
            lr, numbers = session.compute_gradients(batch, index, phase_step)
            if not numbers.is_finite:
                handle_nonfinite(session, batch, numbers, index, lr)
                if cfg.train.nonfinite == "rewind":
                    continue
            else:
                session.optimizer.step()
                session.meter.add(numbers.sums, numbers.num_targets)
            session.optimizer.zero_grad()
            num_tokens = session.phases[index].batch_size * session.phases[index].seq_len
            session.meter.step(num_tokens)
            state["step"] += 1
            state["tokens"] += num_tokens
            last = state["step"] == session.num_steps
            if last or state["step"] % cfg.train.log_every == 0 or phase_step + 1 == phase_steps[index]:
                session.log_interval(numbers, index, lr)
            due = any(state["step"] % every == 0 for every in (cfg.train.checkpoint_every, cfg.train.eval_every))
            if last or due or numbers.stop:
                session.save(index)
            if numbers.stop:
                session.ensure_saved()
                raise session.signals.interruption()
        if started < session.num_steps:
            session.ensure_saved()
        stop_together(session)


def stop_together(session) -> None:
    """Interrupted on all processes where one of them has been sent a signal since its last step."""
    import torch

    received = float(session.signals.received is not None)
    if session.dist.all_reduce_sum(torch.tensor(received, device=session.dist.device)) > 0:
        raise session.signals.interruption()


def begin_phase(session, index, phase_step) -> Iterator:
    """Set attention and optimizer for a phase; its batches, from one of its steps on."""
    from configs.phases import set_phase_attention

    cfg, phase, dist = session.cfg, session.phases[index], session.dist
    set_phase_attention(session.model, session.phases, index)
    if phase.reset_optimizer and phase_step == 0 and index > 0:
        session.optimizer = make_optimizer(cfg, session.model)
    return iter(
        session.task.batches(
            "train",
            seq_len=phase.seq_len,
            batch_size=phase.batch_size,
            # a run that went back reads on in another order
            seed=cfg.seed * 1009 + index + session.state["rewinds"] * 2**32,
            start_step=phase_step,
            rank=dist.rank,
            world_size=dist.world_size,
        )
    )


def handle_nonfinite(session, batch, numbers, index, lr) -> None:
    """A loss or gradient that is not finite: keep the batch; stop, pass over it, or go back to the last checkpoint."""
    from training.numerics import check_limit, keep_batch, stopped

    cfg, state, policy = session.cfg, session.state, session.cfg.train.nonfinite
    facts = {"step": state["step"], "phase": index, "lr": lr, "loss": numbers.loss, "grad_norm": numbers.grad_norm}
    session.optimizer.zero_grad()
    folder = keep_batch(session.folder.path, batch, facts, session.dist.rank)
    what = f"step {state['step'] + 1:,}: loss {numbers.loss}, gradient norm {numbers.grad_norm}"
    if policy == "stop":
        session.save(index)
        session.ensure_saved()
        raise stopped(facts, folder)
    state["nonfinite"] += 1
    count = state["nonfinite"]
    check_limit(policy, count, cfg.train.nonfinite_limit, folder)
    if policy == "skip":
        session.progress.message(f"{what}; no update ({count} of {cfg.train.nonfinite_limit}), batch in {folder}")
        return
    rewinds = state["rewinds"] + 1
    if session.writer:
        session.writer.wait()
    resume_or_start(session)
    state.update(nonfinite=count, rewinds=rewinds)
    if session.tracker:
        session.tracker.rewind(state["step"])
    session.progress.message(f"{what}; back to step {state['step']:,} ({rewinds} of {cfg.train.nonfinite_limit})")


def score(session, split, share, show=lambda line: None) -> dict:
    """The task's official score of the model as it is."""
    from training.evaluation import evaluate

    settings = {name: session.cfg.eval[name] for name in session.task.settings}
    return evaluate(
        session.task,
        session.model,
        split,
        dist=session.dist,
        precision=session.precision,
        settings={**settings, "share": share},
        show=show,
    )


def validate(session) -> None:
    """Score a share of the validation split; the checkpoint of this step becomes the best where it is."""
    from training.checkpoint import mark_best
    from training.schedule import locate

    metric, step = session.task.metric, session.state["step"]
    index, _ = locate(step - 1, [phase.steps for phase in session.phases])
    started = time.perf_counter()
    valid = score(session, "valid", session.cfg.eval.valid_share)
    session.progress.message(f"step {step:,}: validation {metric} {valid[metric]:.4f}")
    if session.tracker:
        numbers = {f"valid/{name}": valid[name] for name in ("loss", metric)}
        session.tracker.log(
            {"step": step, "phase": index, **numbers, "time/eval_s": time.perf_counter() - started}, step
        )
        session.writer.wait()
        mark_best(session.folder.path, step, valid["loss"])
    session.meter.restart()


def make_optimizer(cfg, model):
    """The optimizer of all phases; each step sets its learning rate."""
    from training.optim import build_optimizer

    options = {name: value for name, value in cfg.optim.items() if name not in ("clip_norm", "betas")}
    return build_optimizer(model, lr=1.0, betas=tuple(cfg.optim.betas), **options)


def finish(session) -> None:
    """The final test of the trained model, its result and report."""
    from configs.phases import phase_patterns
    from reports.result import write_result
    from training.numerics import check_score
    from training.precision import autocast
    from training.progress import peak_memory_bytes

    cfg, state = session.cfg, session.state
    session.progress.close()
    facts = {
        "step": state["step"],
        "num_parameters": session.num_parameters,
        "tokens_per_second": state["tokens"] / state["train_seconds"],
        "train_seconds": state["train_seconds"],
        "peak_memory_bytes": peak_memory_bytes(session.dist.device),
        "seed": cfg.seed,
    }
    result = score(session, "test", cfg.eval.share, show=session.progress.message) | facts
    if session.dist.is_main:
        patterns = phase_patterns(cfg, session.phases)
        with autocast(session.precision, session.dist.device):
            told = write_result(session.folder, session.task, session.model, result, patterns, session.tracker)
        session.progress.message(told)
        if hasattr(session.model, "export"):
            folder = session.folder.path / "pretrained"
            session.model.export(folder, tokenizer=session.task.folder)
            session.progress.message(f"the model as transformers loads it: {folder}")
    check_score(result, session.task.metric, session.folder.path)  # the main process has done so before its report


if __name__ == "__main__":
    entry("train", main)
