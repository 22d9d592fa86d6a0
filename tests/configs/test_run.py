"""The configuration of a run folder: read back checked, compared on resume."""

import pytest
from omegaconf import OmegaConf

from configs.compose import compose_config
from configs.run import check_same_run, load_run, run_files
from configs.schema import ConfigError
from tests.command import TINY


@pytest.fixture
def folder(tmp_path):
    """A run folder with the configuration of a tiny run."""
    for name, text in run_files(compose_config([*TINY, "seed=3"])).items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_configuration_comes_back_as_it_was(folder):
    assert load_run(folder) == compose_config([*TINY, "seed=3"])


def test_folder_without_a_configuration(tmp_path):
    with pytest.raises(ConfigError, match=f"^run_dir={tmp_path} is no run folder: it holds no config.yaml$"):
        load_run(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sede", 1, "there is no configuration key sede, did you mean seed?"),
        ("optim.nme", "adamw", "there is no configuration key optim.nme, did you mean optim.name?"),
        ("model._target_", "os.system", "model._target_ is os.system, it must name a class under models."),
        ("task._target_", "tasks.char_lm.np.load", "task._target_ is tasks.char_lm.np.load, which is no class"),
        ("model.attention._target_", "builtins.eval", "model.attention._target_ is builtins.eval, it must name"),
        ("seed", "abc", "seed is 'abc', it must be a whole number"),
        ("schedule.phases.0.stpes", 3, "there is no configuration key stpes, did you mean schedule.phases.0.steps?"),
    ],
)
def test_edited_configuration_is_checked_like_a_typed_one(folder, key, value, message):
    cfg = OmegaConf.load(folder / "config.yaml")
    OmegaConf.update(cfg, key, value)
    OmegaConf.save(cfg, folder / "config.yaml")
    with pytest.raises(ConfigError) as error:
        load_run(folder)
    assert str(error.value).startswith(message)


def test_same_run_may_move_and_log_otherwise(folder, tmp_path):
    local = ["num_threads=2", "device=cpu", "data.workers=1", f"run_dir={tmp_path}", "train.log_every=3"]
    check_same_run(folder, compose_config([*TINY, "seed=3", *local, "tracker.tensorboard=false"]))


def test_differences_are_listed_with_both_values(folder):
    other = compose_config([*TINY, "seed=4", "schedule.phases.0.lr=0.5", "schedule.phases.0.attention.window=3"])
    lr = compose_config([]).schedule.phases[0].lr
    with pytest.raises(ConfigError) as error:
        check_same_run(folder, other)
    assert str(error.value) == (
        f"run_dir={folder} holds a run with another configuration (schedule.phases.0.attention.window: absent there, "
        f"3 now; schedule.phases.0.lr: {lr} there, 0.5 now; seed: 3 there, 4 now): use the same or another run_dir"
    )


def test_folder_without_a_run_is_anybodys(tmp_path):
    check_same_run(tmp_path, compose_config([]))
