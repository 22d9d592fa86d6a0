"""Strict JSON and files replaced in one step."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from training import files


def test_json_has_no_literals_beyond_the_standard():
    values = {
        "a": float("nan"),
        "b": [float("inf"), -float("inf")],
        "c": np.float32("nan"),
        "d": torch.tensor(2),
    }
    text = files.to_json(values)
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": "nan",
        "b": ["inf", "-inf"],
        "c": "nan",
        "d": 2,
    }


def test_json_takes_paths_tuples_arrays_and_numeric_keys():
    value = {1: (1, 2), "path": Path("a/b"), "array": np.arange(2), "set": {3, 1}, "flag": True, "none": None}
    assert files.json_ready(value) == {
        "1": [1, 2],
        "path": "a/b",
        "array": [0, 1],
        "set": [1, 3],
        "flag": True,
        "none": None,
    }


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    files.write_json(path, {"a": 1})

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_a_link_moves(tmp_path):
    for target in ("one", "two"):
        (tmp_path / target).mkdir()
        files.point_link(tmp_path / "latest", target)
    assert os.readlink(tmp_path / "latest") == "two"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "one", "two"]


def test_a_folder_in_the_way_of_a_link_is_left(tmp_path):
    (tmp_path / "latest").mkdir()
    files.point_link(tmp_path / "latest", "one")
    assert (tmp_path / "latest").is_dir()
    assert len(list(tmp_path.iterdir())) == 1
