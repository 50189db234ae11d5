"""Requests on their way together: admitted, advanced and given up between calls of the network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fsdfm.core.errors import ConfigError, FsdfmError
from fsdfm.generate.job import Job
from fsdfm.generate.options import BATCH
from fsdfm.generate.request import Request, Result
from fsdfm.generate.track import Task, call

if TYPE_CHECKING:
    from fsdfm.generate.generator import Generator

OnStep = Callable[[int, int, list[str]], None]
"""(steps done, steps planned, the texts as they stand)."""
Cancelled = Callable[[int], bool]
"""Whether the request of this number is given up."""


@dataclass(frozen=True, slots=True)
class Event:
    """What a call did for a request."""

    ticket: int
    """Of the request, as `admit` gave it."""
    step: int
    """Steps that its texts have taken."""
    total: int
    """Steps that they are to take, as far as is known."""
    result: Result | None
    """Where it is done."""


class Running:
    """Requests that are being answered; each call advances some that can share it.

    A request's result does not depend on what else is running, but for the rounding of products of
    another size (with batch_size=1 there is none).

    Args:
        generator: the model.
        batch_size: sequences that share a call, at most.
        fair: whether requests take turns, as those of several people should; else each goes on
            until it is done, in the order of their admission.
    """

    def __init__(
        self, generator: Generator, *, batch_size: int = BATCH, fair: bool = False
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size must be a whole number >= 1, got {batch_size}.")
        self.generator, self.batch_size = generator, batch_size
        self.fair = fair
        self._tickets = itertools.count()
        self._jobs: dict[int, Job] = {}

    def __len__(self) -> int:
        """Requests that are not done."""
        return len(self._jobs)

    def admit(self, request: Request) -> int:
        """Take a request on; it joins the next call that it can.

        Returns:
            A ticket, which its events carry.

        Raises:
            ConfigError: this model cannot do it.
        """
        job = Job(self.generator, request)
        ticket = next(self._tickets)
        self._jobs[ticket] = job
        return ticket

    def cancel(self, ticket: int) -> Result:
        """Give a request up; what there is of it, with finish "cancelled".

        Raises:
            KeyError: it is done, or was never admitted.
        """
        return self._jobs.pop(ticket).cancelled()

    def job(self, ticket: int) -> Job:
        """A request on its way, for whoever wants to look at its tokens."""
        return self._jobs[ticket]

    def draft(self, ticket: int) -> str:
        """The text of a request as it stands; positions without a token are left out."""
        return self._jobs[ticket].draft().text

    def settled(self, ticket: int) -> str:
        """The beginning of a request's text that no later call changes."""
        return self._jobs[ticket].settled().text

    def step(self) -> list[Event]:
        """One call: of the request whose turn it is, and of what can join.

        Returns:
            What it did, of each request that took part.

        Raises:
            ConfigError: the device has not enough memory; requests stay as they were.
        """
        if not self._jobs:
            return []
        batch: list[tuple[int, Task]] = []
        key: Hashable = None
        for ticket, job in self._jobs.items():
            for task in job.waiting:
                key = task.key if key is None else key
                if task.key == key and len(batch) < self.batch_size:
                    batch.append((ticket, task))
        for ticket, _ in batch:
            self._jobs[ticket].started()
        try:
            call(self.generator, [task for _, task in batch])
        except torch.OutOfMemoryError:
            raise ConfigError(
                f"{self.generator.device} has not enough memory for {len(batch)} texts at a time: "
                "take a smaller batch_size or length, or the device cpu.",
                "batch_size",
                "length",
                "device",
            ) from None
        return [self._event(ticket) for ticket in dict.fromkeys(t for t, _ in batch)]

    def _event(self, ticket: int) -> Event:
        job = self._jobs[ticket]
        job.waiting = [task for task in job.waiting if not task.done]
        while not job.waiting and job.result is None:
            job.proceed()
        if job.result is not None or self.fair:
            del self._jobs[ticket]
        if job.result is None and self.fair:
            self._jobs[ticket] = job  # at the end: the others come first
        return Event(ticket, *job.planned, job.result)


def answer(
    generator: Generator,
    requests: Sequence[Request],
    *,
    batch_size: int = BATCH,
    on_step: OnStep | None = None,
    cancelled: Cancelled | None = None,
) -> list[Result]:
    """Results of requests of any kind; see `Generator.answer`."""
    running = Running(generator, batch_size=batch_size)
    tickets: list[int] = []
    for number, request in enumerate(requests):
        try:
            tickets.append(running.admit(request))
        except FsdfmError as error:
            where = f"Request {number + 1}: " if len(requests) > 1 else ""
            raise type(error)(f"{where}{error}", *error.fields) from None
    results: dict[int, Result] = {}
    plans: dict[int, tuple[int, int]] = {}
    while len(running):
        for ticket in tickets:
            if cancelled is not None and ticket not in results and cancelled(ticket):
                results[ticket] = running.cancel(ticket)
        for event in running.step():
            plans[event.ticket] = event.step, event.total
            if event.result is not None:
                results[event.ticket] = event.result
        if on_step is not None and plans:
            texts = [results[t].text if t in results else running.draft(t) for t in tickets]
            done, planned = (sum(each) for each in zip(*plans.values(), strict=True))
            on_step(done, planned, texts)
    return [results[ticket] for ticket in tickets]
