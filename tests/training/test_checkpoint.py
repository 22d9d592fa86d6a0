"""Checkpoints: exact resume, nothing half written, damage told before anything is assigned."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from training import checkpoint
from training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint, sweep_stale
from training.errors import CheckpointError, ResourceError
from training.optim import build_optimizer


class Toy(nn.Module):
    """A tied embedding, a buffer and dropout, as the language model has them."""

    def __init__(self, dim: int = 8):
        super().__init__()
        self.embedding = nn.Embedding(11, dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(3 * dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(dim, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, ids):
        self.seen += ids.numel()
        x = self.embedding(ids)
        return self.head(self.norm(x + self.dropout(self.out(self.qkv(x).relu()))))


def make(name: str = "adamw", seed: int = 0, dim: int = 8):
    torch.manual_seed(seed)
    model = Toy(dim)
    return model, build_optimizer(model, name=name, lr=0.01)


def train(model, optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        ids = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        loss.backward()
        optimizer.set_lr(0.01 / (step + 1))
        optimizer.step()
        losses.append(loss.item())
    return losses


def save(run_dir: Path, step: int, model=None, optimizer=None, keep: int = 2, **state) -> Path:
    if model is None:
        model, optimizer = make()
    return save_checkpoint(run_dir, step, model=model, optimizer=optimizer, state=state, keep=keep)


def flip(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def reseal(path: Path) -> None:
    """Make the manifest true again after a file was changed on purpose."""
    manifest = json.loads((path / "manifest.json").read_text())
    for name in manifest["files"]:
        file = path / name
        manifest["files"][name] = {"size": file.stat().st_size, "sha256": checkpoint._sha256(file)}
    (path / "manifest.json").write_text(json.dumps(manifest))


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


def test_files_obey_the_umask(tmp_path):
    former = os.umask(0o027)
    try:
        path = save(tmp_path, 1)
    finally:
        os.umask(former)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == {
        file.name: "0o640" for file in path.iterdir()
    }


def test_non_finite_state_is_strict_json(tmp_path):
    path = save(tmp_path, 1, best=float("inf"))
    json.loads((path / "state.json").read_text(), parse_constant=pytest.fail)
    assert float(load_checkpoint(path, model=make()[0])["best"]) == float("inf")


def test_rotation_keeps_the_newest_and_the_link_follows(tmp_path):
    for step in (5, 10, 100):
        save(tmp_path, step)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-10", "step-100"]
    assert (folder / "latest").resolve() == latest_checkpoint(tmp_path) == folder / "step-100"


def test_rotation_never_removes_what_was_just_written(tmp_path):
    save(tmp_path, 20)
    save(tmp_path, 30)
    assert save(tmp_path, 10).is_dir()


def test_keeping_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 2, .* got 1"):
        save(tmp_path, 1, keep=1)


def test_the_same_step_can_be_saved_again(tmp_path):
    save(tmp_path, 1, note="old")
    path = save(tmp_path, 1, note="new")
    assert load_checkpoint(path, model=make()[0]) == {"note": "new"}
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["latest", "step-1"]


def test_latest_passes_over_unfinished_and_cut_folders(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    good = save(tmp_path, 1)
    folder = good.parent
    shutil.copytree(good, folder / "step-9.tmp-abc")
    shutil.copytree(good, folder / "step-2")
    (folder / "step-2" / "manifest.json").unlink()
    shutil.copytree(good, folder / "step-3")
    os.truncate(folder / "step-3" / "model.safetensors", 10)
    assert latest_checkpoint(tmp_path) == good


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


@pytest.mark.parametrize("call", ["fsync", "chmod", "rename"])
def test_a_failure_while_saving_leaves_the_former_checkpoint(tmp_path, monkeypatch, call):
    former = save(tmp_path, 1)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(
            ResourceError, match=r"step-2 could not be written: .*No space left.* Free there: [\d,]+ bytes"
        ):
            save(tmp_path, 2)
    assert sorted(path.name for path in former.parent.iterdir()) == ["latest", "step-1"]
    load_checkpoint(former, model=make()[0])


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


def refused(path: Path, match: str, dim: int = 8, with_optimizer: bool = True) -> None:
    """Loading fails with the message, and neither model nor optimizer was touched."""
    model, optimizer = make(seed=3, dim=dim)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint(path, model=model, optimizer=optimizer if with_optimizer else None)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert optimizer.state_dict()["tensors"] == {}


def test_a_flipped_bit_is_found(tmp_path):
    path = save(tmp_path, 1)
    flip(path / "model.safetensors")
    refused(path, r"model.safetensors is damaged: sha256 [0-9a-f]{64}, expected [0-9a-f]{64}")


def test_a_cut_file_is_found(tmp_path):
    path = save(tmp_path, 1)
    size = (path / "optimizer.safetensors").stat().st_size
    os.truncate(path / "optimizer.safetensors", 100)
    refused(path, rf"optimizer.safetensors has 100 bytes, expected {size:,} bytes")


def test_missing_pieces_are_named(tmp_path):
    refused(tmp_path / "step-7", "no checkpoint at .*step-7")
    path = save(tmp_path, 1)
    (path / "rng.safetensors").unlink()
    refused(path, "rng.safetensors is missing, expected")
    (path / "manifest.json").write_text("{")
    refused(path, "manifest.json cannot be read as JSON")
    (path / "manifest.json").unlink()
    refused(path, "not a complete checkpoint: it has no manifest.json")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": 9}, "format 9, this code reads 1"),
        ({"files": {}}, "does not list model.safetensors, rng.safetensors, state.json"),
    ],
)
def test_a_strange_manifest_is_refused(tmp_path, change, match):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, **change}))
    refused(path, match)


def test_a_manifest_naming_other_folders_is_refused(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../secret"] = {"size": 1, "sha256": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))
    refused(path, "'../../secret', which is not a plain file name")


def test_a_broken_header_is_refused(tmp_path):
    path = save(tmp_path, 1)
    (path / "model.safetensors").write_bytes(b"\xff" * 64)
    reseal(path)
    refused(path, "model.safetensors cannot be read as safetensors")


def test_another_width_gives_a_table(tmp_path):
    path = save(tmp_path, 1)
    refused(
        path,
        r"8 of 9 tensors differ:\n  embedding.weight: found float32 \[11, 8\], expected float32 \[11, 16\]"
        r"[\s\S]*Build the model with the configuration",
        dim=16,
    )


def test_a_renamed_tensor_comes_with_its_nearest_name(tmp_path):
    path = save(tmp_path, 1)
    tensors = load_file(path / "model.safetensors")
    tensors["norms.weight"] = tensors.pop("norm.weight")
    save_file(tensors, path / "model.safetensors", metadata={"aliases": '{"head.weight": "embedding.weight"}'})
    reseal(path)
    refused(path, r"norm.weight: found nothing, expected float32 \[8\]  \(nearest in the file: norms.weight\)")
    refused(path, r"norms.weight: found float32 \[8\], expected nothing")


def test_another_optimizer_is_refused_before_the_model_changes(tmp_path):
    model, optimizer = make("muon")
    path = save(tmp_path, 1, model, optimizer)
    refused(path, r"optimizer.safetensors: the optimizer state is of other parameters")


def test_weights_without_optimizer_can_be_evaluated_only(tmp_path):
    path = save(tmp_path, 1, make()[0], None)
    load_checkpoint(path, model=make()[0])
    refused(path, "holds no optimizer state; it can be evaluated, not trained further")
