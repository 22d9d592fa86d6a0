"""Writing checkpoints: a copy taken at once, written aside; room on the disk; which ones stay."""

import errno
import json
import logging
import os
import random
import subprocess
import threading

import pytest
import torch

from tests.checkpoints import make, save, train
from tests.helpers import run_python
from training import checkpoint_writer
from training.checkpoint import load_checkpoint, mark_best
from training.checkpoint_writer import CheckpointWriter
from training.errors import NumericsError, ResourceError


def names(run_dir) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.fixture
def held(monkeypatch):
    """An event that every write waits for, so that a test acts while one is under way."""
    release, write_files = threading.Event(), checkpoint_writer._write_files

    def wait_and_write(folder, snapshot):
        assert release.wait(20)
        write_files(folder, snapshot)

    monkeypatch.setattr(checkpoint_writer, "_write_files", wait_and_write)
    yield release
    release.set()


def test_what_is_written_is_what_was_there_at_save(tmp_path, held):
    model, optimizer = make()
    train(model, optimizer, range(2))
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    moments = {key: value.clone() for key, value in optimizer.state_dict()["tensors"].items()}
    state = {"step": 2, "nested": {"seen": [1, 2]}}
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.save(2, model=model, optimizer=optimizer, state=state)
    generators = torch.get_rng_state(), random.getstate()
    assert writer.last_step is None
    train(model, optimizer, range(2, 4))  # in place, while the write waits
    state["nested"]["seen"].append(3)
    random.random()
    held.set()
    writer.close()
    assert writer.last_step == 2

    other, other_optimizer = make(seed=1)
    path = tmp_path / "checkpoints" / "step-2"
    assert load_checkpoint(path, model=other, optimizer=other_optimizer) == {"step": 2, "nested": {"seen": [1, 2]}}
    assert torch.equal(torch.get_rng_state(), generators[0]) and random.getstate() == generators[1]
    for found, expected in ((other.state_dict(), weights), (other_optimizer.state_dict()["tensors"], moments)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_a_save_waits_for_the_one_before(tmp_path, held):
    model, _ = make()
    with torch.no_grad():
        model.out.bias.fill_(1)
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.save(1, model=model, optimizer=None, state={})
    with torch.no_grad():
        model.out.bias.fill_(2)
    threading.Timer(0.2, held.set).start()
    writer.save(2, model=model, optimizer=None, state={})  # the copy of step 1 must not be overwritten
    writer.close()
    for step in (1, 2):
        load_checkpoint(tmp_path / "checkpoints" / f"step-{step}", model=model)
        assert torch.equal(model.out.bias, torch.full((8,), float(step)))


def test_memory_is_used_again_and_follows_the_model(tmp_path):
    writer = CheckpointWriter(tmp_path, keep=2)
    model, optimizer = make()
    addresses = []
    for step in range(2):
        writer.save(step, model=model, optimizer=optimizer, state={})
        writer.wait()
        addresses.append({name: tensor.data_ptr() for name, tensor in writer._buffers["model.safetensors"].items()})
    assert addresses[0] == addresses[1]
    model, _ = make(dim=4)
    writer.save(2, model=model, optimizer=None, state={})
    writer.close()
    assert not (tmp_path / "checkpoints" / "step-2" / "optimizer.safetensors").exists()
    load_checkpoint(tmp_path / "checkpoints" / "step-2", model=make(dim=4)[0])


def test_an_error_of_the_thread_comes_up_once_at_the_next_call(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EACCES, "Permission denied")

    writer = CheckpointWriter(tmp_path, keep=2)
    model, optimizer = make()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        writer.save(1, model=model, optimizer=optimizer, state={})
        with pytest.raises(ResourceError, match=r"step-1 could not be written: Permission denied\. .* writable or"):
            writer.wait()
    writer.save(2, model=model, optimizer=optimizer, state={})
    writer.close()
    writer.close()
    assert names(tmp_path) == ["latest", "step-2"]


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("where", ["model", "optimizer"])
def test_values_that_are_not_finite_never_get_a_name(tmp_path, asynchronous, where):
    model, optimizer = make()
    train(model, optimizer, range(1))
    writer = CheckpointWriter(tmp_path, keep=2, asynchronous=asynchronous)
    writer.save(1, model=model, optimizer=optimizer, state={})
    key = "out.weight" if where == "model" else "adamw/out.weight/exp_avg"
    tensors = model.state_dict() if where == "model" else optimizer.state_dict()["tensors"]
    tensors[key][0, 0] = float("nan")
    with pytest.raises(NumericsError, match=rf"step 2 was not written: {key} \({where}.safetensors\) holds 1 values"):
        writer.save(2, model=model, optimizer=optimizer, state={})
    writer.close()
    assert names(tmp_path) == ["latest", "step-1"]
    load_checkpoint(tmp_path / "checkpoints" / "step-1", model=model)


@pytest.mark.fault(38)
@pytest.mark.parametrize(("umask", "mode"), [(0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_files_obey_the_umask(tmp_path, umask, mode):
    former = os.umask(umask)
    try:
        path = save(tmp_path, 1)
    finally:
        os.umask(former)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == {
        file.name: oct(mode) for file in path.iterdir()
    }


def test_rotation_keeps_the_newest_and_the_link_follows(tmp_path):
    for step in (5, 10, 100):
        save(tmp_path, step)
    assert names(tmp_path) == ["latest", "step-10", "step-100"]
    assert os.readlink(tmp_path / "checkpoints" / "latest") == "step-100"


def test_rotation_never_removes_what_was_just_written(tmp_path):
    save(tmp_path, 20)
    save(tmp_path, 30)
    assert save(tmp_path, 10).is_dir()


def test_rotation_keeps_the_best(tmp_path):
    model, optimizer = make()
    writer = CheckpointWriter(tmp_path, keep=2)
    for step, valid_loss in ((10, 2.0), (20, 1.5), (30, 1.7), (40, float("nan")), (50, 1.6)):
        writer.save(step, model=model, optimizer=optimizer, state={})
        writer.wait()
        assert mark_best(tmp_path, step, valid_loss) == (step <= 20)
    assert names(tmp_path) == ["best.json", "latest", "step-20", "step-40", "step-50"]
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text()) == {"step": 20, "valid/loss": 1.5}
    assert mark_best(tmp_path, 50, 1.4)
    writer.save(60, model=model, optimizer=optimizer, state={})
    writer.close()
    assert names(tmp_path) == ["best.json", "latest", "step-50", "step-60"]


def test_rotation_counts_no_folder_that_is_not_complete(tmp_path):
    sound = save(tmp_path, 10)
    os.truncate(save(tmp_path, 30) / "model.safetensors", 10)
    (save(tmp_path, 40) / "manifest.json").unlink()
    save(tmp_path, 20)
    assert sound.is_dir()
    assert names(tmp_path) == ["latest", "step-10", "step-20", "step-30", "step-40"]


@pytest.mark.parametrize(
    ("options", "match"),
    [({"keep": 1}, "keep must be at least 2, .* got 1"), ({"keep": 2, "max_failures": 0}, "at least 1, got 0")],
)
def test_settings_out_of_range_are_refused(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        CheckpointWriter(tmp_path, **options)


def test_the_same_step_can_be_saved_again(tmp_path):
    save(tmp_path, 1, note="old")
    path = save(tmp_path, 1, note="new")
    assert load_checkpoint(path, model=make()[0]) == {"note": "new"}
    assert names(tmp_path) == ["latest", "step-1"]


@pytest.mark.fault(3)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("call", ["fsync", "chmod", "rename"])
def test_a_disk_without_room_costs_one_checkpoint(tmp_path, monkeypatch, caplog, call, number):
    former = save(tmp_path, 1)
    model, optimizer = make()

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    writer = CheckpointWriter(tmp_path, keep=2, max_failures=2)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(os, call, fail)
        writer.save(2, model=model, optimizer=optimizer, state={})
        writer.wait()
    assert writer.last_step is None
    assert [record.getMessage() for record in caplog.records] != []
    message = caplog.records[-1].getMessage()
    assert f"step-2 could not be written: {os.strerror(number)}. It needs " in message
    assert f" are free in {former.parent}; earlier checkpoints are untouched. Free" in message
    assert "training goes on and the next save tries again (failure 1 of at most 2 in a row" in message
    assert names(tmp_path) == ["latest", "step-1"]
    load_checkpoint(former, model=make()[0])
    writer.save(3, model=model, optimizer=optimizer, state={})
    writer.close()
    assert names(tmp_path) == ["latest", "step-1", "step-3"] and writer.last_step == 3


def test_a_failure_while_replacing_brings_the_old_one_back(tmp_path, monkeypatch):
    path = save(tmp_path, 1, note="old")
    rename = os.rename

    def fail_second(source, target):
        if ".tmp-" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail_second)
        with pytest.raises(ResourceError, match="Input/output error"):
            save(tmp_path, 1, note="new")
    assert load_checkpoint(path, model=make()[0]) == {"note": "old"}


# saves 1 and 3 have room, 2 and 4 to 6 have none; {room} and {full} bring that about
FULL_DISK = """
import logging, sys
from pathlib import Path
import torch
from training.checkpoint import newest_sound
from training.checkpoint_writer import CheckpointWriter
{setup}
logging.basicConfig(level=logging.WARNING, format="%(message)s")
model = torch.nn.Linear(300, 300)
run_dir = Path(sys.argv[1])
writer = CheckpointWriter(run_dir, keep=2, max_failures=3)
try:
    for step in range(1, 7):
        {full} if step in (2, 4, 5, 6) else {room}
        writer.save(step, model=model, optimizer=None, state=dict())
        writer.wait()
        print(step, newest_sound(run_dir).name, sorted(path.name for path in newest_sound(run_dir).parent.iterdir()))
except Exception as error:
    print(type(error).__name__, type(error).exit_code, error)
    print(sorted(path.name for path in newest_sound(run_dir).parent.iterdir()))
"""


def check_full_disk(done: subprocess.CompletedProcess, reason: str, run_dir) -> None:
    assert done.returncode == 0, done.stderr
    kept = "['latest', 'step-1', 'step-3']"
    lines = done.stdout.splitlines()
    assert lines[:5] == [
        "1 step-1 ['latest', 'step-1']",
        "2 step-1 ['latest', 'step-1']",
        f"3 step-3 {kept}",
        f"4 step-3 {kept}",
        f"5 step-3 {kept}",
    ]
    last = f"ResourceError 6 the checkpoint {run_dir}/checkpoints/step-6 could not be written: {reason}. It needs 3"
    assert lines[5].startswith(last), lines[5]
    assert "failure 3 of at most 3 in a row (train.max_failed_saves)" in lines[5]
    assert lines[6] == kept
    warnings = done.stderr.splitlines()
    assert [line.partition(":")[0].rsplit("/", 1)[1] for line in warnings] == [
        f"step-{step} could not be written" for step in (2, 4, 5)
    ]
    assert all(f"{reason}. It needs 3" in line and " are free in " in line for line in warnings)


@pytest.mark.fault(3)
def test_a_limit_on_file_sizes_is_survived(tmp_path):
    code = FULL_DISK.format(
        setup="import resource\nlimit = lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))",
        full="limit(100_000)",
        room="limit(-1)",
    )
    check_full_disk(run_python("-c", code, tmp_path), "File too large", tmp_path)


@pytest.mark.fault(3)
def test_a_small_file_system_that_fills_is_survived(tmp_path):
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"no file system can be mounted: {mount.stderr.strip()}")
    try:
        code = FULL_DISK.format(
            setup="filler = Path(sys.argv[1], 'filler')",
            # all but 200 kB; a file system counts blocks
            full="filler.write_bytes(bytes(2**21 - 200_000 - 400_000 * (1 + (step > 3))))",
            room="filler.unlink(missing_ok=True)",
        )
        check_full_disk(run_python("-c", code, tmp_path), "No space left on device", tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.gpu
def test_tensors_of_a_gpu_are_copied_before_the_next_step(tmp_path, held):
    model = make()[0].cuda()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    writer = CheckpointWriter(tmp_path, keep=2)
    writer.save(1, model=model, optimizer=None, state={})
    assert all(buffer.is_pinned() for buffer in writer._buffers["model.safetensors"].values())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    held.set()
    writer.close()
    load_checkpoint(tmp_path / "checkpoints" / "step-1", model=model)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
