"""The opt-in tuning of tile sizes: what is tried, what is chosen, what is written. The timing itself needs a GPU."""

import json

import pytest
import torch

from benchmarks import tune
from kernels import tile_table


@pytest.mark.parametrize("kernel", ["window_forward", "global_columns", "block_key_grad", *tune.NYSTROM])
@pytest.mark.parametrize(("block_d", "element_size"), [(16, 2), (64, 2), (256, 2), (64, 4), (256, 4)])
def test_there_are_candidates_and_none_is_beyond_a_multiprocessor(kernel, block_d, element_size):
    options = list(tune.candidates(kernel, block_d, element_size))
    assert 5 <= len(options) <= 250
    for option in options:
        assert (option["BLOCK_M"] + option["BLOCK_N"] * option["num_stages"]) * block_d * element_size <= 200_000
        assert ("SPLIT" in option) == (kernel in tile_table.WINDOW_KERNELS)


def test_every_kernel_of_the_table_can_be_tuned():
    assert set(tune.BACKWARD) == {row["kernel"] for row in tile_table.rows()}


def test_the_fastest_is_chosen_and_what_fails_is_passed_over():
    def seconds(option):
        if option["BLOCK_M"] == 16:
            raise RuntimeError("out of resource")
        return option["BLOCK_M"]

    options = [{"BLOCK_M": block} for block in (128, 16, 32, 64)]
    assert tune.best_of(iter(options), seconds) == (32, {"BLOCK_M": 32})
    with pytest.raises(ValueError, match="nothing could be launched, at last: RuntimeError: out of resource"):
        tune.best_of(iter(options[1:2]), seconds)


def test_rows_take_the_place_of_their_like_in_the_order_of_the_table():
    table = tile_table.rows()
    place = {"kernel": "window_forward", "arch": "sm_90", "element_size": 2, "block_d": 64}
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "SPLIT": True, "num_warps": 4, "num_stages": 3, "shared_bytes": 0}
    found = [{**place, "max_seen": max_seen, **tile} for max_seen in (None, 640)]
    new = tune.replace_rows(table, found)
    same = [row for row in new if all(row[name] == entry for name, entry in place.items())]
    assert same == found[::-1]
    others = [row for row in table if any(row[name] != entry for name, entry in place.items())]
    assert [row for row in new if row not in found] == others
    newer = [{**row, "arch": "sm_120"} for row in found]
    assert tune.replace_rows(table, newer)[:2] == newer[::-1]


def test_the_shipped_table_is_written_as_tuning_writes_it():
    assert tile_table.FILE.read_text() == tile_table.table_text(tune.replace_rows(tile_table.rows(), []))
    assert json.loads(tile_table.table_text(tile_table.rows())) == tile_table.rows()


def test_a_trial_replaces_the_row_of_one_kernel():
    place = {"arch": "sm_90", "element_size": 2, "head_dim": 40, "num_seen": 9}
    before = {kernel: tile_table.choose(kernel, **place) for kernel in ("window_forward", "window_key_grad")}
    with tile_table.trial("window_forward", {"BLOCK_M": 16}):
        assert tile_table.choose("window_forward", **place) == {"BLOCK_M": 16, "BLOCK_D": 64}
        assert tile_table.choose("window_key_grad", **place) == before["window_key_grad"]
    assert tile_table.choose("window_forward", **place) == before["window_forward"]


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", tune.BACKWARD)
def test_every_candidate_is_really_launched(kernel):
    """Three warps are none that compile: a pass that works did not take them."""
    impossible = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 3, "num_stages": 1}
    split = {"SPLIT": False} if kernel in tile_table.WINDOW_KERNELS else {}
    with pytest.raises(ValueError, match="nothing could be launched"):
        tune.best_of(iter([{**impossible, **split}]), tune.timer(kernel, 64, torch.bfloat16, tune.NARROW))


@pytest.mark.interpreter
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as ended:
        tune.main([])
    assert ended.value.code == 2 and "torch sees no CUDA device" in capsys.readouterr().err
