"""Folders that are damaged or odd: each is refused by the name of its file and of the entry."""

import json
import pickle
import re

import pytest
import torch

from models.errors import PretrainedError
from models.pretrained import load_pretrained
from tests.models.published import theirs

WEIGHTS, INDEX = "pytorch_model.bin", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """A Longformer of three layers, four heads, width 32."""
    theirs("longformer", "ForMaskedLM").save_pretrained(tmp_path)
    return tmp_path


def refused(path_or_name, message):
    """Loading is a PretrainedError that holds `message`."""
    with pytest.raises(PretrainedError, match=re.escape(message)):
        load_pretrained(path_or_name)


ENTRIES = {
    "width": ({"hidden_size": "x"}, "hidden_size is 'x', it must be a whole number of at least 1"),
    "part": ({"hidden_size": 32.5}, "hidden_size is 32.5, it must be a whole number of at least 1"),
    "truth": ({"num_hidden_layers": True}, "num_hidden_layers is True, it must be a whole number"),
    "none": ({"num_attention_heads": 0}, "num_attention_heads is 0, it must be a whole number of at least 1"),
    "pad": ({"pad_token_id": None}, "pad_token_id is None, it must be a whole number of at least 0"),
    "window": ({"attention_window": None}, "attention_window is None, it must be a whole number or a list of 3"),
    "windows": ({"attention_window": [4, 4]}, "attention_window is [4, 4], it must be a whole number or a list of 3"),
    "word": ({"attention_window": [4, 4, "x"]}, "attention_window is [4, 4, 'x'], it must be a whole number or"),
    "odd": ({"attention_window": 3}, "attention_window has 3: it counts both sides and must be even"),
    "labels": ({"id2label": ["a", "b"]}, "id2label is ['a', 'b'], it must name labels by their numbers"),
    "label": ({"id2label": {"x": "a"}}, "id2label is {'x': 'a'}, it must name labels by their numbers"),
    "heads": ({"num_attention_heads": 5}, "num_attention_heads is 5, which does not divide hidden_size 32"),
    "norm": ({"layer_norm_eps": "small"}, "layer_norm_eps is 'small', it must be a number of at least 0"),
    "dropout": ({"hidden_dropout_prob": 1.5}, "dropout is 1.5, it must be at least 0 and below 1"),
    "activation": ({"hidden_act": ["gelu"]}, "hidden_act is ['gelu'], it must be a name"),
    "class": ({"architectures": "LongformerModel"}, "architectures is 'LongformerModel', it must be a list"),
    "short": ({"max_position_embeddings": 2}, "max_positions is 0, it must be at least 1"),
    "type": ({"model_type": ["longformer"]}, "model_type is ['longformer'], known are"),
}


@pytest.mark.fault(42)
@pytest.mark.parametrize(("entries", "message"), ENTRIES.values(), ids=ENTRIES)
def test_an_entry_that_cannot_be_is_named_with_its_file(folder, entries, message):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    from_file = message if message.startswith(("model_type", "attention_window has")) else f"{path}: {message}"
    refused(folder, from_file)


def test_a_bert_need_not_say_which_token_pads(tmp_path):
    theirs("bert", "ForMaskedLM").save_pretrained(tmp_path)
    assert load_pretrained(tmp_path, pad_token_id=None).encoder.pad_id is None


FILES = {
    "list": ("config.json", b"[]", "config.json holds a list, it must be an object of entries by name"),
    "empty": ("config.json", b"", "config.json is no JSON"),
    "bytes": ("config.json", b"\xff\xfe", "config.json is no JSON"),
    "index": (INDEX, b"{", f"{INDEX} is no JSON"),
    "empty index": (INDEX, b"", f"{INDEX} is no JSON"),
    "bare index": (INDEX, b"{}", f"{INDEX} has no weight_map"),
    "map": (INDEX, b'{"weight_map": ["model.safetensors"]}', f"{INDEX} has no weight_map"),
    "no map": (INDEX, b'{"weight_map": {}}', f"{INDEX} has no weight_map"),
    "number": (INDEX, b'{"weight_map": {"x": 3}}', f"{INDEX} has 3 for x: it must be the name of a file beside it"),
    "absolute": (INDEX, b'{"weight_map": {"x": "/etc/passwd"}}', f"{INDEX} has '/etc/passwd' for x: it must be"),
    "above": (INDEX, b'{"weight_map": {"x": "../a.bin"}}', f"{INDEX} has '../a.bin' for x: it must be the name of"),
    "windows": (INDEX, b'{"weight_map": {"x": "..\\\\a.bin"}}', f"{INDEX} has '..\\\\a.bin' for x: it must be"),
    "parent": (INDEX, b'{"weight_map": {"x": ".."}}', f"{INDEX} has '..' for x: it must be the name of a file"),
    "missing": (INDEX, b'{"weight_map": {"x": "a.bin"}}', "a.bin is missing: the index names it"),
    "garbage": (WEIGHTS, b"version https://git-lfs", f"{WEIGHTS} is damaged (it begins with b'version https://'"),
    "nothing": (WEIGHTS, b"", f"{WEIGHTS} is damaged (EOFError): copy or download it again"),
    "cut": (WEIGHTS, b"PK\x03\x04 and no more", f"{WEIGHTS} is damaged ("),
    "tensors": ("model.safetensors", b"", "model.safetensors is damaged ("),
    "old pickle": (WEIGHTS, pickle.dumps({"x": re.compile("x")}, protocol=2), "a pickle that holds more than tensors"),
    "pickled": (WEIGHTS, pickle.dumps([1, 2], protocol=2), f"{WEIGHTS}"),
}


@pytest.mark.fault(41)
@pytest.mark.parametrize(("name", "content", "message"), FILES.values(), ids=FILES)
def test_a_damaged_file_is_named(folder, name, content, message):
    if name != "config.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    refused(folder, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "holds a list, it must be tensors by name"),
        ({"state_dict": {"x": torch.zeros(2)}}, "holds a dict as 'state_dict', it must be tensors by name"),
        ({"x": 3}, "holds a int as 'x', it must be tensors by name"),
        ({3: torch.zeros(2)}, "holds a Tensor as 3, it must be tensors by name"),
    ],
)
def test_a_pickle_of_something_else_is_refused(folder, content, message):
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / WEIGHTS)
    refused(folder, f"{folder / WEIGHTS} {message}")


def test_weights_that_are_a_folder_are_named(folder):
    (folder / "model.safetensors").unlink()
    (folder / WEIGHTS).mkdir()
    refused(folder, f"{folder / WEIGHTS} cannot be read: Is a directory")


@pytest.mark.fault(40)
@pytest.mark.parametrize("name", ["my model", "a--b", "nobody/my model", "x" * 200])
def test_a_name_that_no_model_can_have(name):
    refused(name, f"{name!r} is neither a folder here nor a name that a model of the Hugging Face hub can have")
