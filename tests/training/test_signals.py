"""Signals: at once outside a held stretch, waiting inside it, the second one ends the process."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.helpers import ROOT
from training.signals import HANDLED, Interrupted, Signals


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # handlers of this process run between two instructions of the interpreter


@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_interrupts_at_once(number):
    with pytest.raises(Interrupted) as caught, Signals(advice="run_dir goes on"):
        send(number)
    assert caught.value.number == number
    assert caught.value.exit_code == (130 if number == signal.SIGINT else 143)
    assert str(caught.value) == f"stopped by {number.name}; run_dir goes on"


def test_an_interruption_is_no_error_that_a_sink_may_swallow():
    assert not issubclass(Interrupted, Exception)


def test_a_held_stretch_ends_in_its_own_time():
    with Signals() as signals, pytest.raises(Interrupted), signals.held():
        assert signals.received is None
        send(signal.SIGTERM)
        assert signals.received == signal.SIGTERM


def test_what_waited_strikes_where_it_may_and_so_does_what_comes_there():
    with Signals() as signals, pytest.raises(Interrupted), signals.held():
        send(signal.SIGUSR1)
        with signals.released():
            raise AssertionError("not reached")
    with Signals() as signals, pytest.raises(Interrupted), signals.held():
        with pytest.raises(Interrupted), signals.released():
            send(signal.SIGUSR1)
            raise AssertionError("not reached")
        assert signals.received == signal.SIGUSR1


def test_after_a_released_stretch_signals_wait_again():
    with Signals() as signals, pytest.raises(Interrupted), signals.held():
        with signals.released():
            pass
        send(signal.SIGUSR2)
        assert signals.received == signal.SIGUSR2


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in HANDLED]
    with Signals():
        assert [signal.getsignal(number) for number in HANDLED] != before
    assert [signal.getsignal(number) for number in HANDLED] == before


def test_outside_the_main_thread_nothing_is_installed():
    before = [signal.getsignal(number) for number in HANDLED]
    during = []

    def enter():
        with Signals():
            during.extend(signal.getsignal(number) for number in HANDLED)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert during == before


TWICE = """
import contextlib, os, signal, sys, time
from training.signals import Interrupted, Signals
first, second = (signal.Signals[name] for name in sys.argv[1:])
abort = lambda name: print("abort", name, flush=True)
with contextlib.suppress(Interrupted), Signals(on_abort=abort) as signals, signals.held():
    for number in (first, second):
        os.kill(os.getpid(), number)
        time.sleep(0.01)
    print("still here", flush=True)
"""


@pytest.mark.fault(12)
@pytest.mark.parametrize(
    ("first", "second", "code", "out"),
    [("SIGTERM", "SIGTERM", 143, "abort SIGTERM\n"), ("SIGTERM", "SIGINT", 130, "abort SIGINT\n")],
)
def test_the_second_signal_ends_the_process(first, second, code, out):
    command = [sys.executable, "-c", TWICE, first, second]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, "")
