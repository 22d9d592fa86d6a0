"""What does not load: damage, other models, foreign files; told before anything is assigned."""

import json
import logging
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import Payload, flip, make, reseal, save, train
from training.checkpoint import load_checkpoint
from training.errors import CheckpointError


def refused(path: Path, match: str, dim: int = 8, with_optimizer: bool = True) -> None:
    """Loading fails with the message, and neither model nor optimizer was touched."""
    model, optimizer = make(seed=3, dim=dim)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        load_checkpoint(path, model=model, optimizer=optimizer if with_optimizer else None)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert optimizer.state_dict()["tensors"] == {}


@pytest.mark.fault(6)
def test_a_flipped_bit_is_found(tmp_path):
    path = save(tmp_path, 1)
    flip(path / "model.safetensors")
    refused(path, r"model.safetensors is damaged: sha256 [0-9a-f]{64}, expected [0-9a-f]{64}")


@pytest.mark.fault(5)
def test_a_cut_file_is_found(tmp_path):
    path = save(tmp_path, 1)
    size = (path / "optimizer.safetensors").stat().st_size
    os.truncate(path / "optimizer.safetensors", 50)
    refused(path, rf"optimizer.safetensors has 50 bytes, expected {size:,} bytes\.$")
    other = save(tmp_path, 2)
    refused(path, rf"expected {size:,} bytes\. Complete ones there: {other}\.$")


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
        ({"format": 9}, "format 9, this code reads 3"),
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


@pytest.mark.fault(7)
def test_another_width_gives_a_table(tmp_path):
    path = save(tmp_path, 1)
    refused(
        path,
        r"8 of 9 tensors differ:\n  embedding.weight: found float32 \[11, 8\], expected float32 \[11, 16\]"
        r"[\s\S]*Build the model with the configuration",
        dim=16,
    )


@pytest.mark.fault(7)
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


@pytest.mark.fault(7)
def test_what_fits_can_be_loaded_and_the_rest_is_listed(tmp_path, caplog):
    path = save(tmp_path, 1)
    tensors = load_file(path / "model.safetensors")
    expected = tensors["out.weight"].clone()
    tensors["norms.weight"] = tensors.pop("norm.weight")
    tensors["qkv.bias"] = torch.zeros(3)
    save_file(tensors, path / "model.safetensors", metadata={"aliases": '{"head.weight": "embedding.weight"}'})
    reseal(path)
    model, optimizer = make("muon", seed=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        load_checkpoint(path, model=model, optimizer=optimizer, strict=False)
    assert torch.equal(model.out.weight, expected)
    assert torch.equal(model.head.weight, tensors["embedding.weight"])
    for key in ("norm.weight", "qkv.bias"):
        assert torch.equal(model.state_dict()[key], before[key])
    lines = caplog.records[-1].getMessage().splitlines()
    assert lines[0] == f"{path} was loaded in part, left out:"
    assert lines[1] == "  norm.weight: found nothing, expected float32 [8]  (nearest in the file: norms.weight)"
    assert lines[2] == "  norms.weight: found float32 [8], expected nothing"
    assert lines[3] == "  qkv.bias: found float32 [3], expected float32 [24]"
    assert lines[4].startswith("  optimizer state: ") and "of other parameters" in lines[4]
    assert len(lines) == 5


@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_values_that_are_not_finite_are_refused_before_assignment(tmp_path, name):
    model, optimizer = make()
    train(model, optimizer, range(1))
    path = save(tmp_path, 1, model, optimizer)
    tensors = load_file(path / f"{name}.safetensors")
    key = next(key for key in tensors if "norm.weight" in key)
    tensors[key][2] = float("inf")
    aliases = {"aliases": '{"head.weight": "embedding.weight"}'} if name == "model" else None
    save_file(tensors, path / f"{name}.safetensors", metadata=aliases)
    reseal(path)
    refused(path, rf"{name}.safetensors: {key} holds 1 of 8 values that are not finite; nothing of it was loaded")


@pytest.mark.fault(8)
@pytest.mark.parametrize("name", ["model.pt", "model.bin", "last.ckpt", "model.pth", "state.pkl", "weights"])
def test_a_pickle_is_refused_unread(tmp_path, name):
    marker, path = tmp_path / "executed", tmp_path / name
    path.write_bytes(pickle.dumps(Payload(marker)))
    refused(path, rf"{name} is a single file, and reading it could run code .*; it was not opened\. Expected a folder")
    assert not marker.exists()


@pytest.mark.fault(9)
def test_a_pickled_index_of_shards_is_refused_unread(tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "step-1"
    path.mkdir()
    (path / ".metadata").write_bytes(pickle.dumps(Payload(marker)))
    (path / "__0_0.distcp").write_bytes(b"")
    refused(path, r"step-1 holds \.metadata, the pickle of a torch.distributed.checkpoint; .* not opened\. Expected a")
    assert not marker.exists()
    pickle.loads((path / ".metadata").read_bytes())
    assert marker.exists()  # or the test would show nothing


@pytest.mark.fault(8)
def test_a_folder_of_other_files_says_what_was_expected(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    refused(
        tmp_path, r"has no manifest.json.* It holds config.json, pytorch_model.bin; expected model.safetensors, rng"
    )


def test_a_run_folder_is_answered_with_its_checkpoints(tmp_path):
    path = save(tmp_path, 1)
    refused(tmp_path, rf"Complete ones there: {path}\.$")
