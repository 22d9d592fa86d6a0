"""One step's gradient: accumulation, clipping, what the host reads."""

import math

import pytest
import torch
from torch import nn

from training.distributed import Distributed
from training.step import forward_backward


def loss_of(model, batch):
    """(sum over targets, their number, {another sum})."""
    out = model(batch)
    return out.square().sum(), out.numel(), {"half": out.detach().square().sum() / 2}


def a_step(model, batch, **changes):
    options = {
        "rows": len(batch),
        "clip_norm": 0.0,
        "precision": "fp32",
        "dist": Distributed("cpu"),
        "stop": lambda: False,
    }
    return forward_backward(model, batch, loss_of, **(options | changes))


def make():
    torch.manual_seed(0)
    return nn.Linear(3, 2), torch.randn(7, 3)


def test_gradient_and_sums_are_those_of_the_mean():
    model, batch = make()
    numbers = a_step(model, batch)
    (expected,) = torch.autograd.grad(model(batch).square().mean(), model.weight)
    torch.testing.assert_close(model.weight.grad, expected)
    assert numbers.num_targets == 14 and numbers.is_finite and not numbers.stop
    assert numbers.loss == pytest.approx(model(batch).square().mean().item())
    assert numbers.sums["half"] == pytest.approx(numbers.sums["loss"] / 2)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 100])
def test_accumulation_changes_nothing(rows):
    model, batch = make()
    whole = a_step(model, batch)
    gradient = model.weight.grad
    model.zero_grad()
    parts = a_step(model, batch, rows=rows)
    torch.testing.assert_close(model.weight.grad, gradient)
    assert parts.loss == pytest.approx(whole.loss) and parts.grad_norm == pytest.approx(whole.grad_norm)
    assert parts.num_targets == whole.num_targets


def test_the_norm_is_that_before_clipping():
    model, batch = make()
    free = a_step(model, batch)
    model.zero_grad()
    clipped = a_step(model, batch, clip_norm=free.grad_norm / 10)
    assert clipped.grad_norm == pytest.approx(free.grad_norm)
    left = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in model.parameters()))
    assert left == pytest.approx(free.grad_norm / 10, rel=1e-4)


@pytest.mark.fault(32)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_bad_number_shows(value):
    model, batch = make()
    batch[3, 1] = value
    assert not a_step(model, batch, rows=2).is_finite


def test_a_frozen_parameter_stays_out():
    model, batch = make()
    model.bias.requires_grad_(False)
    assert a_step(model, batch).is_finite and model.bias.grad is None


def test_a_request_to_stop_comes_back():
    model, batch = make()
    assert a_step(model, batch, stop=lambda: True).stop
