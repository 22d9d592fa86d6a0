"""A model's tensors to a file and back: ties, views, and what does not fit."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from training.errors import CheckpointError
from training.tensor_file import check_tensors, model_tensors, read_model, tied_names


class Tied(nn.Module):
    def __init__(self, tied: bool = True):
        super().__init__()
        self.embedding = nn.Embedding(5, 2)
        self.head = nn.Linear(2, 5, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def write(path, model):
    tensors, aliases = model_tensors(model)
    save_file(tensors, path, metadata={"aliases": json.dumps(aliases)})
    return path


def test_ties_are_named_and_stored_once():
    tensors, aliases = model_tensors(Tied())
    assert (list(tensors), aliases) == (["embedding.weight"], {"head.weight": "embedding.weight"})
    assert tied_names(Tied(tied=False)) == {}


def test_tied_values_fit_an_untied_model(tmp_path):
    model = Tied()
    found = read_model(write(tmp_path / "a", model), Tied(tied=False), "cpu")
    assert torch.equal(found["head.weight"], model.embedding.weight)
    assert torch.equal(found["embedding.weight"], model.embedding.weight)


def test_untied_values_do_not_fit_a_tied_model(tmp_path):
    path = write(tmp_path / "a", Tied(tied=False))
    with pytest.raises(CheckpointError, match="head.weight and embedding.weight differ, expected one tensor"):
        read_model(path, Tied(), "cpu")


def test_views_of_one_larger_tensor_are_stored_by_value(tmp_path):
    base, model = torch.arange(10.0), nn.Module()
    model.register_buffer("left", base[:4])
    model.register_buffer("right", base[4:].view(2, 3).T)
    model.register_buffer("first", base[:2])
    found = read_model(write(tmp_path / "a", model), model, "cpu")
    assert found.keys() == {"left", "right", "first"}
    assert all(torch.equal(value, getattr(model, name)) for name, value in found.items())


def test_empty_tensors_are_not_taken_for_ties():
    model = nn.Module()
    model.register_buffer("a", torch.zeros(0))
    model.register_buffer("b", torch.zeros(0))
    assert tied_names(model) == {}


def test_another_dtype_does_not_fit(tmp_path):
    path = write(tmp_path / "a", nn.LayerNorm(8).bfloat16())
    with pytest.raises(CheckpointError, match=r"bias: found bfloat16 \[8\], expected float32 \[8\]"):
        read_model(path, nn.LayerNorm(8), "cpu")


def test_a_long_table_is_cut():
    expected = {f"layer.{index}": ("float32", (2,)) for index in range(30)}
    with pytest.raises(CheckpointError, match=r"30 of 30 tensors differ:\n(  layer.*\n){12}  \.\.\. and 18 more\n"):
        check_tensors("model.safetensors", {}, expected)
