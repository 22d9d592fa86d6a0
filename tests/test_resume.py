"""The same command on the same run folder: goes on to the bit, refuses another run, says when it is done."""

import json
import shutil

import pytest

from tests.command import metrics_of, phases, run_train, small_run

# dropout draws random numbers; the second phase drops the optimizer's state and keeps the windows of the first
SCHEDULE = phases(
    {"seq_len": 32, "batch_size": 4, "steps": 3, "lr": 1e-2, "warmup_steps": 2, "attention": {"window": [4, 12]}},
    {"seq_len": 48, "batch_size": 2, "steps": 3, "lr": 5e-3, "reset_optimizer": True},
    {"seq_len": 64, "batch_size": 2, "steps": 2, "lr": 2e-3, "attention": {"dilation": 2}},
)
SAVING = ("train.checkpoint_every=1", "train.keep_checkpoints=20", "train.eval_every=3", "model.dropout=0.2")
STEPS = 8


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Runs end without pictures, which cost more than such a run."""
    monkeypatch.setattr("reports.run.write_report", lambda path, patterns: path / "report.html")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """(arguments, run folder) of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("straight")
    arguments = [*small_run(folder), *SCHEDULE, *SAVING]
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
        file.write('{"step": 8, "train/lo')
    return arguments


@pytest.mark.parametrize("step", [2, 3, 5, 8])
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


def test_interval_between_logged_steps_survives_a_cut(tmp_path):
    """A checkpoint inside a logging interval: the line at its end still tells of the whole interval."""
    arguments = [*small_run(tmp_path), *SCHEDULE, "train.log_every=4", "train.checkpoint_every=5", "seed=2"]
    straight = tmp_path / "straight"
    assert run_train(*arguments, f"run_dir={straight}", cwd=tmp_path).code == 0
    resumed = tmp_path / "resumed"
    shutil.copytree(straight, resumed, symlinks=True)
    for name in ("result.json", "status.json"):
        (resumed / name).unlink()
    shutil.rmtree(resumed / "checkpoints" / "step-8")
    assert run_train(*arguments, f"run_dir={resumed}", cwd=tmp_path).code == 0
    assert metrics_of(resumed) == metrics_of(straight)


def test_finished_run_says_so_and_is_left_alone(straight, tmp_path):
    arguments, folder = straight
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    ended = run_train(*arguments, f"run_dir={folder}", "num_threads=1", cwd=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(f"finished already: {folder} ") and "another run_dir" in ended.out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


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
    assert ended.err == (
        f"error: run_dir={target} holds a run with another configuration (model.dropout: 0.2 there, 0.3 now; "
        "seed: 0 there, 9 now): use the same or another run_dir\n"
    )
    assert (target / "config.yaml").read_text() == saved


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


def test_damaged_checkpoint_is_an_error_of_its_own(straight, tmp_path):
    target = tmp_path / "run"
    arguments = cut(straight, target, 4)
    file = target / "checkpoints" / "step-4" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    ended = run_train(*arguments, f"run_dir={target}", cwd=tmp_path)
    assert ended.code == 4 and f"{file} is damaged: sha256 " in ended.err and "Traceback" not in ended.err
