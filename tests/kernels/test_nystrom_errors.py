"""What the door of Nyström attention refuses, and what it says."""

import pytest
import torch

from kernels.nystrom_attention import nystrom_attention
from tests.kernels.window import make_inputs

T, H, D = 6, 4, 2


def attend(shapes=None, **options):
    inputs = {name: tensor.detach() for name, tensor in make_inputs(T, num_heads=H, head_dim=D).items()}
    inputs |= {name: torch.zeros(shape, dtype=torch.float64) for name, shape in (shapes or {}).items()}
    return nystrom_attention(**{**inputs, "num_landmarks": 2, **options})


@pytest.mark.parametrize(
    "shapes, options, message",
    [
        pytest.param({}, {"causal": True}, "causal is True, .* a landmark averages a whole segment", id="causal"),
        pytest.param({"query": (T, H, D)}, {}, r"must be \[B, T, H, D\], got \(6, 4, 2\)", id="query_3d"),
        pytest.param({"value": (2, T, H, 3)}, {}, r"share one shape: .*\(2, 6, 4, 3\)", id="value_dim"),
        pytest.param(
            {"query": (2, 5, H, D)}, {}, "query has 5 tokens and key 6: landmarks need one text", id="lengths"
        ),
        pytest.param(
            {}, {"valid": torch.ones(2, T + 1) > 0}, r"valid must be bool \[2, 6\], got .*\(2, 7\)", id="valid_shape"
        ),
        pytest.param({}, {"valid": torch.ones(2, T)}, r"valid must be bool .* got torch.float32", id="valid_dtype"),
        pytest.param(
            {}, {"num_landmarks": 0}, "num_landmarks is 0, it must be a whole number of at least 1", id="landmarks"
        ),
        pytest.param(
            {}, {"num_landmarks": 8.5}, "num_landmarks is 8.5, it must be a whole number", id="half a landmark"
        ),
        pytest.param(
            {}, {"pinv_iterations": 0}, "pinv_iterations is 0, it must be a whole number of at least 1", id="iterations"
        ),
        pytest.param(
            {}, {"pinv_init": "best"}, "pinv_init is 'best', it must be one of 'exact', 'original'", id="init"
        ),
        pytest.param({}, {"compat": "tf"}, "compat is 'tf', it must be one of 'hf', 'original'", id="compat"),
        pytest.param(
            {},
            {"compat": "hf", "num_landmarks": 4},
            "compat='hf' needs a length that 4 landmarks divide, got 6",
            id="hf",
        ),
        pytest.param(
            {"conv_weight": (H, 4)}, {}, r"conv_weight must be \[4, K\] .*, K odd, got \(4, 4\)", id="even_taps"
        ),
        pytest.param({"conv_weight": (3, 5)}, {}, r"conv_weight must be \[4, K\] .* got \(3, 5\)", id="taps_heads"),
        pytest.param(
            {"conv_weight": (H, 1, 5, 1)}, {}, r"conv_weight must be \[4, K\] .* got \(4, 1, 5, 1\)", id="conv2d_weight"
        ),
        pytest.param(
            {},
            {"conv_weight": torch.ones(H, 3, dtype=torch.int64)},
            "conv_weight must be of a floating type, got torch.int64",
            id="taps_dtype",
        ),
        pytest.param(
            {},
            {"conv_weight": torch.ones(H, 3, device="meta")},
            "conv_weight is on meta, the other tensors are on cpu",
            id="taps_device",
        ),
        pytest.param({}, {"impl": "flash"}, "impl is 'flash', it must be one of auto, triton, blocked", id="impl"),
    ],
)
def test_bad_arguments_are_named(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        attend(shapes, **options)


@pytest.mark.parametrize("impl", ["auto", "blocked", "reference"])
def test_fewer_key_heads_are_named(impl):
    with pytest.raises(NotImplementedError, match="2 key heads for 4 query heads are not implemented"):
        attend({"key": (2, T, 2, D), "value": (2, T, 2, D)}, impl=impl)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_mix_of_dtypes_is_refused(name):
    inputs = {each: tensor.detach() for each, tensor in make_inputs(T).items()}
    inputs[name] = inputs[name].half()
    with pytest.raises(ValueError, match="query, key and value must share one dtype"):
        nystrom_attention(**inputs, num_landmarks=2)


@pytest.mark.parametrize("compat", ["hf", "original"])
def test_compat_takes_a_text_no_longer_than_the_landmarks(compat):
    assert attend(num_landmarks=7, compat=compat).equal(attend(num_landmarks=7))


@pytest.mark.parametrize("impl", ["auto", "blocked", "reference"])
def test_an_empty_text_gives_an_empty_result(impl):
    inputs = make_inputs(0)
    taps = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    out = nystrom_attention(**inputs, num_landmarks=3, conv_weight=taps, impl=impl)
    out.sum().backward()
    assert out.shape == (2, 0, 2, 4) and taps.grad is not None and taps.grad.eq(0).all()
