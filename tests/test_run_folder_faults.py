"""train.py in run folders that are shared, read-only, oddly named or full, and with a clock that jumps."""

import json
import logging
import os
import shlex
import socket
import stat
import subprocess
import sys

import pytest

from tests.command import TINY, metrics_of, run_train, small_run
from tests.helpers import ROOT, run_python
from training import run_dir
from training.run_dir import RunDir


@pytest.fixture
def no_report(monkeypatch):
    """Runs end without pictures, which cost more than such a run."""
    monkeypatch.setattr("reports.run.write_report", lambda path, patterns: path / "report.html")


def status_of(folder):
    return json.loads((folder / "status.json").read_text())


def isolated(script, folder):
    """A shell script as root in name spaces of its own, network and mounts; skips the test where none are granted."""
    if subprocess.run(["unshare", "-rnm", "true"], capture_output=True).returncode:
        pytest.skip("this system grants no name spaces of one's own")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    command = ["unshare", "-rnm", "sh", "-ec", script]
    return subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True, timeout=240)


def as_shell(*arguments):
    return shlex.join(map(str, (sys.executable, ROOT / "train.py", *arguments)))


@pytest.mark.fault(17)
def test_a_folder_in_use_is_refused_with_its_holder(tmp_path):
    arguments = small_run(tmp_path)
    with RunDir(tmp_path / "run").lock():
        ended = run_train(*arguments, f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert ended.code == 2
    holder = f"in use by process {os.getpid()} on host {socket.gethostname()}. Wait for it, or, if"
    assert ended.err.startswith("error: the run folder ") and holder in ended.err and "Traceback" not in ended.err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]


@pytest.mark.fault(4)
def test_logs_that_find_no_room_do_not_stop_a_run(tmp_path, monkeypatch, no_report):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunDir, "log_metrics", full)
    monkeypatch.setattr(run_dir._LogFile, "flush", full)
    monkeypatch.setattr(run_dir, "write_json", lambda path, value: None if path.name != "status.json" else full())
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    ended = run_train(*small_run(tmp_path), f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert ended.code == 0, ended.err
    reason = "OSError: [Errno 28] No space left on device"
    assert sorted(ended.err.splitlines()) == [
        f"metrics.jsonl is off for this run: {reason}",
        f"status.json cannot be written, status is running: {reason}",
        f"train.log is off for this run: {reason}",
    ]
    assert (tmp_path / "run" / "checkpoints" / "step-3").is_dir()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(how it ended, run folder) of a run with all its trackers and the report, its umask 027, without any network."""
    folder = tmp_path_factory.mktemp("alone")
    return isolated(f"umask 027; {as_shell('size=debug', *TINY, 'run_dir=run')}", folder), folder / "run"


@pytest.mark.fault(19)
@pytest.mark.slow
def test_the_default_run_needs_no_network(alone):
    """Not even the loop-back interface."""
    ended, folder = alone
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "wandb" not in ended.stdout.lower() and "Weights" not in ended.stdout
    assert status_of(folder)["status"] == "finished"
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.fault(38)
@pytest.mark.slow
def test_every_file_obeys_the_umask(alone):
    _, folder = alone
    staged = folder / "wandb" / "data"  # what W&B has set aside for sending, and keeps from being changed
    paths = [path for path in (folder, *folder.rglob("*")) if not path.is_symlink() and staged not in path.parents]
    modes = {str(path): oct(stat.S_IMODE(path.stat().st_mode)) for path in paths}
    wrong = {name: mode for name, mode in modes.items() if mode != ("0o750" if os.path.isdir(name) else "0o640")}
    assert wrong == {} and any(name.endswith("model.safetensors") for name in modes)


@pytest.mark.fault(38)
def test_an_output_that_is_read_only_is_refused_in_one_line(tmp_path):
    """A read-only file system: unlike a mode it also holds for the super-user, whom tests may run as."""
    (tmp_path / "disk").mkdir()
    mount = f"mount -t tmpfs disk {tmp_path}/disk; mkdir {tmp_path}/disk/old; mount -o remount,ro {tmp_path}/disk; "
    arguments = small_run(tmp_path)
    for name, said in (("new", "cannot be made"), ("old", "cannot be written")):
        ended = isolated(mount + as_shell(*arguments, f"run_dir={tmp_path}/disk/{name}"), tmp_path)
        assert ended.returncode == 2
        assert ended.stderr.startswith(f"error: the run folder {tmp_path}/disk/{name} {said}: ")
        assert "Read-only file system" in ended.stderr and ended.stderr.endswith("Choose another run_dir.\n")
        assert len(ended.stderr.splitlines()) == 1


@pytest.mark.fault(38)
def test_a_file_where_the_folder_should_be_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    ended = run_train(*small_run(tmp_path), f"run_dir={tmp_path / 'run'}", cwd=tmp_path)
    assert ended.code == 2 and "Traceback" not in ended.err
    assert ended.err.startswith(f"error: the run folder {tmp_path / 'run'} cannot be made: ")


@pytest.mark.fault(38)
@pytest.mark.parametrize("name", ["mit Leerzeichen", "zażółć-長い文書-é", "linked"])
def test_odd_names_and_links_are_run_folders_like_others(tmp_path, name, no_report):
    if name == "linked":
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / name).symlink_to("elsewhere")
    arguments = (*small_run(tmp_path), "tracker.tensorboard=true", f"run_dir={tmp_path / name}")
    ended = run_train(*arguments, cwd=tmp_path)
    assert ended.code == 0 and ended.err == "", ended.err
    assert status_of(tmp_path / name)["status"] == "finished"
    again = run_train(*arguments, cwd=tmp_path)
    assert again.code == 0 and again.out.startswith(f"finished already: {tmp_path / name} ")
    assert (tmp_path / name).is_symlink() == (name == "linked")


@pytest.mark.fault(39)
def test_durations_do_not_follow_a_clock_that_jumps_back(tmp_path):
    """A day back at every look at the clock of the day."""
    code = (
        "import itertools, sys, time\n"
        "day = itertools.count(1.8e9, -86400)\n"
        "time.time = lambda: next(day)\n"
        "import train\n"
        "from configs.cli import entry\n"
        "entry('train', train.main)"
    )
    arguments = (*small_run(tmp_path), "train.eval_every=1", "train.log_every=1", f"run_dir={tmp_path / 'run'}")
    ended = run_python("-c", code, *arguments)
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = metrics_of(tmp_path / "run", timed=True)
    seconds = [line["time/train_s"] for line in lines if "time/train_s" in line]
    assert len(seconds) == 3 and 0 < seconds[0] <= seconds[1] <= seconds[2] < 200
    assert all(line.get("perf/tokens_per_s", 1) > 0 and 0 < line.get("time/eval_s", 1) < 200 for line in lines)
