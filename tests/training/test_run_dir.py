"""Run folders: unique, locked, and with files a crash cannot cut."""

import io
import json
import logging
import os
import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from training import environment, files, run_dir
from training.errors import RunDirError
from training.run_dir import RunDir, create_run_dir


def full(*_, **__):
    """Stands for a write on a full disk."""
    raise OSError(28, "No space left on device")


@pytest.mark.fault(39)
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


@pytest.mark.fault(17)
def test_eight_processes_that_start_at_once_make_eight_folders(tmp_path):
    code = (
        "import sys; from training.run_dir import create_run_dir as f; sys.stdin.readline(); print(f(sys.argv[1], 'a'))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(8)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    made = {process.communicate()[0].strip() for process in processes}
    assert {str(path) for path in (tmp_path / "a").iterdir() if not path.is_symlink()} == made and len(made) == 8
    assert str((tmp_path / "a" / "latest").resolve()) in made


@pytest.mark.parametrize("name", ["", "..", "a/b"])
def test_names_that_are_no_folder_are_refused(tmp_path, name):
    with pytest.raises(RunDirError, match=f"experiment name {name!r} cannot name a folder"):
        create_run_dir(tmp_path, name)


@pytest.mark.fault(38)
def test_a_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(RunDirError, match="no run folder can be made in .*runs/a.* Choose another run_dir"):
        create_run_dir(tmp_path / "runs", "a")
    with pytest.raises(RunDirError, match="runs cannot be made: .* Choose another run_dir"):
        RunDir(tmp_path / "runs")


def test_status_and_json(tmp_path):
    run = RunDir(tmp_path / "päth with spaces")
    assert run.read_status() == {}
    run.status("failed", step=7, loss=float("nan"))
    found = run.read_status()
    assert (found["status"], found["step"], found["loss"]) == ("failed", 7, "nan")
    run.write_json("eval/test-step-7.json", {"bpc": 1.5})
    assert json.loads((run.path / "eval" / "test-step-7.json").read_text()) == {"bpc": 1.5}


@pytest.mark.fault(4)
def test_status_on_a_full_disk_uses_the_room_of_the_old_one(tmp_path, caplog, monkeypatch):
    run = RunDir(tmp_path)
    run.status("running", step=7, note="longer than what comes")
    monkeypatch.setattr(run_dir, "write_json", full)
    run.status("finished", step=9)
    found = json.loads((tmp_path / "status.json").read_text())
    assert (found["status"], found["step"]) == ("finished", 9) and "note" not in found
    assert caplog.records == []


@pytest.mark.fault(4)
def test_status_that_cannot_be_written_is_one_warning(tmp_path, caplog, monkeypatch):
    run = RunDir(tmp_path)
    monkeypatch.setattr(run_dir, "write_json", full)
    for step in range(3):
        run.status("running", step=step)
    assert [record.getMessage() for record in caplog.records] == [
        "status.json cannot be written, status is running: OSError: [Errno 28] No space left on device"
    ]


@pytest.mark.fault(17)
@pytest.mark.parametrize("content", ["", '{"status": "runn', "[1]", "\udcff"])
def test_a_broken_status_counts_as_missing_with_a_warning(tmp_path, caplog, content):
    (tmp_path / "status.json").write_bytes(content.encode(errors="surrogateescape"))
    assert RunDir(tmp_path).read_status() == {}
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{tmp_path / 'status.json'} cannot be read and counts as missing: ")


@pytest.mark.fault(17)
def test_running_without_a_process_is_interrupted(tmp_path):
    run = RunDir(tmp_path)
    with run.lock():
        run.status("running", step=7)
        assert run.read_status()["status"] == "running"
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    found = run.read_status()
    assert (found["status"], found["step"]) == ("interrupted", 7)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.fault(4)
def test_a_log_that_cannot_be_written_is_one_warning(tmp_path, capsys, monkeypatch):
    logger = logging.getLogger("somebody")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with RunDir(tmp_path).log_file():
        logger.info("before")
        (handler,) = [one for one in logging.getLogger().handlers if isinstance(one, logging.FileHandler)]
        handler.stream.close()
        handler.stream = open("/dev/full", "w")  # noqa: SIM115
        for step in range(3):
            logger.info("step %d", step)
        logger.warning("shown all the same")
    assert capsys.readouterr().err.splitlines() == [
        "train.log is off for this run: OSError: [Errno 28] No space left on device",
        "shown all the same",
    ]
    assert (tmp_path / "train.log").read_text().endswith("INFO somebody: before\n")


def test_metrics_are_on_disk_line_by_line(tmp_path):
    run = RunDir(tmp_path)
    for step in range(3):
        run.log_metrics({"step": step, "train/loss": float("inf") if step == 2 else step / 2})
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(step + 1))
    assert lines[-1]["train/loss"] == "inf"
    run.close()


def test_metrics_are_cut_back_to_a_checkpoint_and_appended_to(tmp_path, caplog):
    """The checkpoint of step 2 comes before the evaluation of step 2; a killed process has left half a line."""
    run = RunDir(tmp_path)
    run.log_metrics({"step": 1, "train/loss": 3.0})
    run.log_metrics({"step": 1, "valid/loss": 3.0})
    run.log_metrics({"step": 2, "train/loss": 2.0})
    kept = (tmp_path / "metrics.jsonl").read_text()
    run.log_metrics({"step": 2, "valid/loss": 2.0})
    run.log_metrics({"step": 2, "test/bpc": 2.0})
    run.log_metrics({"step": 3, "train/loss": 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "train/lo')
    run.truncate_metrics(2)
    assert (tmp_path / "metrics.jsonl").read_text() == kept
    run.log_metrics({"step": 3})
    run.close()
    assert (tmp_path / "metrics.jsonl").read_text() == kept + '{"step": 3}\n'
    assert caplog.records == [] and [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.fault(4)
def test_lines_that_cannot_be_read_are_dropped_with_one_warning(tmp_path, caplog):
    good = b'{"step": 1}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + b'{"step": 2, "tr{"step": 3}\n\xff\x00\n[]\n{"step": "x"}\n' + good)
    RunDir(tmp_path).truncate_metrics(5)
    assert (tmp_path / "metrics.jsonl").read_bytes() == good * 2
    (record,) = caplog.records
    assert record.getMessage() == f"{tmp_path / 'metrics.jsonl'}: 4 line(s) were no JSON with a step and are dropped"


@pytest.mark.fault(4)
def test_a_cut_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    run = RunDir(tmp_path)
    run.log_metrics({"step": 1})
    run.log_metrics({"step": 2})
    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        run.truncate_metrics(1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.fault(4)
def test_a_line_that_the_disk_takes_half_of_leaves_nothing(tmp_path):
    class Nearly(io.FileIO):
        """A file whose disk has room for eleven more bytes."""

        room = 11

        def write(self, data):
            if not self.room:
                full()
            taken = super().write(data[: self.room])
            self.room -= taken
            return taken

    run = RunDir(tmp_path)
    run.log_metrics({"step": 1})
    run.close()
    run._metrics = Nearly(tmp_path / "metrics.jsonl", "a")
    with pytest.raises(OSError, match="No space left"):
        run.log_metrics({"step": 2, "train/loss": 1.0})
    run.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_truncation_of_nothing_makes_no_file(tmp_path):
    RunDir(tmp_path).truncate_metrics(0)
    assert list(tmp_path.iterdir()) == []


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
