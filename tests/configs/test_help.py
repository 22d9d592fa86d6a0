"""What a newcomer reads: --help of both commands, and the composed configuration."""

import pytest
import yaml

from configs.compose import CONFIG_DIR, compose_config
from tests.command import run_eval, run_train


@pytest.fixture(scope="module")
def train_help(tmp_path_factory):
    ended = run_train("--help", cwd=tmp_path_factory.mktemp("help"))
    assert (ended.code, ended.err) == (0, "")
    return ended.out


def test_help_names_every_group_and_every_option(train_help):
    for group in ("experiment", "model", "model/attention", "optim", "schedule", "size", "task", "tracker"):
        options = sorted(file.stem for file in (CONFIG_DIR / group).glob("*.yaml"))
        assert f"\n{group}: {', '.join(options)}\n" in train_help


def test_help_shows_the_keys_with_their_defaults(train_help):
    text = train_help.partition("Keys and their values (key=value):")[2].partition("window and dilation:")[0]
    defaults = compose_config([])
    assert yaml.safe_load(text)["optim"]["clip_norm"] == defaults.optim.clip_norm
    assert set(yaml.safe_load(text)) == set(defaults)


def test_help_has_five_examples_that_compose(train_help, tmp_path):
    examples = train_help.partition("Examples:")[2].partition("Results:")[0].split("\n")
    examples = [line.split("#")[0].split() for line in examples if "python train.py" in line]
    assert len(examples) >= 5
    for words in examples:
        overrides = [word.strip("'") for word in words[2:] if word != "-m"]
        if "model.source=FOLDER" in overrides:
            (tmp_path / "config.json").write_text('{"model_type": "longformer"}')
            overrides = [word.replace("FOLDER", str(tmp_path)) for word in overrides]
        compose_config([word.split(",")[0] if "[" not in word else word for word in overrides])


@pytest.mark.parametrize(
    "phrase",
    [
        "python train.py [experiment=NAME] [key=value …] [run_dir=DIR] [-m]",
        "no network, no GPU",
        "goes on from its newest checkpoint",
        "Exit codes: 0 done, 1 a bug of ours (traceback), 2 usage or configuration, 3 data, 4 checkpoint",
        "runs/<experiment>/<date>_<time>_<id>/",
        "sweeps/<experiment>/",
        "result.json",
        "python eval.py run_dir=DIR",
    ],
)
def test_help_says(train_help, phrase):
    assert phrase in train_help


def test_help_fits_a_terminal_and_does_not_speak_of_hydra(train_help):
    assert "Hydra" not in train_help and "hydra" not in train_help
    prose = [line for line in train_help.splitlines() if not line.startswith(("experiment: ", "model: ", "schedule: "))]
    assert max(map(len, prose)) <= 120


def test_help_of_eval(tmp_path):
    ended = run_eval("--help", cwd=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert "python eval.py run_dir=DIR [split=test] [key=value …]" in ended.out
    assert "DIR/eval/<split>-step-N.json" in ended.out and "Exit codes: 0 done" in ended.out
    assert ended.out.count("  python eval.py ") >= 6


def test_composed_configuration_is_shown(tmp_path):
    ended = run_train("--cfg", "job", "experiment=enwik8_small", "size=debug", cwd=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    shown = yaml.safe_load(ended.out)
    assert shown["task"]["dataset"] == "enwik8" and shown["schedule"]["cap"]["dim"] == 32
    assert len(shown["schedule"]["phases"]) == 5
    assert list(tmp_path.iterdir()) == []
