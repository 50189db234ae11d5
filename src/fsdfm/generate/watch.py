"""A request while it is written, as the live view shows it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from fsdfm.generate.job import Job
from fsdfm.generate.request import Request, Result
from fsdfm.generate.results import Snapshot
from fsdfm.generate.running import Running

if TYPE_CHECKING:
    from fsdfm.generate.generator import Generator


Seen = Callable[[Job, float], None]
"""Told of a job as it stands, and of the seconds that it took."""


def watch(
    generator: Generator, request: Request, done: list[Result], seen: Seen | None = None
) -> Iterator[Snapshot]:
    """Snapshots of a request: what it starts from, then after every step.

    Args:
        generator: the model.
        request: what is wanted; of several texts the first is shown.
        done: gets the result.
        seen: told of every snapshot's job.

    Raises:
        ConfigError: the model cannot do it; at once, and not at the first snapshot.
    """
    running = Running(generator)
    return _snapshots(generator, running, running.job(running.admit(request)), done, seen)


def _snapshots(
    generator: Generator, running: Running, job: Job, done: list[Result], seen: Seen | None
) -> Iterator[Snapshot]:
    began, shown = time.perf_counter(), list[int]()
    while True:
        steps, seconds = [a.planned[0] for a in job.attempts], time.perf_counter() - began
        if seen is not None and steps != shown:
            seen(job, seconds)
        if steps[:1] != shown[:1]:
            yield snapshot(generator, job, seconds)
        shown = steps
        if not len(running):
            return
        done += [event.result for event in running.step() if event.result is not None]


def snapshot(generator: Generator, job: Job, seconds: float) -> Snapshot:
    """A job as it stands, once its texts are begun."""
    attempt = job.attempts[0]
    ids, frozen = attempt.now(generator.config.vocab_size), (~attempt.fresh).tolist()
    step, steps = attempt.planned
    track = attempt.track
    return Snapshot(
        step=step,
        steps=steps,
        calls=job.calls + attempt.calls + (0 if track is None else track.calls),
        seconds=seconds,
        tokens=len(frozen) - sum(frozen),
        frozen=frozen,
        token_ids=ids,
        text=job.draft().text,
        pieces=[generator.piece(i) for i in ids],
        moved=attempt.moved(),
    )
