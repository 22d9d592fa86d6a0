"""The configuration of a run folder: read back checked, compared on resume."""

import re

import pytest
import yaml
from omegaconf import OmegaConf

from configs.compose import compose_config
from configs.run import MAX_SHOWN, check_same_run, check_schedule, load_run, run_files
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
    assert str(error.value).startswith(f"{folder / 'config.yaml'}: {message}")


@pytest.mark.fault(16)
def test_same_run_may_move_and_log_otherwise_and_says_so(folder, tmp_path):
    local = ["num_threads=2", "device=cpu", f"run_dir={tmp_path}", "train.nonfinite=skip"]
    now = compose_config([*TINY, "seed=3", *local, "resume.allow_changes=[optim]"])
    assert sorted(check_same_run(folder, now)) == [
        "+ device: cpu",
        "+ num_threads: 2",
        "+ train.nonfinite: skip",
        "- device: auto",
        "- num_threads: null",
        "- train.nonfinite: stop",
    ]
    assert run_files(now, folder, step=5).keys() == {"config.yaml", "overrides.txt"}


@pytest.fixture
def tiny_run(folder):
    """`tiny_run("seed=4")` compares the run with one that has these overrides too."""
    (folder / "overrides.txt").write_text("model.dim=32\nseed=3\n")

    def compare(*overrides):
        return check_same_run(folder, compose_config([*TINY, "seed=3", *overrides]))

    return compare


@pytest.mark.fault(16)
def test_differences_are_shown_with_the_way_to_go_on(folder, tiny_run):
    lr = compose_config([]).schedule.phases[0].lr
    with pytest.raises(ConfigError) as error:
        tiny_run("seed=4", "schedule.phases.0.lr=0.5", "schedule.phases.0.attention.window=3")
    assert str(error.value).splitlines() == [
        f"run_dir={folder} holds a run with another configuration (- there, + now):",
        f"- schedule.phases.0.lr: {lr}",
        "+ schedule.phases.0.lr: 0.5",
        "+ schedule.phases.0.attention.window: 3",
        "- seed: 3",
        "+ seed: 4",
        "it was started with: model.dim=32 seed=3",
        "use the same or another run_dir; to go on all the same, add "
        "'resume.allow_changes=[schedule.phases.0.lr,schedule.phases.0.attention.window,seed]'",
    ]


@pytest.mark.fault(16)
def test_allowed_changes_are_returned(tiny_run):
    allow = "resume.allow_changes=[optim.weight_decay,schedule,train]"
    changes = ["optim.weight_decay=0.5", "schedule.phases.0.attention.window=3", "schedule.cap.steps=4"]
    decay = compose_config([]).optim.weight_decay
    assert tiny_run(allow, *changes) == [
        f"- optim.weight_decay: {decay}",
        "+ optim.weight_decay: 0.5",
        "+ schedule.phases.0.attention.window: 3",
        "- schedule.cap.steps: null",
        "+ schedule.cap.steps: 4",
    ]
    assert tiny_run(allow) == []


@pytest.mark.fault(16)
@pytest.mark.parametrize(
    ("allowed", "change"),
    [
        ("optim.eps", "optim.weight_decay=0.5"),
        ("optim.weight", None),
        ("seed", "precision=fp32"),
        ("model.attention", "model.dropout=0.1"),
        ("schedule.phases", "schedule.micro_batch_tokens=64"),
    ],
)
def test_an_entry_allows_what_it_names_and_what_stands_under_it(tiny_run, allowed, change):
    if change is None:
        expected = f"resume.allow_changes: there is no configuration key {allowed} (optim has: name, "
        with pytest.raises(ConfigError, match=re.escape(expected)):
            tiny_run(f"resume.allow_changes=[{allowed}]", "optim.weight_decay=0.5")
        return
    with pytest.raises(ConfigError) as error:
        tiny_run(f"resume.allow_changes=[{allowed}]", change)
    key = change.partition("=")[0]
    assert f"+ {change.replace('=', ': ')}" in str(error.value)
    assert str(error.value).endswith(f"add 'resume.allow_changes=[{allowed},{key}]'")


def test_phase_1_does_not_stand_for_phase_10(folder):
    def with_rate(lr):
        rates = [*["1e-3"] * 10, lr]
        phases = ",".join(f"{{seq_len:64,batch_size:2,steps:3,lr:{rate}}}" for rate in rates)
        return compose_config([*TINY, f"schedule.phases=[{phases}]", "resume.allow_changes=[schedule.phases.1]"])

    (folder / "config.yaml").write_text(run_files(with_rate("1e-3"))["config.yaml"])
    with pytest.raises(ConfigError, match=re.escape("allow_changes=[schedule.phases.1,schedule.phases.10.lr]")):
        check_same_run(folder, with_rate("2e-3"))


@pytest.mark.fault(16)
@pytest.mark.parametrize("allow", ["", "resume.allow_changes=[model,task]"])
@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        (["model.dim=64"], "the weights there do not fit the model now (model.dim changed): use another run_dir"),
        (["model.num_heads=8"], "the weights there do not fit the model now (model.num_heads changed)"),
        (["model.num_layers=3", "model.dropout=0.1"], "(model.num_layers, model.dropout changed)"),
        (["model.positions=relative"], "(model.positions changed): use another run_dir"),
        (["task=text8"], "task.dataset cannot change within a run: use another run_dir"),
    ],
)
def test_other_shapes_and_other_tasks_need_another_folder(tiny_run, allow, changes, advice):
    with pytest.raises(ConfigError) as error:
        tiny_run(*changes, *filter(None, [allow]))
    last = str(error.value).splitlines()[-1]
    assert advice in last and "allow_changes" not in last


@pytest.mark.fault(16)
def test_what_leaves_the_weights_alone_can_be_allowed(tiny_run):
    changes = ["model.dropout=0.5", "model.checkpoint_activations=true", "model.attention.window=[4,16]"]
    allow = "resume.allow_changes=[model.dropout,model.checkpoint_activations,model.attention]"
    shown = tiny_run(allow, *changes)
    assert "- model.attention.window: 8" in shown and "+ model.attention.window: [4, 16]" in shown


def test_entry_that_names_nothing_is_refused_before_there_is_a_run(tmp_path):
    with pytest.raises(ConfigError) as error:
        check_same_run(tmp_path, compose_config([*TINY, "resume.allow_changes=[optim.weight_deacy]"]))
    expected = "there is no configuration key optim.weight_deacy, did you mean optim.weight_decay?"
    assert str(error.value) == f"resume.allow_changes: {expected}"


def test_key_that_only_the_former_run_had_may_be_named(folder):
    window = "schedule.phases.0.attention.window"
    (folder / "config.yaml").write_text(run_files(compose_config([*TINY, f"{window}=3"]))["config.yaml"])
    now = compose_config([*TINY, f"resume.allow_changes=[{window}]"])
    assert check_same_run(folder, now) == [f"- {window}: 3"]


def test_run_of_a_version_without_a_key_has_its_default(folder):
    file = folder / "config.yaml"
    tree = yaml.safe_load(file.read_text())
    del tree["eval"]["protocol"], tree["resume"]
    file.write_text(OmegaConf.to_yaml(tree))
    assert check_same_run(folder, compose_config([*TINY, "seed=3"])) == []


def test_many_differences_are_cut(tiny_run):
    phases = ",".join("{seq_len:64,batch_size:2,steps:3,lr:1e-3}" for _ in range(20))
    with pytest.raises(ConfigError) as error:
        tiny_run(f"schedule.phases=[{phases}]")
    lines = str(error.value).splitlines()
    assert len(lines) == 1 + 2 * MAX_SHOWN + 3 and lines[-3].endswith(" lines more")


def test_former_configuration_is_kept_with_the_step_it_ended_at(folder):
    same, other = compose_config([*TINY, "seed=3"]), compose_config([*TINY, "seed=4"])
    former = (folder / "config.yaml").read_text()
    assert set(run_files(same, folder, 7)) == set(run_files(other, folder, 0)) == {"config.yaml", "overrides.txt"}
    files = run_files(other, folder, 7)
    assert list(files) == ["config-until-step-7.yaml", "config.yaml", "overrides.txt"]
    assert files["config-until-step-7.yaml"] == former
    # the second change at one step: what stands there is what made the steps
    (folder / "config-until-step-7.yaml").write_text(former)
    assert "config-until-step-7.yaml" not in run_files(other, folder, 7)


def test_folder_without_a_run_is_anybodys(tmp_path):
    assert check_same_run(tmp_path, compose_config([])) == []


@pytest.mark.fault(16)
def test_schedule_that_ends_before_the_checkpoint_is_refused():
    check_schedule(40, 40, "step-40")
    with pytest.raises(ConfigError, match="^the schedule ends at step 40, step-41 is at step 41: give a schedule at "):
        check_schedule(40, 41, "step-41")
