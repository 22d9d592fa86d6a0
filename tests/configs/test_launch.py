"""What leads past the checks is refused before Hydra starts: flags, foreign folders, secrets that would be saved."""

import json

import pytest
import yaml

from tests.command import TINY, run_eval, run_train, small_run
from tests.helpers import run_python


def code_of(text):
    """A job that leaves its configuration behind."""

    def job(cfg):
        text.append(cfg)

    return job


def refused(tmp_path, *arguments, command=run_train):
    """What train.py says to these, where it must refuse them and run nothing."""
    jobs = []
    options = {"job": code_of(jobs)} if command is run_train else {}
    ended = command(*arguments, cwd=tmp_path, **options)
    assert ended.code == 2 and jobs == [] and "Traceback" not in ended.err and len(ended.err.splitlines()) == 1
    return ended.err.removeprefix("error: ")


FLAGS = [
    (["--experimental-rerun", "config.pickle"], "--experimental-rerun is not taken: it would unpickle a file"),
    (["--experimental-rerun=config.pickle"], "--experimental-rerun is not taken: it would unpickle a file"),
    (["--exp", "config.pickle", "seed=1"], "--experimental-rerun is not taken: "),
    (
        ["seed=1", "--config-path=/tmp"],
        "--config-path is not taken: the configurations are those of the folder configs",
    ),
    (["-cp", "/tmp"], "--config-path is not taken: "),
    (["--config-p", "/tmp"], "--config-path is not taken: "),
    (["-cn", "eval"], "--config-name is not taken: "),
    (["hydra.searchpath=[file:///tmp]"], "hydra.searchpath is not taken: "),
    (["++hydra.searchpath=[file:///tmp]"], "hydra.searchpath is not taken: "),
]


@pytest.mark.fault(10)
@pytest.mark.parametrize("command", [run_train, run_eval])
@pytest.mark.parametrize(("arguments", "message"), FLAGS, ids=[" ".join(words) for words, _ in FLAGS])
def test_flags_that_lead_past_the_checks_are_refused(tmp_path, command, arguments, message):
    said = refused(tmp_path, *arguments, command=command)
    assert message in said and ("run_dir=DIR" in said or "--config-dir DIR" in said)


@pytest.mark.fault(10)
def test_pickle_of_a_former_run_is_not_opened(tmp_path):
    (tmp_path / "config.pickle").write_bytes(b"cos\nsystem\n(S'touch marker'\ntR.")
    ended = run_python("train.py", "--experimental-rerun", tmp_path / "config.pickle")
    assert ended.returncode == 2 and ended.stderr.startswith("error: the option --experimental-rerun is not taken")


@pytest.fixture
def folder(tmp_path):
    """A folder of configurations from somebody else."""
    (tmp_path / "theirs" / "experiment").mkdir(parents=True)
    return tmp_path / "theirs"


def write(folder, name, tree, package="_global_"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# @package {package}\n{yaml.safe_dump(tree)}")


def test_experiment_of_an_added_folder_runs(tmp_path, folder):
    write(folder, "experiment/mine.yaml", {"model": {"dim": 64}, "seed": 5})
    seen = []
    ended = run_train("experiment=mine", "--config-dir", folder, cwd=tmp_path, job=code_of(seen))
    assert ended.code == 0, ended.err
    assert (seen[0].model.dim, seen[0].seed, seen[0].experiment_name) == (64, 5, "mine")


def test_typo_beside_an_added_folder_is_explained(tmp_path, folder):
    write(folder, "experiment/mine.yaml", {"seed": 5})
    said = refused(tmp_path, f"--config-dir={folder}", "experiment=mine", "sede=3")
    assert said == "there is no configuration key sede, did you mean seed?\n"
    said = refused(tmp_path, f"--config-dir={folder}", "experiment=mien")
    assert said.startswith("there is no experiment=mien, did you mean mine?")
    assert refused(tmp_path, f"--config-dir={tmp_path}/no_such", "seed=3").endswith("/no_such is no folder\n")


FOREIGN = [
    ({"model": {"_target_": "os.system"}}, "model._target_ is os.system, it must name a class under models."),
    ({"task": {"_target_": "tasks.char_lm.np.load"}}, "task._target_ is tasks.char_lm.np.load, which is no class"),
    ({"model": {"attention": {"extra": {"_target_": "os.system"}}}}, "model.attention.extra._target_ is not allowed"),
    ({"model": {"_partial_": True}}, "model._partial_ is not allowed: of such keys there are only"),
    ({"optim": {"betas": [{"_target_": "os.system"}]}}, "optim.betas.0._target_ is not allowed"),
]


@pytest.mark.fault(10)
@pytest.mark.parametrize(("tree", "message"), FOREIGN, ids=[json.dumps(tree) for tree, _ in FOREIGN])
def test_code_in_an_added_folder_meets_the_same_check(tmp_path, folder, tree, message):
    write(folder, "experiment/evil.yaml", tree)
    assert refused(tmp_path, f"--config-dir={folder}", "experiment=evil").startswith(message)


TOUCH = {"_target_": "pathlib.Path.touch", "self": {"_target_": "pathlib.Path", "_args_": ["marker"]}}
LOGGING = {"version": 1, "handlers": {"x": {"()": "pathlib.Path", "marker": 1}}, "root": {"handlers": ["x"]}}
LAUNCHER = [
    ("callbacks", {"evil": TOUCH}),
    ("launcher", {"_target_": "pathlib.Path.touch"}),
    ("sweeper", {"_target_": "pathlib.Path.touch"}),
    ("job_logging", LOGGING),
    ("hydra_logging", LOGGING),
    ("job", {"env_set": {"LD_PRELOAD": "evil.so"}}),
    ("output_subdir", ".hydra"),
    ("run", {"dir": "elsewhere"}),
]


@pytest.mark.fault(10)
@pytest.mark.parametrize(
    "mode", [[], ["-m", "seed=1,2"], ["--multirun", "experiment=evil,debug"]], ids=["run", "m", "g"]
)
@pytest.mark.parametrize(("section", "value"), LAUNCHER, ids=[section for section, _ in LAUNCHER])
def test_added_folder_may_not_change_the_launcher(tmp_path, folder, section, value, mode):
    write(folder, "experiment/evil.yaml", {"hydra": {section: value}})
    write(folder, "experiment/debug.yaml", {"seed": 1})
    chosen = [] if len(mode) == 2 and "experiment" in mode[1] else ["experiment=evil"]
    said = refused(tmp_path, f"--config-dir={folder}", *mode, *chosen)
    assert said.startswith(
        f"--config-dir={folder} sets hydra.{section}, which could run code before anything is checked"
    )
    assert not (tmp_path / "marker").exists()


@pytest.mark.fault(10)
def test_ways_around_the_global_package_change_nothing(tmp_path, folder):
    write(folder, "experiment/evil.yaml", {"evil": TOUCH}, package="hydra.callbacks")
    assert "sets hydra.callbacks" in refused(tmp_path, f"--config-dir={folder}", "experiment=evil")
    write(folder, "hydra/callbacks/evil.yaml", {"evil": TOUCH}, package="hydra.callbacks")
    write(folder, "experiment/other.yaml", {"defaults": [{"override /hydra/callbacks": "evil"}]})
    assert "sets hydra.callbacks" in refused(tmp_path, "-cd", folder, "experiment=other")


def test_launcher_may_be_set_by_whoever_types(tmp_path, folder):
    write(folder, "experiment/mine.yaml", {"seed": 5})
    seen = []
    arguments = (f"--config-dir={folder}", "experiment=mine", "hydra.sweep.subdir=x", "hydra.job.name=mine")
    assert run_train(*arguments, cwd=tmp_path, job=code_of(seen)).code == 0 and seen[0].seed == 5


SECRETS = ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "db_password", "GOOGLE_APPLICATION_CREDENTIALS"]


FORMS = ["x-${oc.env:HF_TOKEN,none}", "'${oc.decode:${oc.env:HF_TOKEN}}'", "${oc.env:'HF_TOKEN'}"]


@pytest.mark.parametrize(
    ("name", "value"), [(name, f"${{oc.env:{name}}}") for name in SECRETS] + [("HF_TOKEN", form) for form in FORMS]
)
def test_secret_of_the_environment_is_not_written_down(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, "hunter2")
    said = refused(tmp_path, *TINY, f"tracker.wandb.entity={value}")
    assert said.startswith(f"tracker.wandb.entity would write the environment variable {name}, by its name a secret, ")
    assert "hunter2" not in said


@pytest.mark.parametrize("name", ["DATA", "KEYBOARD", "MONKEY", "TOKENIZERS_PARALLELISM", "PWD"])
def test_other_variables_are_looked_up_once_and_stored_as_they_were(tmp_path, monkeypatch, name):
    (path,) = (word.partition("=")[2] for word in small_run(tmp_path) if word.startswith("data.path="))
    monkeypatch.setenv(name, path)
    seen = []
    assert run_train(f"data.path=${{oc.env:{name}}}", cwd=tmp_path, job=code_of(seen)).code == 0
    assert seen[0].data.path == path


def test_text_that_would_be_looked_up_by_the_next_reader_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("NAME", "value")
    said = refused(tmp_path, *TINY, r"tracker.wandb.entity='\${oc.env:NAME}'")
    assert said.startswith("tracker.wandb.entity is '${oc.env:NAME}' when everything is looked up")
