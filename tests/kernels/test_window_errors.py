"""What the door of window attention refuses, and what it says."""

import logging

import pytest
import torch

from kernels.window_attention import api, window_attention
from tests.kernels.window import make_inputs

T, H, D = 6, 4, 2


def attend(shapes=None, **options):
    inputs = {name: tensor.detach() for name, tensor in make_inputs(T, num_heads=H, head_dim=D).items()}
    inputs |= {name: torch.zeros(shape) for name, shape in (shapes or {}).items()}
    return window_attention(**inputs, **{"window": 2, **options})


@pytest.mark.parametrize(
    "argument, value",
    [
        ("global_index", torch.tensor([[0], [0]])),
        ("dropout", 0.1),
        ("dropout_seed", torch.tensor(1)),
        ("document_start", torch.zeros(2, T, dtype=torch.int64)),
        ("document_end", torch.zeros(2, T, dtype=torch.int64)),
        ("distance_bias", torch.zeros(H, 5)),
        ("return_lse", True),
    ],
)
@pytest.mark.parametrize("impl", ["auto", "blocked", "reference"])
def test_unbuilt_arguments_are_named(argument, value, impl):
    with pytest.raises(NotImplementedError, match=rf"argument {argument} is not implemented"):
        attend(**{argument: value}, impl=impl)


def test_neutral_values_of_unbuilt_arguments_pass():
    attend(dropout=0.0, query_start=0, return_lse=False, global_index=None)


@pytest.mark.parametrize(
    "shapes, options, message",
    [
        pytest.param({"query": (T, H, D)}, {}, r"must be \[B, T, H, D\], got \(6, 4, 2\)", id="query_3d"),
        pytest.param({"key": (2, T, D)}, {}, r"must be \[B, T, H, D\]", id="key_3d"),
        pytest.param({"value": (2, T, H, 3)}, {}, r"share one shape: .*\(2, 6, 4, 3\)", id="value_dim"),
        pytest.param({"query": (3, T, H, D)}, {}, r"\(3, 6, 4, 2\) .* differ in batch", id="batch"),
        pytest.param({"query": (2, T, H, 3)}, {}, r"\(2, 6, 4, 3\) .* head dim", id="head_dim"),
        pytest.param(
            {"key": (2, T, 3, D), "value": (2, T, 3, D)},
            {},
            "4 query heads are no multiple of 3 key heads",
            id="key_heads",
        ),
        pytest.param({"valid": (2, T)}, {}, r"valid must be bool \[2, 6\], got torch.float32", id="valid_dtype"),
        pytest.param(
            {},
            {"valid": torch.ones(2, T + 1, dtype=torch.bool)},
            r"valid must be bool \[2, 6\], got .*\(2, 7\)",
            id="valid_shape",
        ),
        pytest.param({}, {"window": -1}, "window of head 0 is -1, it must be at least 0", id="window"),
        pytest.param({}, {"window": [1, 2]}, "window has 2 entries for 4 heads", id="window_list"),
        pytest.param({}, {"dilation": 0}, "dilation of head 0 is 0, it must be at least 1", id="dilation"),
        pytest.param({}, {"query_start": -1}, "query_start is -1, it must be at least 0", id="query_start"),
        pytest.param(
            {"key": (2, 9, H, D), "value": (2, 9, H, D)},
            {"valid": torch.ones(2, T, dtype=torch.bool)},
            r"valid must be bool \[2, 9\], got .*\(2, 6\)",
            id="valid_of_the_rows",
        ),
        pytest.param({"position_query": (2, T, H, D)}, {}, "position_query and position_key go together", id="alone"),
        pytest.param(
            {"position_query": (2, T, H, 5), "position_key": (H, 5, D)},
            {},
            r"position_query \(2, 6, 4, 5\) must be shaped as query",
            id="position_query",
        ),
        pytest.param(
            {"position_query": (2, T, H, D), "position_key": (H, 3, D)},
            {},
            r"position_key must be \(4, 5, 2\) .*\(4, 3, 2\)",
            id="position_key_both_sides",
        ),
        pytest.param(
            {"position_query": (2, T, H, D), "position_key": (H, 5, D)},
            {"causal": True},
            r"position_key must be \(4, 3, 2\) .*\(4, 5, 2\)",
            id="position_key_causal",
        ),
        pytest.param(
            {},
            {"impl": "flash"},
            "impl is 'flash', it must be one of auto, triton, blocked, reference",
            id="impl",
        ),
    ],
)
def test_bad_arguments_are_named(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        attend(shapes, **options)


def test_a_named_path_never_falls_back():
    with pytest.raises(NotImplementedError, match="impl='triton'"):
        attend(impl="triton")


@pytest.mark.parametrize("impl", ["auto", "blocked", "reference"])
def test_an_empty_text_gives_an_empty_result(impl):
    inputs = make_inputs(0)
    assert window_attention(**inputs, window=3, impl=impl).shape == (2, 0, 2, 4)


def test_auto_says_once_what_it_took(caplog):
    api._say_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="kernels.window_attention.api"):
        attend(impl="blocked")
        assert not caplog.records
        attend()
        attend()
    assert [record.message.split(":")[0] for record in caplog.records] == ["window_attention runs on the blocked path"]
