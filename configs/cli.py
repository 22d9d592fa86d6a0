"""One wrapper around `hydra.main`: errors become one paragraph and an exit code, sweeps end with the largest code."""

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
from hydra.errors import HydraException  # noqa: E402
from hydra.types import RunMode  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from configs.check import nearest  # noqa: E402
from configs.compose import CONFIG_DIR, compose_raw  # noqa: E402
from configs.schema import register  # noqa: E402

# each job of a sweep appends its exit code here, also from another process
OUTCOMES = "LONGSPAN_SWEEP_OUTCOMES"


def entry(config_name: str, job: Callable[[DictConfig], None]) -> None:
    """Compose `config_name` with the command line, run `job` on it, and leave the process with its exit code."""
    register()
    arguments = sys.argv[1:]
    sweep = any(argument in ("-m", "--multirun") for argument in arguments)
    if sweep:
        sys.argv += _sweep_arguments(arguments)
        handle, os.environ[OUTCOMES] = tempfile.mkstemp()
        os.close(handle)
    codes = []

    @hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)
    def run(cfg: DictConfig) -> None:
        code = _outcome(lambda: job(cfg))
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            with open(os.environ[OUTCOMES], "a") as outcomes:
                outcomes.write(f"{code}\n")
            if code in (130, 143):
                raise KeyboardInterrupt
        codes.append(code)

    code = _outcome(run, arguments, config_name)
    if sweep:
        outcomes = Path(os.environ.pop(OUTCOMES))
        codes = [int(line) for line in outcomes.read_text().split()]
        outcomes.unlink()
    sys.exit(max([code, *codes]))


def _outcome(action, arguments=(), config_name="train") -> int:
    """Run an action; 0, or the code of what went wrong after saying it on stderr."""
    try:
        action()
    except (HydraException, OmegaConfBaseException) as error:
        return _say(_composition_error(error, list(arguments), config_name), 2)
    except KeyboardInterrupt:
        return _say("interrupted", 130)
    except Exception as error:
        if not isinstance(getattr(error, "exit_code", None), int):
            traceback.print_exc()
            return 1
        return _say(str(error), error.exit_code)
    return 0


def _say(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _sweep_arguments(arguments):
    """Name the folder of a sweep after its experiment where the user named none: the same command finds it again."""
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    # an experiment that is itself swept does not name the folder
    experiment = given.get("experiment", "default")
    folder = given.get("run_dir") or f"sweeps/{'sweep' if ',' in experiment else experiment}"
    extra = [] if "run_dir" in given else [f"run_dir={folder}"]
    return [*extra, f"hydra.sweep.dir={folder}"]


def _composition_error(error, arguments, config_name) -> str:
    """What Hydra or OmegaConf refused, in a line or two, without the advice to append with a plus."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = getattr(cause, "full_key", None)
    if "is not in struct" in str(cause) or (key and "not in" in str(cause).splitlines()[0]):
        key = key or lines[0].split("'")[1]
        return f"there is no configuration key {key}{nearest_key(key, arguments, config_name)}"
    if lines[0].startswith(("Could not find", "In ")) and "Available options" in str(error):
        wanted = next(line for line in lines if "Could not find" in line).split("'")[1]
        group, _, option = wanted.rpartition("/")
        start = next(index for index, line in enumerate(lines) if line.startswith("Available options"))
        options = [line for line in lines[start + 1 :] if not line.startswith(("Config search", "provider", "set "))]
        return f"there is no {group}={option}{nearest(option, options)} (there are: {', '.join(options)})"
    if isinstance(cause, OmegaConfBaseException) and key:
        return f"{key}: {str(cause.msg or cause).splitlines()[0]}"
    return " ".join(line for line in lines if not line.startswith(("See https", "To append")))


def nearest_key(key: str, arguments: list[str], config_name: str) -> str:
    """", did you mean X?" for a key that does not exist, from its parent's keys without the override that named it."""
    others = [argument for argument in arguments if "=" in argument and not argument.lstrip("+~").startswith(key)]
    parent, _, name = key.rpartition(".")
    try:
        cfg = compose_raw([argument for argument in others if "hydra." not in argument], config_name)
        node = OmegaConf.select(cfg, parent) if parent else cfg
        known = list(node.keys())
    except (HydraException, OmegaConfBaseException, AttributeError):
        return ""
    best = nearest(name, known)
    return best.replace("did you mean ", f"did you mean {parent}.") if best and parent else best
