"""Run folders: unique, locked, and with files a crash cannot cut."""

import json
import os
import re
import subprocess
import sys

import pytest

from training import environment, run_dir
from training.errors import RunDirError
from training.run_dir import RunDir, create_run_dir


def test_folders_of_one_second_differ_and_the_link_follows(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir.time, "strftime", lambda _: "2026-01-02_030405")
    made = [create_run_dir(tmp_path / "runs", "enwik8_small") for _ in range(8)]
    assert len(set(made)) == 8
    assert all(re.fullmatch(r"2026-01-02_030405_[0-9a-f]{6}", path.name) for path in made)
    assert os.readlink(tmp_path / "runs" / "enwik8_small" / "latest") == made[-1].name


def test_a_taken_id_is_not_shared(tmp_path, monkeypatch):
    ids = iter(["aaaaaa", "aaaaaa", "bbbbbb"])
    monkeypatch.setattr(run_dir.time, "strftime", lambda _: "now")
    monkeypatch.setattr(run_dir.secrets, "token_hex", lambda _: next(ids))
    monkeypatch.setattr(run_dir, "point_link", lambda *_: None)
    assert [create_run_dir(tmp_path, "a").name for _ in range(2)] == ["now_aaaaaa", "now_bbbbbb"]


@pytest.mark.parametrize("name", ["", "..", "a/b"])
def test_names_that_are_no_folder_are_refused(tmp_path, name):
    with pytest.raises(RunDirError, match=f"experiment name {name!r} cannot name a folder"):
        create_run_dir(tmp_path, name)


def test_a_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(RunDirError, match="no run folder can be made in .*runs/a.* Choose another run_dir"):
        create_run_dir(tmp_path / "runs", "a")
    with pytest.raises(RunDirError, match="runs cannot be made"):
        RunDir(tmp_path / "runs")


def test_status_and_json(tmp_path):
    run = RunDir(tmp_path / "päth with spaces")
    assert run.read_status() == {}
    run.status("failed", step=7, loss=float("nan"))
    found = run.read_status()
    assert (found["status"], found["step"], found["loss"]) == ("failed", 7, "nan")
    run.write_json("eval/test-step-7.json", {"bpc": 1.5})
    assert json.loads((run.path / "eval" / "test-step-7.json").read_text()) == {"bpc": 1.5}


def test_metrics_are_on_disk_line_by_line(tmp_path):
    run = RunDir(tmp_path)
    for step in range(3):
        run.log_metrics({"step": step, "train/loss": float("inf") if step == 2 else step / 2})
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(step + 1))
    assert lines[-1]["train/loss"] == "inf"
    run.close()


def test_truncation_drops_later_steps_and_a_cut_line_then_appends(tmp_path):
    run = RunDir(tmp_path)
    for step in (1, 2, 3):
        run.log_metrics({"step": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "train/lo')
    run.truncate_metrics(2)
    run.log_metrics({"step": 3})
    run.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_truncation_of_nothing_makes_no_file(tmp_path):
    RunDir(tmp_path).truncate_metrics(0)
    assert list(tmp_path.iterdir()) == []


def test_a_second_holder_is_refused_until_the_first_lets_go(tmp_path):
    host = re.escape(run_dir.socket.gethostname())
    message = rf"in use by process {os.getpid()} on host {host}. Wait for it, or, .* delete .*run.lock"
    with RunDir(tmp_path).lock():
        with pytest.raises(RunDirError, match=message) as refused, RunDir(tmp_path).lock():
            pass
        assert refused.value.exit_code == 2
    with RunDir(tmp_path).lock():
        pass


def test_an_error_inside_lets_the_lock_go(tmp_path):
    with pytest.raises(KeyError), RunDir(tmp_path).lock():
        raise KeyError
    with RunDir(tmp_path).lock():
        pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    code = (
        "import os, signal, sys; from training.run_dir import RunDir\n"
        "with RunDir(sys.argv[1]).lock(): print('held', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = os.path.dirname(os.path.dirname(run_dir.__file__))
    result = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=root, capture_output=True, timeout=60)
    assert result.stdout == b"held\n"
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] > 0
    with RunDir(tmp_path).lock():
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("holder", "taken_over"),
    [
        ({"pid": 1, "host": "elsewhere", "started": None}, False),
        ({"pid": os.getpid(), "started": None}, False),
        ({"pid": os.getpid(), "started": "another boot:1"}, True),
        ({"pid": 2**22 + 5, "started": None}, True),
    ],
    ids=["other host", "alive", "number reused", "gone"],
)
def test_who_counts_as_a_holder(tmp_path, holder, taken_over):
    holder = {"host": run_dir.socket.gethostname(), **holder}
    (tmp_path / "run.lock").write_text(json.dumps(holder))
    if taken_over:
        with RunDir(tmp_path).lock():
            return
    with pytest.raises(RunDirError, match=f"process {holder['pid']} on host {holder['host']}"):
        RunDir(tmp_path).lock().__enter__()
    assert json.loads((tmp_path / "run.lock").read_text()) == holder


@pytest.mark.parametrize("content", ["", "garbage", "[]", '{"pid": "x", "host": "y"}'])
def test_a_lock_file_without_a_holder_is_free(tmp_path, content):
    (tmp_path / "run.lock").write_text(content)
    with RunDir(tmp_path).lock():
        pass


def test_env_names_versions_machine_and_command(tmp_path):
    RunDir(tmp_path).write_env()
    found = json.loads((tmp_path / "env.json").read_text())
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"]["torch"]
    assert {"triton", "numpy", "hydra-core"} <= found["packages"].keys()
    assert found["machine"]["num_cores"] >= 1
    assert found["machine"]["memory_bytes"] > 2**28
    assert found["command"] == sys.argv


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", folder, *identity, *arguments], check=True, capture_output=True)


def test_changed_sources_are_kept_as_a_diff(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", tmp_path / "repo")
    (tmp_path / "repo").mkdir()
    git(tmp_path / "repo", "init")
    (tmp_path / "repo" / "a.py").write_text("one = 1\n")
    git(tmp_path / "repo", "add", ".")
    git(tmp_path / "repo", "commit", "-m", "first")
    described, diff = environment.describe_environment()
    assert (described["git"]["dirty"], diff) == (False, "")
    (tmp_path / "repo" / "a.py").write_text("two = 2\n")
    run = RunDir(tmp_path / "run")
    run.write_env()
    assert json.loads((run.path / "env.json").read_text())["git"]["dirty"] is True
    assert "-one = 1\n+two = 2\n" in (run.path / "dirty.diff").read_text()
    monkeypatch.setattr(environment, "MAX_DIFF_BYTES", 20)
    run.write_env()
    assert re.search(r"\[cut: \d+ bytes in all, the first 20 kept\]", (run.path / "dirty.diff").read_text())


def test_sources_outside_a_repository_are_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    described, diff = environment.describe_environment()
    assert (described["git"], diff) == (None, "")
