"""The pseudo-inverse: published values, the identity its residual obeys, where it starts, and its gradient."""

import pytest
import torch

from kernels.nystrom_attention.core import landmark_values
from kernels.nystrom_attention.inverse import INITS, pseudo_inverse, pseudo_inverse_grad, start
from tests.kernels.window import error

EXAMPLE = torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]], dtype=torch.float64)


def attention_weights(*shape, scale=1.0):
    return torch.softmax(scale * torch.randn(*shape, shape[-1], dtype=torch.float64), dim=-1)


@pytest.mark.parametrize(
    "iterations, first_row",
    [
        (1, [0.972555, -0.167915, 0.23566]),
        (2, [1.379474, -0.372855, 0.052701]),
        (3, [1.566733, -0.306344, -0.245686]),
        (30, [1.611111, -0.277778, -0.333333]),
    ],
)
def test_steps_of_a_known_matrix(iterations, first_row):
    expected = torch.tensor(first_row, dtype=torch.float64)
    torch.testing.assert_close(pseudo_inverse(EXAMPLE, iterations=iterations)[0, 0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("init", INITS)
def test_the_residual_obeys_its_recursion(init):
    """E = I - A Z goes to (3 E^3 + E^4) / 4 at each step."""
    matrix = attention_weights(4, 9, scale=2.0)

    def residual(iterations):
        return torch.eye(9, dtype=torch.float64) - matrix @ pseudo_inverse(matrix, iterations=iterations, init=init)

    for step in range(1, 8):
        before = residual(step)
        cube = before @ before @ before
        assert error(residual(step + 1), (3 * cube + cube @ before) / 4) < 1e-11


@pytest.mark.parametrize(
    "share, inverted", [(0.1, 1.0), (0.01, 1.0), (1e-3, 0.687), (1e-4, 0.111), (1e-5, 0.012), (1e-6, 0.0012)]
)
def test_small_directions_are_damped_not_inverted(share, inverted):
    """How much of a direction six steps invert: `share` is its squared singular value over that of the largest."""
    matrix = torch.diag(torch.tensor([1.0, share**0.5], dtype=torch.float64))[None]
    assert (matrix @ pseudo_inverse(matrix))[0, 1, 1].item() == pytest.approx(inverted, rel=0.03)


def test_exact_starts_each_matrix_by_itself():
    matrix = attention_weights(3, 5)
    for each, begun in zip(matrix, start(matrix, "exact"), strict=True):
        assert error(begun, each.T / each.sum(dim=0).max()) < 1e-15


def test_original_starts_all_matrices_alike():
    matrix = attention_weights(3, 5)
    assert error(start(matrix, "original"), matrix.mT / matrix.sum(dim=1).max()) < 1e-15


@pytest.mark.parametrize("init", INITS)
def test_a_peaked_neighbour_changes_the_inverse_only_under_original(init):
    matrix = attention_weights(2, 5)
    peaked = torch.zeros(1, 5, 5, dtype=torch.float64)
    peaked[:, :, 2] = 1.0
    alone, beside = pseudo_inverse(matrix, init=init), pseudo_inverse(torch.cat([matrix, peaked]), init=init)[:2]
    assert beside.equal(alone) == (init == "exact")


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("iterations", [1, 2, 6])
@pytest.mark.parametrize("kind", ["random", "tied", "with_zeros"])
def test_the_gradient_is_that_of_autograd(kind, iterations, init):
    matrix = attention_weights(3, 6)
    if kind == "tied":  # every column sum is the largest
        matrix = torch.eye(6, dtype=torch.float64)[torch.randperm(6)].expand(3, 6, 6).clone()
    if kind == "with_zeros":  # landmarks that are not there, and an example that has none
        matrix[:, 4:] = matrix[:, :, 4:] = matrix[1] = 0.0
    matrix.requires_grad_()
    inverse = pseudo_inverse(matrix, iterations=iterations, init=init)
    grad = torch.randn_like(inverse)
    (expected,) = torch.autograd.grad(inverse, matrix, grad)
    found = pseudo_inverse_grad(matrix.detach(), grad, iterations=iterations, init=init)
    assert error(found, expected) < 1e-11
    if kind == "with_zeros":
        assert inverse[1].eq(0).all() and inverse[:, 4:].eq(0).all() and inverse[:, :, 4:].eq(0).all()


def core_inputs(dtype):
    tensors = [torch.randn(2, 6, 3, 4, dtype=torch.float64) for _ in range(3)]
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("masked", [False, True])
def test_the_core_is_its_definition_and_so_is_its_gradient(masked, init):
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool() if masked else None
    inputs = core_inputs(torch.float64)
    found = landmark_values(*inputs, real, scale=0.7, iterations=4, init=init)
    grad = torch.randn_like(found)
    query, key, attended = (tensor.transpose(1, 2) for tensor in inputs)
    scores = 0.7 * query @ key.mT
    if real is not None:
        scores = scores.masked_fill(~real[:, None, None, :], -1e300)
    weights = torch.softmax(scores, dim=-1)
    if real is not None:
        weights = weights * real[:, None, :, None]
    inverse = pseudo_inverse(weights.flatten(0, 1), iterations=4, init=init).view_as(weights)
    expected = (inverse @ attended).transpose(1, 2)
    assert error(found.detach(), expected.detach()) < 1e-13
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert error(ours, theirs) < 1e-11


def test_autocast_leaves_the_core_alone():
    inputs = core_inputs(torch.float32)
    expected = landmark_values(*inputs, None, scale=0.5, iterations=6, init="exact")
    grads = torch.autograd.grad(expected.sum(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = landmark_values(*inputs, None, scale=0.5, iterations=6, init="exact")
        found_grads = torch.autograd.grad(found.sum(), inputs)
    assert found.equal(expected) and all(one.equal(two) for one, two in zip(found_grads, grads, strict=True))
