"""What the tests of Nyström attention share: inputs with the taps of a convolution, and every case of one table."""

import torch

from kernels.nystrom_attention import nystrom_attention
from kernels.nystrom_attention.inverse import pseudo_inverse
from kernels.nystrom_attention.reference import averaging, convolve, softmax
from tests.kernels.window import assert_same, error, in_double, make_inputs, make_valid

# length, landmarks, heads, head dim, taps (0: no convolution), mask, compat
CASES = {
    "one_token": (1, 1, 1, 4, 3, "none", None),
    "one_landmark": (19, 1, 1, 4, 0, "none", None),
    "divided": (24, 4, 2, 8, 5, "none", None),
    "not_divided": (23, 4, 2, 20, 5, "none", None),
    "all_but_one": (18, 17, 1, 4, 3, "none", None),
    "as_many_as_tokens": (16, 16, 2, 4, 3, "tail", None),
    "more_than_tokens": (9, 33, 1, 8, 65, "holes", None),
    "tail": (37, 5, 2, 16, 9, "tail", None),
    "holes": (37, 16, 1, 8, 5, "holes", None),
    "isolated": (70, 6, 1, 4, 33, "isolated", None),
    "some_exact": (27, 18, 1, 4, 5, "tail", None),
    "one_all_masked": (21, 4, 1, 8, 3, "one_all_masked", None),
    "many_landmarks": (50, 33, 1, 4, 1, "tail", None),
    "hf": (24, 4, 2, 8, 5, "tail", "hf"),
    "hf_exact": (12, 12, 1, 8, 5, "tail", "hf"),
    "original": (24, 4, 2, 8, 5, "holes", "original"),
    "hf_all_masked": (24, 4, 1, 4, 5, "one_all_masked", "hf"),
    "hf_exact_all_masked": (12, 12, 1, 4, 5, "one_all_masked", "hf"),
    "original_all_masked": (24, 12, 1, 4, 5, "one_all_masked", "original"),
}


def with_taps(inputs: dict[str, torch.Tensor], num_taps: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of `make_inputs` and a filter of `num_taps` for each head, none for 0."""
    if not num_taps:
        return inputs
    query = inputs["query"]
    taps = torch.randn(query.shape[2], num_taps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {**inputs, "conv_weight": taps.to(query.dtype).requires_grad_()}


def inputs_and_options(case: str, dtype: torch.dtype = torch.float64) -> tuple[dict, dict]:
    """(tensors with a gradient, other arguments) of a row of CASES."""
    seq_len, num_landmarks, num_heads, head_dim, num_taps, mask, compat = CASES[case]
    inputs = make_inputs(seq_len, num_heads=num_heads, head_dim=head_dim, dtype=dtype)
    options = {"num_landmarks": num_landmarks, "valid": make_valid(mask, 2, seq_len), "compat": compat}
    return with_taps(inputs, num_taps), options


def results(inputs: dict, options: dict, impl: str) -> dict[str, torch.Tensor]:
    """Result and all gradients by one path, under one fixed random weighting of the result."""
    return _run(nystrom_attention, inputs, {**options, "impl": impl})


def _run(function, inputs, options):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    out = function(**leaves, **options)
    out.backward(weights_for(out))
    return {"out": out.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def weights_for(out: torch.Tensor) -> torch.Tensor:
    """A gradient of the result, random, the same numbers in every dtype."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out)


def of_squares(inputs: dict, options: dict, impl: str) -> dict[str, torch.Tensor]:
    """Result and the gradients of the sum of its squares, to which rows of zeros add nothing."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    out = nystrom_attention(**leaves, **options, impl=impl)
    out.square().sum().backward()
    return {"out": out.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def plain_attention(query, key, value, *, num_landmarks, valid=None, conv_weight=None):
    """The formula as one would write it in the inputs' dtype, with the pseudo-inverse in float32."""
    counted = torch.ones(query.shape[:2], dtype=torch.bool, device=query.device) if valid is None else valid
    few = (counted.sum(1) <= num_landmarks)[:, None, None, None]
    averages = torch.stack([averaging(each, num_landmarks) for each in counted])[:, None].to(query.dtype)
    there = (averages > 0).any(-1)
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    scale = query.shape[-1] ** -0.5
    query_landmarks, key_landmarks = averages @ query, averages @ key
    to_landmarks = softmax(query @ key_landmarks.mT * scale, there[:, :, None])
    between = softmax(query_landmarks @ key_landmarks.mT * scale, there[:, :, None]).float() * there[..., None]
    to_keys = softmax(query_landmarks @ key.mT * scale, counted[:, None, None])
    inverse = pseudo_inverse(between.flatten(0, 1)).view_as(between)
    out = to_landmarks @ (inverse @ (to_keys @ value).float()).to(query.dtype)
    out = torch.where(few, softmax(query @ key.mT * scale, counted[:, None, None]) @ value, out)
    if conv_weight is not None:
        out = out + convolve(value * counted[:, None, :, None], conv_weight.to(query.dtype))
    return (out * counted[:, None, :, None]).transpose(1, 2)


def assert_as_good_as_plain(inputs: dict, options: dict, impl: str) -> None:
    """1e-5 relative, or twice the error of the formula in the same dtype, of the result and each gradient."""
    exact = results(in_double(inputs), options, "reference")
    plain, found = _run(plain_attention, inputs, options), results(inputs, options, impl)
    for name, truth in exact.items():
        assert found[name].dtype == inputs.get(name, inputs["query"]).dtype
        assert error(found[name], truth) <= max(1e-5, 2 * error(plain[name], truth)), name


def assert_is_the_oracle(inputs: dict, options: dict, impl: str, tolerance: float = 1e-12) -> None:
    """Values and all gradients of a path are those of the reference."""
    assert_same(results(inputs, options, impl), results(inputs, options, "reference"), tolerance)
