"""What reaches a run from outside: the time it takes, and the signal to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from fsdfm.train.checkpoint import TrainState


class Clock:
    """Time spent on a run: in this session, and in all of them."""

    def __init__(self, state: TrainState[Any]) -> None:
        self.before, self.first_step = state.elapsed_seconds, state.step
        self.started = time.perf_counter()
        self.last = self.first_step, self.started

    def total(self) -> float:
        """Seconds of all sessions; work that was lost to a kill is not counted."""
        return self.before + time.perf_counter() - self.started

    def updates_per_second(self, step: int) -> float:
        """Since this was asked for last, validations and checkpoints included."""
        (before, since), now = self.last, time.perf_counter()
        self.last = step, now
        return (step - before) / (now - since)


@contextlib.contextmanager
def graceful_stop() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; a second one acts as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number: int, frame: object) -> None:
        event.set()
        restore()

    for number in previous:
        signal.signal(number, handle)
    try:
        yield event
    finally:
        restore()
