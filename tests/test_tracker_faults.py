"""Real services and real full disks under the tracker: one warning a sink, and the run goes on."""

import http.server
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from tests.helpers import ROOT

WANDB = {"project": "p", "entity": None, "group": None, "tags": [], "init_timeout": 2}

# logs five steps, with what a test does to it after the first, and says how long the start took
SESSION = """
import json, logging, os, signal, sys, time
from pathlib import Path
from training.run_dir import RunDir
from training.tracking import Tracker

def kill_service():
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == os.getpid():
            os.kill(int(process.name), signal.SIGKILL)
    time.sleep(0.3)

def fill_disk():
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass

folder, options, fault = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
run, log = RunDir(folder), logging.getLogger("run")
with run.lock(), run.log_file():
    run.status("running", step=0)
    import torch.utils.tensorboard, wandb  # what they cost is not waiting for a server
    started = time.monotonic()
    tracker = Tracker(folder, wandb=options, tensorboard=True, config={}, name="n")
    print(time.monotonic() - started)
    for step in range(1, 300 if fault == "fill_disk" else 6):
        tracker.log({f"train/{name}": 1.0 for name in range(20)}, step)
        log.info("step %d", step)
        if step == 1 and fault:
            globals()[fault]()
    run.status("running", step=step)
    tracker.finish()
    run.status("finished", step=step)
"""


def session(folder, *, mode="offline", fault="", prefix=(), **env):
    """(warnings on stderr, seconds the start took) of a session that must end well; its run folder is `folder`."""
    ended = subprocess.run(
        [*prefix, sys.executable, "-c", SESSION, str(folder), json.dumps({**WANDB, "mode": mode}), fault],
        cwd=ROOT,
        env={**os.environ, "HOME": str(folder.parent), **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stderr.splitlines(), float(ended.stdout)


def steps(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def server_that_refuses():
    """A server that knows no key; its address."""

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_error(401, "invalid key")

        def log_message(self, *_): ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.fault(18)
@pytest.mark.slow
@pytest.mark.parametrize("key", ["a" * 40, "short", ""], ids=["closed port", "malformed key", "no key"])
def test_a_server_out_of_reach_means_offline_with_one_warning(tmp_path, key):
    warnings, seconds = session(tmp_path / "run", mode="online", WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY=key)
    assert len(warnings) == 1 and warnings[0].startswith("Weights & Biases goes on offline: ")
    reason = {"a" * 40: "connection refused", "short": "API key must have 40+ characters", "": "No API key configured"}
    assert reason[key] in warnings[0]
    assert seconds < 15
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5]
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.fault(18)
def test_a_key_that_the_server_refuses_means_offline_with_one_warning(tmp_path):
    with server_that_refuses() as address:
        warnings, _ = session(tmp_path / "run", mode="online", WANDB_BASE_URL=address, WANDB_API_KEY="a" * 40)
    assert len(warnings) == 1 and "goes on offline: CommError: " in warnings[0] and "401" in warnings[0]
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5]


@pytest.mark.fault(18)
def test_a_service_that_dies_is_one_warning(tmp_path):
    warnings, _ = session(tmp_path / "run", fault="kill_service")
    assert warnings == ["Weights & Biases is off for this run: ConnectionResetError: Connection lost"]
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5]


@pytest.mark.fault(4)
def test_a_disk_that_fills_under_the_logs_is_one_warning_a_sink(tmp_path):
    """On a file system of one megabyte that lasts as long as the process."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=1m disk '{disk}'"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this system grants no file system of one's own")
    script = f"{mount} && \"$@\"; code=$?; cp '{disk}'/run/*.json* '{tmp_path}'; exit $code"
    warnings, _ = session(disk / "run", fault="fill_disk", prefix=("unshare", "-rm", "sh", "-c", script, "sh"))
    sinks = ("TensorBoard", "Weights & Biases", "metrics.jsonl", "train.log")
    full = "is off for this run: OSError: [Errno 28] No space left on device"
    assert sorted(warnings) == [f"{sink} {full}" for sink in sinks]
    assert steps(tmp_path)[0] == 1
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "finished"
