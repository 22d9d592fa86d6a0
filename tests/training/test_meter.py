"""Sums of a logging interval: means per update, the pace, and what does not count as training time."""

import json

import pytest

from training import meter
from training.meter import Meter


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it: `clock.now += seconds`."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(meter.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_micro_batches_add_up_to_the_mean_of_a_step(clock):
    counter = Meter()
    for loss in (30.0, 50.0):
        counter.add({"loss": loss, "bpc": 2 * loss}, 20)
    counter.step(40)
    clock.now += 1
    metrics, _ = counter.report()
    assert metrics["train/loss"] == pytest.approx(80 / 40)
    assert metrics["train/bpc"] == pytest.approx(160 / 40)


def test_an_interval_is_the_mean_over_its_targets(clock):
    counter = Meter()
    for loss in (10.0, 20.0, 60.0):
        counter.add({"loss": loss}, 10)
        counter.step(10)
    clock.now += 2
    metrics, seconds = counter.report()
    assert metrics["train/loss"] == pytest.approx(3.0)
    assert metrics["perf/tokens_per_s"] == pytest.approx(15.0)
    assert metrics["perf/step_ms"] == pytest.approx(2000 / 3)
    assert seconds == pytest.approx(2.0)


def test_a_report_starts_the_next_interval(clock):
    counter = Meter()
    for loss, pause in ((4.0, 1.0), (8.0, 5.0)):
        counter.add({"loss": loss}, 2)
        counter.step(2)
        clock.now += pause
        metrics, seconds = counter.report()
        assert metrics["train/loss"] == pytest.approx(loss / 2)
        assert seconds == pytest.approx(pause)


def test_time_between_a_report_and_restart_is_not_training(clock):
    counter = Meter()
    counter.add({"loss": 1.0}, 1)
    counter.step(1)
    clock.now += 1
    counter.report()
    clock.now += 500  # an evaluation
    counter.restart()
    counter.add({"loss": 1.0}, 1)
    counter.step(30)
    clock.now += 3
    metrics, seconds = counter.report()
    assert seconds == pytest.approx(3.0)
    assert metrics["perf/tokens_per_s"] == pytest.approx(10.0)


def test_steps_before_an_evaluation_inside_an_interval_keep_their_time(clock):
    """eval_every need be no multiple of log_every: the interval is then cut in two, and both parts count."""
    counter = Meter()
    for _ in range(2):
        clock.now += 4  # a step
        counter.add({"loss": 1.0}, 20)
        counter.step(20)
        clock.now += 500  # an evaluation
        counter.restart()
    clock.now += 2
    counter.add({"loss": 1.0}, 20)
    counter.step(20)
    metrics, seconds = counter.report()
    assert seconds == pytest.approx(10.0)
    assert metrics["perf/tokens_per_s"] == pytest.approx(6.0)


def test_small_losses_are_not_lost_in_long_sums(clock):
    counter = Meter()
    counter.add({"loss": 2.0**24}, 1)
    for _ in range(100):
        counter.add({"loss": 0.5}, 1)
    counter.step(1)
    clock.now += 1
    assert counter.report()[0]["train/loss"] == (2**24 + 50) / 101


def test_an_interval_without_an_update_has_a_pace_and_no_mean(clock):
    counter = Meter()
    counter.step(10)
    clock.now += 2
    assert counter.report()[0] == {"perf/tokens_per_s": 5.0, "perf/step_ms": 2000.0}


def test_an_interval_goes_on_in_another_process_to_the_last_bit(clock):
    losses = [0.1, 1 / 3, 1e16, 2.0**-40, 7.7]
    straight, resumed = Meter(), Meter()
    for number, loss in enumerate(losses):
        for counter in (straight, resumed):
            counter.add({"loss": loss}, 3)
            counter.step(3)
        clock.now += 1
        if number == 2:
            state = json.loads(json.dumps(resumed.state_dict()))
            resumed = Meter()
            resumed.load_state_dict(state)
    assert resumed.report() == straight.report()
