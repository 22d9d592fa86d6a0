"""python -m training.verify: a line for each checkpoint, exit codes, nothing unpickled."""

import json
import pickle

import pytest
from safetensors.torch import load_file, save_file

from tests.checkpoints import Payload, flip, make, reseal, save, train
from tests.helpers import run_python
from training import verify


def test_sound_checkpoints_of_a_run_are_listed_newest_first(tmp_path, capsys):
    model, optimizer = make()
    train(model, optimizer, range(1))
    paths = [save(tmp_path, step, model, optimizer) for step in (10, 9)]
    size = sum(file.stat().st_size for file in paths[0].iterdir() if file.name != "manifest.json")
    for given in (tmp_path, tmp_path / "checkpoints"):
        assert verify.main([str(given)]) == 0
        lines = capsys.readouterr().out.splitlines()
        # 8 of the model, whose tied head is stored once; 3 of the optimizer for each of 7 parameters; the generator
        assert lines[0] == f"sound    {paths[0]}: step 10, {size:,} bytes, 30 tensors, all values finite"
        assert lines[1].startswith(f"sound    {paths[1]}: step 9, ") and len(lines) == 2


@pytest.mark.fault(6)
def test_a_damaged_one_is_told_and_the_others_are_checked_all_the_same(tmp_path, capsys):
    paths = [save(tmp_path, step) for step in (1, 2)]
    flip(paths[1] / "model.safetensors", 500)
    assert verify.main([str(tmp_path)]) == 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"DAMAGED  {paths[1]}: {paths[1]}/model.safetensors is damaged: sha256 ")
    assert lines[1].startswith(f"sound    {paths[0]}: step 1, ")
    assert verify.main([str(paths[0])]) == 0


def test_values_that_are_not_finite_are_damage(tmp_path, capsys):
    path = save(tmp_path, 3)
    tensors = load_file(path / "model.safetensors")
    tensors["norm.bias"][:2] = float("nan")
    save_file(tensors, path / "model.safetensors")
    reseal(path)
    assert verify.main([str(path), "--json"]) == 4
    [found] = json.loads(capsys.readouterr().out)
    assert found["problem"] == f"{path}/model.safetensors: norm.bias holds 2 values that are not finite"
    assert (found["path"], found["step"], found["num_nonfinite"], found["num_tensors"]) == (str(path), 3, 2, 9)


def test_an_unreadable_header_is_damage(tmp_path, capsys):
    path = save(tmp_path, 3)
    (path / "rng.safetensors").write_bytes(b"\xff" * 64)
    reseal(path)
    assert verify.main([str(path)]) == 4
    assert "rng.safetensors cannot be read as safetensors" in capsys.readouterr().out


def test_nothing_to_check_is_an_error(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    assert verify.main([str(tmp_path)]) == 4
    assert (
        capsys.readouterr().err
        == f"error: no checkpoints in {tmp_path}/checkpoints; expected folders such as step-1000\n"
    )


def test_what_is_no_checkpoint_is_not_called_damaged(tmp_path, capsys):
    (tmp_path / "default" / "2026-01-01_000000_abcdef").mkdir(parents=True)
    for name, said in {
        "absent": "there is no checkpoint or run folder {}: expected a checkpoint such as ",
        "default": "{} is neither a checkpoint nor the folder of a run with checkpoints: expected ",
    }.items():
        assert verify.main([str(tmp_path / name)]) == 4
        told = capsys.readouterr()
        assert told.err.startswith(f"error: {said.format(tmp_path / name)}") and told.out == ""


@pytest.mark.parametrize("left", [["state.json"], []])
def test_a_checkpoint_that_lost_its_files_is_damaged(tmp_path, capsys, left):
    """Told by what it still holds, or by its name alone."""
    folder = tmp_path / ("copy" if left else "step-3")
    folder.mkdir()
    for name in left:
        (folder / name).write_text("{}")
    assert verify.main([str(folder)]) == 4
    assert capsys.readouterr().out.startswith(f"DAMAGED  {folder}: {folder} is not a complete checkpoint: it has no ")


@pytest.mark.fault(8)
def test_a_pickle_is_refused_unread_at_the_terminal(tmp_path):
    marker = tmp_path / "executed"
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Payload(marker)))
    done = run_python("-m", "training.verify", tmp_path / "model.pt")
    assert done.returncode == 4 and "Traceback" not in done.stdout + done.stderr
    assert "model.pt is a single file, and reading it could run code from it" in done.stdout
    assert not marker.exists()


@pytest.mark.parametrize("arguments", [[], ["one", "two"], ["--jsn", "one"]])
def test_wrong_usage_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        verify.main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m training.verify" in capsys.readouterr().err
