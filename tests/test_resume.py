"""The same command on the same run folder: goes on to the bit, refuses another run, says when it is done."""

import json
import shutil

import pytest

from tests.command import metrics_of, phases, run_train, small_run

# dropout draws random numbers; the second phase drops the optimizer's state and keeps the windows of the first
SCHEDULE = phases(
    {"seq_len": 32, "batch_size": 4, "steps": 17, "lr": 1e-2, "warmup_steps": 2, "attention": {"window": [4, 12]}},
    {"seq_len": 48, "batch_size": 2, "steps": 14, "lr": 5e-3, "reset_optimizer": True},
    {"seq_len": 64, "batch_size": 2, "steps": 9, "lr": 2e-3, "attention": {"dilation": 2}},
)
SAVING = ("train.checkpoint_every=1", "train.keep_checkpoints=50", "train.eval_every=10", "model.dropout=0.2")
# a step is two micro-batches; a log line tells of three steps
ACCUMULATED = ("schedule.micro_batch_tokens=64", "train.log_every=3")
STEPS = 40


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Runs end without pictures, which cost more than such a run."""
    monkeypatch.setattr("reports.run.write_report", lambda path, patterns: path / "report.html")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """(arguments, run folder) of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("straight")
    arguments = [*small_run(folder), *SCHEDULE, *SAVING, *ACCUMULATED]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reports.run.write_report", lambda path, patterns: path / "report.html")
        ended = run_train(*arguments, f"run_dir={folder / 'run'}", cwd=folder)
    assert ended.code == 0, ended.err
    return arguments, folder / "run"


def cut(straight, target, step):
    """A copy of the straight run as a crash after `step` leaves it; later lines of metrics.jsonl are there still."""
    arguments, folder = straight
    shutil.copytree(folder, target, symlinks=True)
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(target / "checkpoints" / f"step-{later}")
    for name in ("result.json", "status.json"):
        (target / name).unlink()
    with open(target / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "train/lo')
    return arguments


@pytest.mark.fault(14)
@pytest.mark.parametrize("step", [2, 17, 20, 31, STEPS])
def test_resumed_run_ends_like_the_straight_one(straight, tmp_path, step):
    target = tmp_path / "run"
    arguments = cut(straight, target, step)
    ended = run_train(*arguments, f"run_dir={target}", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert f"going on after step {step}" in ended.out
    for name in ("model", "optimizer", "rng"):
        file = f"checkpoints/step-{STEPS}/{name}.safetensors"
        assert (target / file).read_bytes() == (straight[1] / file).read_bytes(), name
    assert metrics_of(target) == metrics_of(straight[1])
    results = [json.loads((folder / "result.json").read_text()) for folder in (straight[1], target)]
    for timed in ("tokens_per_second", "train_seconds", "peak_memory_bytes"):
        assert results[1].pop(timed) > 0 and results[0].pop(timed) > 0
    assert results[0] == results[1]


@pytest.mark.fault(16)
def test_finished_run_says_so_and_is_left_alone(straight, tmp_path):
    arguments, folder = straight
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    ended = run_train(*arguments, f"run_dir={folder}", "num_threads=1", cwd=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(f"finished already: {folder} ") and "another run_dir" in ended.out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.fault(16)
def test_finished_run_goes_on_to_the_end_of_a_longer_schedule(straight, tmp_path):
    target = tmp_path / "run"
    shutil.copytree(straight[1], target, symlinks=True)
    arguments = (*straight[0], f"run_dir={target}", "schedule.phases.2.steps=12")
    assert run_train(*arguments, cwd=tmp_path).code == 2
    allowed = (*arguments, "resume.allow_changes=[schedule.phases.2.steps]")
    ended = run_train(*allowed, cwd=tmp_path)
    assert ended.code == 0 and "going on after step 40" in ended.out and "finished already" not in ended.out
    result = json.loads((target / "result.json").read_text())
    assert result["step"] == 43 and result["bpc"] != json.loads((straight[1] / "result.json").read_text())["bpc"]
    assert json.loads((target / "status.json").read_text())["status"] == "finished"
    steps = [line["step"] for line in metrics_of(target) if "phase" in line and "valid/bpc" not in line]
    assert steps[-1] == 43 and steps == sorted(set(steps))
    for again in (allowed, arguments):
        assert run_train(*again, cwd=tmp_path).out.startswith("finished already")


def test_final_test_keeps_an_evaluation_of_other_settings(straight, tmp_path):
    target = tmp_path / "run"
    arguments = cut(straight, target, STEPS)
    file = target / "eval" / f"test-step-{STEPS}.json"
    former = json.loads(file.read_text()) | {"share": 0.5}
    file.write_text(json.dumps(former))
    ended = run_train(*arguments, f"run_dir={target}", cwd=tmp_path)
    (kept,) = file.parent.glob("*,share=0.5,*.json")
    assert ended.code == 0 and f"with other settings is kept as {kept}\n" in ended.out
    assert json.loads(kept.read_text()) == former and json.loads(file.read_text())["share"] != 0.5


@pytest.mark.fault(16)
def test_checkpoints_without_their_configuration_are_not_gone_on_with(straight, tmp_path):
    target = tmp_path / "run"
    arguments = cut(straight, target, 4)
    (target / "config.yaml").unlink()
    before = sorted(target.rglob("*"))
    ended = run_train(*arguments, f"run_dir={target}", "seed=7", cwd=tmp_path)
    assert ended.code == 2 and ended.err.startswith(
        f"error: run_dir={target} holds checkpoints of a run but no config.yaml, which says what they were trained "
    )
    assert "restore it from a copy, or use another run_dir" in ended.err and ended.err.count("\n") == 1
    assert sorted(target.rglob("*")) == before


@pytest.mark.fault(16)
@pytest.mark.parametrize("finished", [False, True])
def test_other_configuration_is_refused_with_the_difference(straight, tmp_path, finished):
    target = tmp_path / "run"
    arguments = cut(straight, target, 4)
    if finished:
        shutil.rmtree(target)
        shutil.copytree(straight[1], target, symlinks=True)
    saved = (target / "config.yaml").read_text()
    ended = run_train(*arguments, f"run_dir={target}", "model.dropout=0.3", "seed=9", cwd=tmp_path)
    assert ended.code == 2 and "Traceback" not in ended.err
    first, *changes, started, advice = ended.err.splitlines()
    assert first == f"error: run_dir={target} holds a run with another configuration (- there, + now):"
    assert changes == ["- model.dropout: 0.2", "+ model.dropout: 0.3", "- seed: 0", "+ seed: 9"]
    assert started.startswith("it was started with: size=debug model.dim=32 ")
    assert advice.endswith("to go on all the same, add 'resume.allow_changes=[model.dropout,seed]'")
    assert (target / "config.yaml").read_text() == saved


@pytest.mark.fault(16)
def test_allowed_changes_are_shown_and_the_former_configuration_is_kept(straight, tmp_path):
    target = tmp_path / "run"
    arguments = cut(straight, target, 38)
    saved = (target / "config.yaml").read_text()
    changed = (*arguments, f"run_dir={target}", "optim.weight_decay=0.5")
    ended = run_train(*changed, "resume.allow_changes=[optim]", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert "going on after step 38" in ended.out and "+ optim.weight_decay: 0.5" in ended.out
    assert "+ optim.weight_decay: 0.5" in (target / "train.log").read_text()
    assert (target / "config-until-step-38.yaml").read_text() == saved
    assert "weight_decay: 0.5" in (target / "config.yaml").read_text()
    # the change is the run's now: the command of before is another run's
    back = run_train(*arguments, f"run_dir={target}", cwd=tmp_path)
    assert back.code == 2 and "- optim.weight_decay: 0.5" in back.err
    assert run_train(*changed, cwd=tmp_path).out.startswith("finished already")


@pytest.mark.fault(16)
@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ("model.dim=64", "the weights there do not fit the model now (model.dim changed): use another run_dir"),
        ("task.dataset=enwik8", "task.dataset cannot change within a run: use another run_dir"),
    ],
)
def test_another_model_or_task_is_refused_whatever_is_allowed(straight, tmp_path, change, advice):
    arguments, folder = straight
    allow = "resume.allow_changes=[model,task]"
    ended = run_train(*arguments, f"run_dir={folder}", change, allow, cwd=tmp_path)
    assert ended.code == 2 and ended.err.splitlines()[-1] == advice


def test_other_data_is_refused(straight, tmp_path):
    target = tmp_path / "run"
    arguments = [word for word in cut(straight, target, 4) if not word.startswith("data.path")]
    (other,) = (word for word in small_run(tmp_path, seed=1) if word.startswith("data.path"))
    saved = (target / "config.yaml").read_text()
    ended = run_train(*arguments, other, f"run_dir={target}", cwd=tmp_path)
    assert ended.code == 2 and "Traceback" not in ended.err
    assert "was trained on other data (sha256 was " in ended.err and "start a new run" in ended.err
    assert (target / "config.yaml").read_text() == saved
    assert not (target / "result.json").exists()


def test_same_bytes_under_another_name_are_the_same_data(straight, tmp_path):
    target = tmp_path / "run"
    arguments = cut(straight, target, 6)
    (path,) = (word.partition("=")[2] for word in arguments if word.startswith("data.path"))
    moved = shutil.copy(path, tmp_path / "moved.txt")
    ended = run_train(*arguments, f"data.path={moved}", f"run_dir={target}", cwd=tmp_path)
    assert ended.code == 0 and "going on after step 6" in ended.out


def test_run_folder_without_a_checkpoint_starts_over(straight, tmp_path):
    target = tmp_path / "run"
    arguments = cut(straight, target, 0)
    ended = run_train(*arguments, f"run_dir={target}", cwd=tmp_path)
    assert ended.code == 0 and "going on" not in ended.out
    assert metrics_of(target) == metrics_of(straight[1])
    shutil.rmtree(target / "checkpoints")
    (target / "checkpoints").mkdir()
    for name in ("config.yaml", "status.json"):
        (target / name).unlink()
    assert run_train(*arguments, f"run_dir={target}", cwd=tmp_path).code == 0


@pytest.mark.fault(6)
@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(straight, tmp_path, capfd, damage):
    target = tmp_path / "run"
    arguments = cut(straight, target, 20)
    file = target / "checkpoints" / "step-20" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content[:-10] if damage == "cut" else content)
    ended = run_train(*arguments, f"run_dir={target}", cwd=tmp_path)
    assert ended.code == 0 and "going on after step 19" in ended.out
    told = [line for line in (target / "train.log").read_text().splitlines() if "WARNING" in line and str(file) in line]
    assert len(told) == 1 and "step-19 is used instead" in told[0]
    assert metrics_of(target) == metrics_of(straight[1])
    assert len(list((target / "checkpoints").glob("step-20.damaged-*"))) == 1


def test_no_sound_checkpoint_at_all_is_an_error_of_its_own(straight, tmp_path):
    target = tmp_path / "run"
    arguments = cut(straight, target, 2)
    for step in (1, 2):
        (target / "checkpoints" / f"step-{step}" / "state.json").write_text("{}")
    ended = run_train(*arguments, f"run_dir={target}", cwd=tmp_path)
    assert ended.code == 4 and "none of the 2 checkpoints" in ended.err and "Traceback" not in ended.err
    assert {path.name for path in (target / "checkpoints").iterdir()} >= {"step-1", "step-2"}
