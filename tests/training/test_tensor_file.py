"""A model's tensors to a file and back: ties, views, and what does not fit."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from training.errors import CheckpointError
from training.tensor_file import model_tensors, nonfinite, read_model, tied_names


class Tied(nn.Module):
    def __init__(self, tied: bool = True):
        super().__init__()
        self.embedding = nn.Embedding(5, 2)
        self.head = nn.Linear(2, 5, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


def write(path, model):
    tensors, aliases = model_tensors(model)
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"aliases": json.dumps(aliases)})
    return path


def test_ties_are_named_and_stored_once():
    tensors, aliases = model_tensors(Tied())
    assert (list(tensors), aliases) == (["embedding.weight"], {"head.weight": "embedding.weight"})
    assert tied_names(Tied(tied=False)) == {}


def test_tied_values_fit_an_untied_model(tmp_path):
    model = Tied()
    found, _ = read_model(write(tmp_path / "a", model), Tied(tied=False))
    assert torch.equal(found["head.weight"], model.embedding.weight)
    assert torch.equal(found["embedding.weight"], model.embedding.weight)


def test_untied_values_do_not_fit_a_tied_model(tmp_path):
    path = write(tmp_path / "a", Tied(tied=False))
    with pytest.raises(CheckpointError, match="head.weight and embedding.weight differ, expected one tensor"):
        read_model(path, Tied())


def test_views_of_one_larger_tensor_are_stored_by_value(tmp_path):
    base, model = torch.arange(10.0), nn.Module()
    model.register_buffer("left", base[:4])
    model.register_buffer("right", base[4:].view(2, 3).T)
    model.register_buffer("first", base[:2])
    found, _ = read_model(write(tmp_path / "a", model), model)
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
        read_model(path, nn.LayerNorm(8))


def test_a_long_table_is_cut(tmp_path):
    model, other = nn.Module(), nn.Module()
    for index in range(30):
        model.register_buffer(f"layer_{index}", torch.zeros(2))
        other.register_buffer(f"layer_{index}", torch.zeros(3))
    path = write(tmp_path / "a", model)
    with pytest.raises(CheckpointError, match=r"30 of 30 tensors differ:\n(  layer.*\n){12}  \.\.\. and 18 more\n"):
        read_model(path, other)


def test_a_file_of_which_nothing_fits_is_refused_in_any_case(tmp_path):
    with pytest.raises(CheckpointError, match="2 of 2 tensors differ"):
        read_model(write(tmp_path / "a", nn.LayerNorm(4)), nn.LayerNorm(8), strict=False)


def test_untied_values_fit_a_tied_model_in_part(tmp_path):
    stored = Tied(tied=False)
    found, left_out = read_model(write(tmp_path / "a", stored), Tied(), strict=False)
    assert list(found) == ["embedding.weight"] and torch.equal(found["embedding.weight"], stored.embedding.weight)
    assert left_out == ["  head.weight: the model ties it to embedding.weight, whose values were taken"]


@pytest.mark.parametrize("aliases", ["{", "[]"])
def test_a_broken_list_of_ties_is_refused(tmp_path, aliases):
    save_file({"weight": torch.zeros(2)}, tmp_path / "a", metadata={"aliases": aliases})
    with pytest.raises(CheckpointError, match="names of tied tensors in its header are"):
        read_model(tmp_path / "a", nn.LayerNorm(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_that_are_not_finite_are_counted(dtype):
    tensors = {
        "fine": torch.ones(3, dtype=dtype),
        "empty": torch.ones(0, dtype=dtype),
        "scalar": torch.tensor(float("-inf"), dtype=dtype),
        "mixed": torch.tensor([[1, float("nan")], [float("inf"), 2]], dtype=dtype),
        "whole": torch.arange(3),
    }
    assert nonfinite(tensors) == {"scalar": 1, "mixed": 2}
