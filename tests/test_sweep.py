"""`-m`: a folder a job, all jobs run, the largest code wins, and the same command finishes what is left."""

import json

import pytest

from tests.command import run_train, small_run
from tests.helpers import run_python


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Runs end without pictures, which cost more than such a run."""
    monkeypatch.setattr("reports.run.write_report", lambda path, patterns: path / "report.html")


def results_in(folder):
    """Seed of the finished runs in a folder, by the name of the run's folder."""
    return {file.parent.name: json.loads(file.read_text())["seed"] for file in sorted(folder.glob("*/result.json"))}


def test_jobs_have_folders_named_by_number_and_overrides(tmp_path):
    arguments = ("-m", *small_run(tmp_path), "seed=3,4")
    ended = run_train(*arguments, cwd=tmp_path)
    assert ended.code == 0, ended.err
    found = results_in(tmp_path / "sweeps" / "default")
    assert sorted(found.values()) == [3, 4]
    for name, seed in found.items():
        number, _, words = name.partition("_")
        assert int(number) == seed - 3 and f"seed={seed}" in words
    assert not (tmp_path / "runs").exists()

    again = run_train(*arguments, cwd=tmp_path)
    assert again.code == 0 and again.out.count("finished already: ") == 2
    assert results_in(tmp_path / "sweeps" / "default") == found


def test_flag_may_stand_anywhere(tmp_path):
    seen = []
    arguments = (*small_run(tmp_path)[:1], "seed=3,4", "-m", "model.dim=32")
    ended = run_train(*arguments, cwd=tmp_path, job=lambda cfg: seen.append((cfg.seed, cfg.model.dim)))
    assert ended.code == 0, ended.err
    assert seen == [(3, 32), (4, 32)]


def test_unfinished_job_is_done_by_the_same_command(tmp_path):
    arguments = ("-m", *small_run(tmp_path), "seed=0,1", f"run_dir={tmp_path / 'mine'}")
    assert run_train(*arguments, cwd=tmp_path).code == 0
    first, second = sorted((tmp_path / "mine").glob("*/result.json"))
    kept = first.stat().st_mtime_ns
    score = json.loads(second.read_text())["bpc"]
    second.unlink()
    (second.parent / "status.json").unlink()
    again = run_train(*arguments, cwd=tmp_path)
    assert again.code == 0 and again.out.count("finished already: ") == 1
    assert json.loads(second.read_text())["bpc"] == score and first.stat().st_mtime_ns == kept


def test_failing_jobs_do_not_stop_the_others(tmp_path):
    """Widths 30 (no multiple of the heads) and 32, a file that is not there and one that is."""
    arguments = small_run(tmp_path)
    (path,) = (word for word in arguments if word.startswith("data.path"))
    ended = run_train("-m", *arguments, f"{path},{tmp_path / 'missing'}", "model.dim=30,32", cwd=tmp_path)
    assert ended.code == 3
    assert ended.err.count("error: model.num_heads 4 does not divide model.dim 30") == 2
    assert ended.err.count(f"error: data.path={tmp_path / 'missing'} does not exist") == 1
    assert list(results_in(tmp_path / "sweeps" / "default").values()) == [0]
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("swept", ["enwik8_small,text8_small", "glob(*8_small)"])
def test_sweep_over_experiments_names_each_run_after_its_own(tmp_path, swept):
    names = []
    ended = run_train(
        *("-m", f"experiment={swept}", "size=debug"),
        cwd=tmp_path,
        job=lambda cfg: names.append((cfg.experiment_name, cfg.run_dir)),
    )
    assert ended.code == 0, ended.err
    assert names == [("enwik8_small", "sweeps/sweep"), ("text8_small", "sweeps/sweep")]


@pytest.mark.slow
def test_jobs_side_by_side(tmp_path):
    """The joblib launcher: two processes, one of them failing, one exit code."""
    parallel = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"run_dir={tmp_path / 'mine'}")
    ended = run_python("train.py", "-m", *small_run(tmp_path), *parallel, "model.dim=30,32", "seed=7")
    assert ended.returncode == 2
    assert "error: model.num_heads 4 does not divide model.dim 30" in ended.stderr
    assert list(results_in(tmp_path / "mine").values()) == [7]
    assert "Traceback" not in ended.stderr
