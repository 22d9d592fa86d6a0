"""What is kept of a batch that gave no finite numbers, and the limit on how many."""

import json

import pytest
import torch
from safetensors.torch import load_file

from training.errors import NumericsError
from training.numerics import check_limit, check_score, keep_batch, stopped

FACTS = {"step": 7, "phase": 1, "lr": 0.5, "loss": float("nan"), "grad_norm": float("inf")}


def test_the_batch_is_there_to_be_looked_at(tmp_path):
    batch = torch.arange(40).view(4, 10)
    folder = keep_batch(tmp_path, batch[1:3], FACTS, rank=0)
    assert folder == tmp_path / "nonfinite" / "step-7"
    assert torch.equal(load_file(folder / "batch-rank-0.safetensors")["batch"], batch[1:3])
    assert json.loads((folder / "facts.json").read_text()) == FACTS | {"loss": "nan", "grad_norm": "inf"}


def test_each_process_keeps_its_own(tmp_path):
    for rank in (0, 1):
        folder = keep_batch(tmp_path, torch.full((2,), rank), FACTS, rank)
    assert sorted(path.name for path in folder.iterdir()) == [
        "batch-rank-0.safetensors",
        "batch-rank-1.safetensors",
        "facts.json",
    ]
    assert load_file(folder / "batch-rank-1.safetensors")["batch"].tolist() == [1, 1]


def test_the_limit_is_named_with_what_to_do(tmp_path):
    check_limit("skip", 3, 3, tmp_path)
    with pytest.raises(NumericsError, match=r"not finite 4 times, train.nonfinite=skip allows 3 .*lr.*clip_norm") as e:
        check_limit("skip", 4, 3, tmp_path)
    assert e.value.exit_code == 5


def test_a_stop_names_the_step_the_weights_and_the_batch(tmp_path):
    error = stopped(FACTS, tmp_path / "nonfinite" / "step-7")
    assert isinstance(error, NumericsError)
    for part in ("loss nan", "gradient norm inf", "step 8", "checkpoints/step-7", "nonfinite/step-7", "allow_changes"):
        assert part in str(error)
    assert f"stops again at once the update before has spoilt the weights: remove the newest of the folders {tmp_path}/"
    assert f"remove the newest of the folders {tmp_path}/checkpoints/step-N to go further back" in str(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_an_error(tmp_path, value):
    result = {"split": "test", "step": 1200, "bpc": 2.5, "f1": value}
    check_score(result, "bpc", tmp_path)
    with pytest.raises(NumericsError, match=f"^test f1 is {value} at step 1,200: .*{tmp_path / 'checkpoints'}"):
        check_score(result, "f1", tmp_path)


def test_a_batch_that_cannot_be_kept_costs_a_warning(tmp_path, caplog):
    (tmp_path / "nonfinite").write_text("in the way")
    keep_batch(tmp_path, torch.ones(2), FACTS, rank=0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the batch of step 8 could not be kept" in caplog.text
