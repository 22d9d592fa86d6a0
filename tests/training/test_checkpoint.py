"""Checkpoints: exact resume, which ones count, the fallback from a damaged one."""

import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import flip, make, save, train
from training.checkpoint import complete_checkpoints, load_checkpoint, mark_best, newest_sound, sweep_stale
from training.errors import CheckpointError


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_six_steps_equal_three_and_three(tmp_path, name):
    model, optimizer = make(name)
    torch.manual_seed(5)
    whole = train(model, optimizer, range(6))

    first, first_optimizer = make(name)
    torch.manual_seed(5)
    halves = train(first, first_optimizer, range(3))
    path = save(tmp_path, 3, first, first_optimizer, tokens=72)
    second, second_optimizer = make(name, seed=1)
    torch.manual_seed(99)
    state = load_checkpoint(path, model=second, optimizer=second_optimizer)
    halves += train(second, second_optimizer, range(3, 6))

    assert state == {"tokens": 72}
    assert whole == halves
    for key, value in model.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    expected, found = (each.state_dict()["tensors"] for each in (optimizer, second_optimizer))
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_python_randomness_resumes_unless_told_otherwise(tmp_path):
    path = save(tmp_path, 1)
    expected = random.random()
    load_checkpoint(path, model=make()[0])
    assert random.random() == expected
    load_checkpoint(path, model=make()[0], restore_rng=False)
    assert random.random() != expected


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    path = save(tmp_path, 1)
    assert "head.weight" not in load_file(path / "model.safetensors")
    model, _ = make(seed=1)
    load_checkpoint(path, model=model)
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, make()[0].head.weight)


def test_the_folder_holds_what_the_manifest_says_and_no_pickle(tmp_path):
    path = save(tmp_path, 12)
    assert path == tmp_path / "checkpoints" / "step-12"
    manifest = json.loads((path / "manifest.json").read_text())
    names = {"model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"}
    assert manifest["step"] == 12
    assert manifest["files"].keys() == names
    assert {file.name for file in path.iterdir()} == names | {"manifest.json"}


def test_non_finite_state_is_strict_json(tmp_path):
    path = save(tmp_path, 1, best=float("inf"))
    json.loads((path / "state.json").read_text(), parse_constant=pytest.fail)
    assert float(load_checkpoint(path, model=make()[0])["best"]) == float("inf")


def test_latest_passes_over_unfinished_and_cut_folders(tmp_path):
    assert complete_checkpoints(tmp_path) == []
    good = save(tmp_path, 1)
    folder = good.parent
    shutil.copytree(good, folder / "step-9.tmp-abc")
    shutil.copytree(good, folder / "step-2")
    (folder / "step-2" / "manifest.json").unlink()
    shutil.copytree(good, folder / "step-3")
    os.truncate(folder / "step-3" / "model.safetensors", 10)
    assert complete_checkpoints(tmp_path) == [(1, good)]


def cut_ten_bytes(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 10)


def cut_half(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        pytest.param(cut_ten_bytes, r"has [\d,]+ bytes, expected [\d,]+ bytes", marks=pytest.mark.fault(5)),
        pytest.param(cut_half, r"has [\d,]+ bytes, expected [\d,]+ bytes", marks=pytest.mark.fault(5)),
        pytest.param(flip, "is damaged: sha256 [0-9a-f]{64}, expected [0-9a-f]{64}", marks=pytest.mark.fault(6)),
        pytest.param(Path.unlink, r"is missing, expected [\d,]+ bytes", marks=pytest.mark.fault(5)),
    ],
)
@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_the_one_before_a_damaged_checkpoint_is_used_and_that_is_told(tmp_path, caplog, damage, told, name):
    model, optimizer = make()
    train(model, optimizer, range(1))
    good, broken = (save(tmp_path, step, model, optimizer) for step in (10, 20))
    damage(broken / f"{name}.safetensors")
    assert newest_sound(tmp_path) == good
    assert len(caplog.messages) == 1
    pattern = rf"step-20/{name}.safetensors {told}. step-10 is used instead; the damaged one stays as \S+step-20 until"
    assert re.search(pattern, caplog.messages[0])
    assert newest_sound(tmp_path, set_aside=True) == good
    names = sorted(path.name for path in good.parent.iterdir())
    assert names[:2] == ["latest", "step-10"] and names[2].startswith("step-20.damaged-") and len(names) == 3
    assert names[2] in caplog.messages[1]
    assert os.readlink(good.parent / "latest") == "step-10"
    assert sweep_stale(tmp_path) == []
    assert newest_sound(tmp_path) == good and len(caplog.messages) == 2


def test_newest_sound_of_nothing_is_none(tmp_path):
    assert newest_sound(tmp_path) is None


@pytest.mark.fault(6)
def test_no_sound_checkpoint_at_all_is_an_error_that_changes_nothing(tmp_path):
    for step in (1, 2):
        flip(save(tmp_path, step) / "state.json")
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in .* is sound: .*step-2.*; .*step-1"):
        newest_sound(tmp_path, set_aside=True)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"latest", "step-1", "step-2"}


@pytest.mark.fault(2)
def test_the_newest_is_found_without_the_link(tmp_path):
    newest = [save(tmp_path, step) for step in (1, 2)][-1]
    (newest.parent / "latest").unlink()
    assert newest_sound(tmp_path) == newest
    (newest.parent / "latest").symlink_to("step-1")
    assert newest_sound(tmp_path) == newest


def test_the_best_is_the_lowest_whose_checkpoint_is_there(tmp_path):
    folder = save(tmp_path, 1).parent
    save(tmp_path, 2)
    assert mark_best(tmp_path, 1, 1.5)
    assert json.loads((folder / "best.json").read_text()) == {"step": 1, "valid/loss": 1.5}
    assert not mark_best(tmp_path, 2, 1.5)
    assert not mark_best(tmp_path, 3, 1.0), "a checkpoint that is not there"
    assert not mark_best(tmp_path, 2, float("nan"))
    shutil.rmtree(folder / "step-1")
    assert mark_best(tmp_path, 2, 1.6)
    assert json.loads((folder / "best.json").read_text())["step"] == 2
    (folder / "best.json").write_text("{")
    assert mark_best(tmp_path, 2, 1.7)


def test_sweep_removes_leftovers_and_brings_back_what_was_being_replaced(tmp_path):
    folder = save(tmp_path, 1).parent
    os.rename(folder / "step-1", folder / "step-1.old-aa")
    (folder / "step-1.tmp-bb").mkdir()
    save(tmp_path, 2)
    shutil.copytree(folder / "step-2", folder / "step-2.old-cc")
    (folder / "latest.tmp-dd").symlink_to("step-1")
    assert sweep_stale(tmp_path) == ["latest.tmp-dd", "step-1.tmp-bb", "step-2.old-cc"]
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-1", "step-2"]
    assert sweep_stale(tmp_path / "absent") == []
