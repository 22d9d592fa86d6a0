"""Signals that end a run: the step in hand is finished and saved first, a second signal ends the process at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(BaseException):
    """A signal ends the run. Like KeyboardInterrupt no error of the work itself: `except Exception` lets it pass."""

    def __init__(self, number: signal.Signals, advice: str = ""):
        super().__init__(f"stopped by {number.name}" + (f"; {advice}" if advice else ""))
        self.number = number
        self.exit_code = exit_code(number)


class Signals:
    """Catches the signals of HANDLED while it is entered, in the main thread; elsewhere it does nothing.

    A signal raises Interrupted at once, inside `held` it waits: the code there looks at `received` when it has
    something whole to leave behind, and raises `interruption()`, whose message `advice` ends. The second one calls
    `on_abort(its name)` and ends the process without clean-up.
    """

    def __init__(self, on_abort: Callable[[str], None] = lambda name: None, advice: str = ""):
        self.received: signal.Signals | None = None
        self._on_abort, self._advice = on_abort, advice
        self._held = False
        self._former: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._handle) for number in HANDLED}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._former = {}

    def interruption(self) -> Interrupted:
        """What to raise for the signal received; another process may have got it, then it counts as SIGTERM."""
        return Interrupted(self.received or signal.SIGTERM, self._advice)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Signals wait in here until `received` is acted upon, or until the end."""
        with self._holding(True):
            yield
        if self.received is not None:
            raise self.interruption()

    @contextlib.contextmanager
    def released(self) -> Iterator[None]:
        """Inside `held`: a stretch that may be left anywhere, also by a signal that waits already."""
        if self.received is not None:
            raise self.interruption()
        with self._holding(False):
            yield

    @contextlib.contextmanager
    def _holding(self, held: bool) -> Iterator[None]:
        former, self._held = self._held, held
        try:
            yield
        finally:
            self._held = former

    def _handle(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if self.received is None:
            self.received = received
            if not self._held:
                raise self.interruption()
        else:
            self._on_abort(received.name)
            os._exit(exit_code(received))


def exit_code(number: signal.Signals) -> int:
    """130 after Ctrl-C, 143 after any other signal."""
    return 130 if number == signal.SIGINT else 143
