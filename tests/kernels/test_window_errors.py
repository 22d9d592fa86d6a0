"""What the door of window attention refuses, and what it says."""

import pytest
import torch

from kernels.window_attention import global_rows_attention, window_attention
from tests.kernels.window import make_inputs

T, H, D = 6, 4, 2


def attend(shapes=None, **options):
    inputs = {name: tensor.detach() for name, tensor in make_inputs(T, num_heads=H, head_dim=D).items()}
    inputs |= {name: torch.zeros(shape) for name, shape in (shapes or {}).items()}
    return window_attention(**inputs, **{"window": 2, **options})


@pytest.mark.parametrize(
    "argument, value",
    [
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
    attend(dropout=0.0, dropout_seed=torch.tensor(1), query_start=0, return_lse=False, global_index=None)


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
        pytest.param(
            {}, {"query_start": -1}, "query_start is -1, it must be a whole number of at least 0", id="query_start"
        ),
        pytest.param(
            {"key": (2, 9, H, D), "value": (2, 9, H, D)},
            {"valid": torch.ones(2, T, dtype=torch.bool)},
            r"valid must be bool \[2, 9\], got .*\(2, 6\)",
            id="valid_of_the_rows",
        ),
        pytest.param(
            {},
            {"global_index": torch.tensor([0, 1])},
            r"global_index must be \[2, G\] \(batch, global tokens\), got \(2,\)",
            id="global_index_1d",
        ),
        pytest.param(
            {},
            {"global_index": torch.zeros(3, 4, dtype=torch.int64)},
            r"global_index must be \[2, G\] .* got \(3, 4\)",
            id="global_index_batch",
        ),
        pytest.param(
            {},
            {"global_index": torch.zeros(2, T, dtype=torch.bool)},
            "global_index must be int64 or int32, got torch.bool: it holds positions, which global_positions",
            id="global_index_mask",
        ),
        pytest.param(
            {},
            {"global_index": torch.zeros(2, 1, dtype=torch.int64, device="meta")},
            "global_index is on meta, the other tensors are on cpu",
            id="global_index_device",
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
        pytest.param({}, {"dropout": 1.0}, "dropout is 1.0, it must be at least 0 and below 1", id="dropout_1"),
        pytest.param({}, {"dropout": 0.1}, "dropout is 0.1, it needs a dropout_seed: int64", id="dropout_seed"),
        pytest.param(
            {},
            {"dropout": 0.1, "dropout_seed": torch.zeros(2).long()},
            r"dropout_seed must be int64 of one element, got torch.int64 \(2,\)",
            id="dropout_seed_shape",
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


@pytest.mark.parametrize("name", ["query", "key", "value"])
@pytest.mark.parametrize("impl", ["auto", "blocked", "reference"])
def test_a_mix_of_dtypes_is_refused(name, impl):
    inputs = {each: tensor.detach() for each, tensor in make_inputs(T).items()}
    inputs[name] = inputs[name].half()
    mixed = ", ".join(str(tensor.dtype) for tensor in inputs.values())
    with pytest.raises(ValueError, match=f"query, key and value must share one dtype: {mixed}"):
        window_attention(**inputs, window=2, impl=impl)
    query, key, value = inputs.values()
    with pytest.raises(ValueError, match=f"query_global, key and value must share one dtype: {mixed}"):
        global_rows_attention(query, key, value, global_index=torch.zeros(2, T).long(), impl=impl)


def test_global_keys_beside_a_relative_term_are_named():
    relative = make_inputs(T, columns=5)
    with pytest.raises(NotImplementedError, match="global_index together with position_query is not implemented"):
        window_attention(**relative, window=2, global_index=torch.tensor([[0], [0]]))


def attend_rows(**changes):
    inputs = {name: tensor.detach() for name, tensor in make_inputs(3, num_heads=H, key_len=T, head_dim=D).items()}
    inputs = {"query_global": inputs.pop("query"), **inputs, "global_index": torch.tensor([[0, 2, -1], [1, 1, 5]])}
    return global_rows_attention(**inputs | changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"query_global": torch.zeros(2, 3, D)}, r"query_global and key must be \[B, T, H, D\], got \(2, 3, 2\)"),
        ({"query_global": torch.zeros(3, 3, H, D)}, r"query_global \(3, 3, 4, 2\) and key .* differ in batch"),
        ({"value": torch.zeros(2, T, H, 3)}, r"share one shape: .*\(2, 6, 4, 3\)"),
        ({"valid": torch.ones(2, 3, dtype=torch.bool)}, r"valid must be bool \[2, 6\], got .*\(2, 3\)"),
        ({"global_index": torch.zeros(2, 4).long()}, r"global_index must be \[2, 3\] .* got \(2, 4\)"),
        ({"global_index": torch.zeros(1, 3).long()}, r"global_index must be \[2, 3\] .* got \(1, 3\)"),
        ({"global_index": torch.zeros(2, 3)}, "global_index must be int64 or int32, got torch.float32"),
        ({"dropout": -0.1}, "dropout is -0.1, it must be at least 0"),
        ({"dropout": 0.1, "dropout_seed": 1}, "dropout_seed must be an int64 tensor .* got int"),
        ({"impl": "flash"}, "impl is 'flash', it must be one of auto, triton, blocked, reference"),
    ],
)
def test_bad_arguments_of_global_rows_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        attend_rows(**changes)


@pytest.mark.parametrize(
    "argument, value",
    [
        ("document_start", torch.zeros(2, T, dtype=torch.int64)),
        ("document_end", torch.zeros(2, T, dtype=torch.int64)),
    ],
)
def test_unbuilt_arguments_of_global_rows_are_named(argument, value):
    with pytest.raises(NotImplementedError, match=f"global_rows_attention: the argument {argument} is not implemented"):
        attend_rows(**{argument: value})


@pytest.mark.parametrize("impl", ["auto", "blocked", "reference"])
def test_no_key_gives_zeros_and_zero_gradients(impl):
    inputs = make_inputs(3, key_len=0)
    out = window_attention(**inputs, window=2, impl=impl)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 3, 2, 4))
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in inputs.values())


@pytest.mark.parametrize("window", [1.5, True, [1, True]])
def test_a_window_that_is_no_whole_number(window):
    with pytest.raises(ValueError, match="must be a whole number"):
        window_attention(**make_inputs(4), window=window)


def test_whole_numbers_are_no_tokens():
    inputs = {name: tensor.detach().long() for name, tensor in make_inputs(4).items()}
    with pytest.raises(ValueError, match="query, key and value are torch.int64, they must be float64, float32"):
        window_attention(**inputs, window=2)


def test_global_positions_are_a_tensor():
    with pytest.raises(ValueError, match="global_index must be an int tensor .* got list"):
        window_attention(**make_inputs(4), window=2, global_index=[[0], [1]])


@pytest.mark.parametrize("name", ["key", "value", "valid"])
def test_tensors_on_unlike_devices(name):
    inputs = {**make_inputs(4), "valid": torch.ones(2, 4, dtype=torch.bool)}
    inputs[name] = inputs[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} is on meta, query is on cpu"):
        window_attention(**inputs, window=2)


@pytest.mark.parametrize("impl", ["auto", "blocked", "reference"])
def test_an_empty_text_gives_an_empty_result(impl):
    inputs = make_inputs(0)
    assert window_attention(**inputs, window=3, impl=impl).shape == (2, 0, 2, 4)
