"""Learning rate and phase arithmetic at their edges."""

import pytest

from training.schedule import learning_rate, locate


def rates(**options) -> list[float]:
    settings = {
        "lr": 2.0,
        "steps": 10,
        "warmup_steps": 4,
        "decay": "linear",
        "final_lr_ratio": 0.1,
        **options,
    }
    return [learning_rate(step, **settings) for step in range(settings["steps"] + 1)]


def test_warmup_rises_by_equal_parts_to_the_peak():
    assert rates()[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_linear_falls_by_equal_parts_to_the_final_rate():
    values = rates()[4:]
    assert values == pytest.approx([2.0 - 0.3 * i for i in range(7)])
    assert values[-1] == pytest.approx(0.2)


def test_cosine_meets_its_ends_and_its_middle():
    values = rates(decay="cosine", warmup_steps=0)
    assert values[0] == 2.0
    assert values[5] == pytest.approx((2.0 + 0.2) / 2)
    assert values[10] == pytest.approx(0.2)
    assert values == sorted(values, reverse=True)


def test_polynomial_falls_with_a_power_of_what_is_left():
    cubic = rates(decay="polynomial", decay_power=3.0, warmup_steps=0, final_lr_ratio=0.0)
    assert cubic == pytest.approx([2.0 * (1 - step / 10) ** 3 for step in range(11)])
    assert rates(decay="polynomial") == rates(decay="linear")


def test_constant_ignores_the_final_ratio():
    assert rates(decay="constant", warmup_steps=0) == [2.0] * 11


def test_final_ratio_zero_leaves_no_update_at_zero():
    assert rates(final_lr_ratio=0.0)[9] > 0


def test_phase_of_warmup_only():
    assert rates(steps=4, warmup_steps=4) == [0.5, 1.0, 1.5, 2.0, 2.0]


@pytest.mark.parametrize(
    ("step", "options", "message"),
    [
        (0, {"decay": "exponential"}, "decay must be one of constant, linear, cosine, polynomial, got 'exponential'"),
        (0, {"warmup_steps": 11}, "warmup_steps must lie in 0..10 .* got 11"),
        (11, {}, "phase_step must lie in 0..10, got 11"),
        (-1, {}, "phase_step must lie in 0..10, got -1"),
    ],
)
def test_impossible_values_are_refused(step, options, message):
    settings = {
        "lr": 1.0,
        "steps": 10,
        "warmup_steps": 0,
        "decay": "linear",
        "final_lr_ratio": 0.1,
        **options,
    }
    with pytest.raises(ValueError, match=message):
        learning_rate(step, **settings)


@pytest.mark.parametrize(
    ("step", "phases", "expected"),
    [
        (0, [3, 2], (0, 0)),
        (2, [3, 2], (0, 2)),
        (3, [3, 2], (1, 0)),
        (4, [3, 2], (1, 1)),
        (5, [3, 2], (1, 2)),
        (0, [0, 2], (1, 0)),
        (3, [3, 0, 1], (2, 0)),
        (3, [3, 0], (0, 3)),
        (1, [1], (0, 1)),
    ],
)
def test_locate(step, phases, expected):
    assert locate(step, phases) == expected


def test_locate_visits_every_update_once():
    phases = [4, 0, 1, 7]
    found = [locate(step, phases) for step in range(sum(phases))]
    assert found == [(index, step) for index, steps in enumerate(phases) for step in range(steps)]


@pytest.mark.parametrize(
    ("step", "phases", "message"),
    [
        (6, [3, 2], "0..5 .* got 6"),
        (-1, [3], "got -1"),
        (0, [], "at least one step"),
        (0, [2, -1], "steps >= 0"),
    ],
)
def test_locate_refuses(step, phases, message):
    with pytest.raises(ValueError, match=message):
        locate(step, phases)
