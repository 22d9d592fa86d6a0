"""The lock of a run folder: one process holds it, and what a dead one left behind is taken over."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from tests.helpers import ROOT
from training import run_lock
from training.errors import RunDirError
from training.run_dir import RunDir
from training.run_lock import holder_of

pytestmark = pytest.mark.fault(17)

# says "held" or what refused it, and holds until it is killed or told to end
HOLD = """
import sys
import time
from training import run_lock
from training.errors import RunDirError
from training.run_dir import RunDir
living = run_lock._living
run_lock._living = lambda holder: (time.sleep(0.05), living(holder))[1]  # room for others to come between
sys.stdin.readline()
try:
    with RunDir(sys.argv[1]).lock():
        print("held", flush=True)
        sys.stdin.readline()
except RunDirError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


def start(folder, name="run"):
    """A process that tries to hold the folder when it gets a line, and lets go at a second one."""
    command = [sys.executable, "-c", HOLD, str(folder / name)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def say(process):
    process.stdin.write("go\n")
    process.stdin.flush()


def test_a_second_holder_is_refused_until_the_first_lets_go(tmp_path):
    host = re.escape(run_lock.socket.gethostname())
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
    with start(tmp_path) as process:
        say(process)
        assert process.stdout.readline() == "held\n"
        assert holder_of(tmp_path / "run")["pid"] == process.pid
        with (
            pytest.raises(RunDirError, match=f"in use by process {process.pid} on host"),
            RunDir(tmp_path / "run").lock(),
        ):
            pass
        process.send_signal(signal.SIGKILL)
    assert json.loads((tmp_path / "run" / "run.lock").read_text())["pid"] == process.pid
    assert holder_of(tmp_path / "run") is None
    with RunDir(tmp_path / "run").lock():
        assert holder_of(tmp_path / "run")["pid"] == os.getpid()


@pytest.mark.parametrize("leftover", ["", '{"pid": 4194309, "host": "HOST", "started": "another boot:1"}'])
def test_of_eight_starts_at_once_one_holds_the_folder(tmp_path, leftover):
    """Also where all of them find the lock of a run that was killed; one of them comes through a link."""
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "run" / "run.lock").write_text(leftover.replace("HOST", run_lock.socket.gethostname()))
    processes = [start(tmp_path, "link" if number == 0 else "run") for number in range(8)]
    for process in processes:
        say(process)
    said = [process.stdout.readline().strip() for process in processes]
    (winner,) = [process for process, line in zip(processes, said, strict=True) if line == "held"]
    refusals = [line for line in said if line != "held"]
    host = re.escape(run_lock.socket.gethostname())
    assert all(re.search(rf"is in use by process {winner.pid} on host {host}\. Wait for it", line) for line in refusals)
    for process in processes:
        process.communicate()
    assert sorted(process.returncode for process in processes) == [0] + [2] * 7


@pytest.mark.parametrize(
    ("holder", "taken_over"),
    [
        ({"pid": 1, "host": "elsewhere", "started": None}, False),
        ({"pid": os.getpid(), "started": None}, False),
        ({"pid": os.getpid(), "started": "BOOT:1"}, True),
        ({"pid": os.getpid(), "started": "another boot:1"}, True),
        ({"pid": 2**22 + 5, "started": None}, True),
        ({"pid": 2**40, "started": None}, True),
    ],
    ids=["other host", "alive", "number given anew", "after a boot", "gone", "no number"],
)
def test_who_counts_as_a_holder(tmp_path, holder, taken_over):
    boot = (run_lock._start_time(os.getpid()) or "").partition(":")[0]
    holder = {"host": run_lock.socket.gethostname(), **holder}
    holder["started"] = holder["started"] and holder["started"].replace("BOOT", boot)
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


def test_a_folder_without_locks_is_refused_with_the_reason(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_lock.fcntl, "flock", fail)
    with pytest.raises(RunDirError, match="cannot be written: .*Operation not supported. Choose another run_dir"):
        RunDir(tmp_path).lock().__enter__()


def test_a_folder_that_is_gone_at_the_end_is_no_error(tmp_path):
    with RunDir(tmp_path / "run").lock():
        (tmp_path / "run" / "run.lock").unlink()
        (tmp_path / "run").rmdir()
