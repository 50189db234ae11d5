"""A request while it is written, as the live view shows it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fsdfm.generate.job import Job
from fsdfm.generate.request import Request, Result
from fsdfm.generate.results import Snapshot
from fsdfm.generate.running import Running

if TYPE_CHECKING:
    from fsdfm.generate.generator import Generator


def watch(generator: Generator, request: Request, done: list[Result]) -> Iterator[Snapshot]:
    """Snapshots of a request: what it starts from, then after every step.

    Args:
        generator: the model.
        request: what is wanted; of several texts the first is shown.
        done: gets the result.

    Raises:
        ConfigError: the model cannot do it; at once, and not at the first snapshot.
    """
    running = Running(generator)
    return _snapshots(generator, running, running.job(running.admit(request)), done)


def _snapshots(
    generator: Generator, running: Running, job: Job, done: list[Result]
) -> Iterator[Snapshot]:
    began, shown = time.perf_counter(), -1
    while True:
        if job.attempts and (step := job.attempts[0].planned[0]) > shown:
            shown = step
            yield snapshot(generator, job, time.perf_counter() - began)
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
    )
