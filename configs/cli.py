"""One wrapper around `hydra.main`: errors become a line and an exit code, sweeps end with the largest."""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

# read by Hydra when it reports: composition errors are raised to us instead of printed
os.environ["HYDRA_FULL_ERROR"] = "1"

import hydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.types import RunMode  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from configs.check import check, check_evaluation, check_prediction  # noqa: E402
from configs.compose import CONFIG_DIR, name_experiment, open_keys, quoted, task_overrides  # noqa: E402
from configs.explain import explain  # noqa: E402
from configs.launch import check_added_folder, is_override, is_swept, refused_addition, refused_flag  # noqa: E402
from configs.schema import register  # noqa: E402

# each job of a sweep appends its exit code here, also from another process
OUTCOMES = "LONGSPAN_SWEEP_OUTCOMES"
OTHER_CHECKS = {"eval": check_evaluation, "predict": check_prediction}


def entry(config_name: str, job: Callable[[DictConfig], None]) -> None:
    """Compose `config_name` with the command line, check it, run `job` on it; exits with the code."""
    register()
    # argparse takes overrides in one row, so flags go before them
    arguments = sorted(map(quoted, sys.argv[1:]), key=is_override)
    fault = refused_flag(arguments) or refused_addition(arguments, config_name)
    if fault:
        sys.exit(_say(fault, 2))

    def explained(error: Exception) -> str | None:
        return explain(error, arguments, config_name)

    code = outcome(lambda: check_added_folder(arguments, config_name), explained)
    if code:
        sys.exit(code)
    sys.argv[1:] = open_keys(arguments)
    sweep = any(argument in ("-m", "--multirun") for argument in arguments)
    if sweep and config_name != "train":
        sys.exit(_say(f"{config_name}.py takes one run at a time: leave out -m", 2))
    if sweep:
        sys.argv += _sweep_arguments(arguments)
        handle, os.environ[OUTCOMES] = tempfile.mkstemp()
        os.close(handle)
    codes = []

    @hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)
    def run(cfg: DictConfig) -> None:
        code = outcome(lambda: job(_checked(cfg, config_name)))
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            with open(os.environ[OUTCOMES], "a") as outcomes:
                outcomes.write(f"{code}\n")
            if code in (130, 143):
                raise KeyboardInterrupt
        codes.append(code)

    try:
        code = outcome(run, explained)
    finally:
        if sweep:
            outcomes = Path(os.environ.pop(OUTCOMES))
            codes = [int(line) for line in outcomes.read_text().split()]
            outcomes.unlink()
    sys.exit(max([code, *codes]))


def _checked(cfg: DictConfig, config_name: str) -> DictConfig:
    if config_name in OTHER_CHECKS:
        return OTHER_CHECKS[config_name](cfg)
    return check(name_experiment(cfg, task_overrides()))


def outcome(action: Callable[[], None], explained: Callable = lambda error: None) -> int:
    """Run an action; 0, or the code of what went wrong after saying it on stderr.

    `explained(error)`: one line about an error that has no code of its own, None where it is our bug.
    """
    try:
        action()
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseException as error:
        code = getattr(error, "exit_code", None)
        if isinstance(code, int):  # a refusal, or a signal after which all was saved
            return _say(str(error), code)
        if not isinstance(error, Exception):
            raise
        message = explained(error)
        if message is None:
            traceback.print_exc()
            return 1
        return _say(message, 2)
    return 0


def _say(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _sweep_arguments(arguments):
    """Name the folder of a sweep after its experiment where the user named none, its jobs after what varies."""
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    fixed = [argument.partition("=")[0].lstrip("+~") for argument in arguments if not is_swept(argument)]
    quoted = ",".join(f"'{key}'" for key in fixed if not key.startswith("-"))
    # an experiment that is itself swept does not name the folder
    swept = "experiment" in given and "experiment" not in fixed
    folder = given.get("run_dir") or f"sweeps/{'sweep' if swept else given.get('experiment', 'default')}"
    extra = [] if "run_dir" in given else [f"run_dir={folder}"]
    return [*extra, f"hydra.sweep.dir={folder}", f"hydra.job.config.override_dirname.exclude_keys=[{quoted}]"]
