"""The file of an evaluation: the newest result has the plain name, no result of other settings is lost."""

import json

import pytest

from training.evaluation import write_evaluation
from training.run_dir import RunDir

RESULT = {"step": 6, "split": "test", "bpc": 2.5, "share": 1.0, "protocol": "windowed", "context": 64, "stride": 8}


@pytest.mark.parametrize(
    "other",
    [
        {"share": 0.5},
        {"protocol": "uncut"},
        {"context": 32},
        {"stride": 4},
        {"window_cut_to": 40},
        {"precision": "bf16"},
        {"device": "cuda"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_a_result_of_other_settings_is_kept(tmp_path, other):
    folder = RunDir(tmp_path)
    path, kept = write_evaluation(folder, RESULT)
    assert (path, kept) == (tmp_path / "eval" / "test-step-6.json", None)
    path, kept = write_evaluation(folder, {**RESULT, **other, "bpc": float("nan")})
    assert kept is not None
    assert kept == tmp_path / "eval" / "test-step-6,share=1.0,protocol=windowed,context=64,stride=8.json"
    assert json.loads(kept.read_text()) == RESULT
    assert json.loads(path.read_text()) == {**RESULT, **other, "bpc": "nan"}
    _, back = write_evaluation(folder, RESULT)
    assert back is not None and all(f"{key}={value}" in back.name for key, value in other.items())


def test_a_result_of_the_same_settings_is_replaced(tmp_path):
    folder = RunDir(tmp_path)
    write_evaluation(folder, {**RESULT, "bpc": 9.0})
    path, kept = write_evaluation(folder, RESULT)
    assert kept is None and json.loads(path.read_text()) == RESULT and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_file_that_tells_no_settings_is_kept_too(tmp_path, text):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "test-step-6.json").write_text(text)
    _, kept = write_evaluation(RunDir(tmp_path), RESULT)
    assert kept is not None and kept.name == "test-step-6,settings-unknown.json" and kept.read_text() == text


def test_a_setting_cannot_lead_out_of_the_folder(tmp_path):
    folder = RunDir(tmp_path)
    write_evaluation(folder, {**RESULT, "protocol": "../../x"})
    _, kept = write_evaluation(folder, RESULT)
    assert kept is not None and kept.parent == tmp_path / "eval" and "protocol=.._.._x" in kept.name
