"""One thread that writes the texts of all requests, as many at a time as can share a call.

Texts wait in a bounded queue. Between calls the thread gives up those that are cancelled or late,
and takes on those whose turn it is: the one that would be done first if it had started when it
came, so that a short text passes a long one, and a long one waits no longer than it takes itself.
Of those that were taken on, each call is of the one that has waited longest for one, with all that
can share it.

A text depends on its request and seed alone. So when a call fails, each of its texts begins again
on its own: the one that made it fail is told, the others are written as if nothing had been.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fsdfm.core.errors import ConfigError, FsdfmError
from fsdfm.generate.generator import Generator
from fsdfm.generate.job import Job
from fsdfm.generate.layout import LONGEST_DEFAULT, Composed, Layout
from fsdfm.generate.request import Request, Result
from fsdfm.generate.results import Snapshot
from fsdfm.generate.running import Event, Running
from fsdfm.generate.template import Fixed, Gap, parse
from fsdfm.generate.watch import snapshot
from fsdfm.serve.bugs import note_bug

log = logging.getLogger("fsdfm.serve")

LINGER = 0.004
"""Seconds that an idle thread waits for others before the first call."""
FIRST_PACE = 2e-4
"""Seconds a token and step, before any was measured."""
LONGEST_RETRY = 60
CHARACTERS = 4
"""Of a token, for a guess."""


class Refused(Exception):
    """A request that is not taken on, or not finished.

    Args:
        status: of HTTP.
        message: one line.
        retry_after: seconds until it may be tried again.
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


@dataclass(frozen=True, slots=True)
class Begun:
    """A text was taken on."""

    index: int
    given: int
    """Tokens that are given of it."""


@dataclass(frozen=True, slots=True)
class Moved:
    """A text after a call."""

    index: int
    step: int
    total: int
    settled: Composed
    draft: Composed | None
    """As it stands, for those who watch."""
    shot: Snapshot | None
    """The same by token, for those who want to see it."""


@dataclass(frozen=True, slots=True)
class Done:
    """A text is finished."""

    index: int
    result: Result
    draws: int
    """Groups of a call."""
    layout: Layout
    """Of the text; every gap has its length."""


Update = Begun | Moved | Done | FsdfmError | Refused


@dataclass(eq=False, slots=True)
class Submission:
    """What one client asked for at once."""

    model: str
    requests: Sequence[Request]
    tell: Callable[[Update], None]
    """Called from the batcher's thread; after an error there is nothing more."""
    deadline: float = float("inf")
    """Of `time.monotonic`."""
    watch: str = "result"
    """What is told: the result, also what is settled, or the draft, or its tokens too."""
    arrived: float = field(default_factory=time.monotonic)
    began: float | None = None
    """Its first call."""
    gone: bool = False
    """Nobody wants it any more."""


@dataclass(eq=False, slots=True)
class _Work:
    """One text of a submission."""

    of: Submission
    index: int
    request: Request
    cost: float
    """Tokens times steps."""
    job: Job | None = None
    """Once it is taken on."""
    told: bool = False
    """Whether it was said that it begins."""


@dataclass(eq=False, slots=True)
class _Lane:
    """Texts that may share calls."""

    generator: Generator
    running: Running
    works: dict[int, _Work] = field(default_factory=dict)


class Batcher:
    """Writes texts for many clients.

    Args:
        models: by name.
        batch_size: sequences that share a call, at most.
        queue: texts that wait or are written, at most; each of best_of is one.
        on_call: told of every call: seconds, and its texts.
    """

    def __init__(
        self,
        models: Mapping[str, Generator],
        *,
        batch_size: int,
        queue: int,
        on_call: Callable[[float, int], None] | None = None,
    ) -> None:
        self.models, self.batch_size, self.queue = dict(models), batch_size, queue
        self._on_call = on_call
        self._condition = threading.Condition()
        self._waiting: list[_Work] = []
        self._stopping = False
        self._shared = {name: self._lane(name) for name in self.models}
        self._alone: list[_Lane] = []
        self._turn = itertools.count()
        self._pace = FIRST_PACE
        self._thread = threading.Thread(target=self._run, name="fsdfm-batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Texts that have not begun; each of best_of is one."""
        return _texts(self._waiting)

    @property
    def running(self) -> int:
        """Texts that are being written; each of best_of is one."""
        return sum(_texts(lane.works.values()) for lane in self._lanes())

    @property
    def alive(self) -> bool:
        """Whether its thread works."""
        return self._thread.is_alive()

    def submit(self, submission: Submission) -> None:
        """Take a request into the queue.

        Raises:
            Refused: the queue is full, or the server stops.
        """
        found = [
            _Work(submission, index, request, self._cost(submission.model, request))
            for index, request in enumerate(submission.requests)
        ]
        with self._condition:
            if self._stopping:
                raise Refused(503, "The server is stopping: try another one.", LONGEST_RETRY)
            if self.waiting + self.running + _texts(found) > self.queue:
                raise Refused(429, "Too many requests wait already: come again.", self._retry())
            self._waiting += found
            self._condition.notify()

    def cancel(self, submission: Submission) -> None:
        """Nobody wants it any more; before the next call it is given up."""
        with self._condition:
            submission.gone = True
            self._condition.notify()

    def close(self, timeout: float | None = None) -> None:
        """Take nothing more, finish what was taken, and end the thread."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join(timeout)

    def _cost(self, model: str, request: Request) -> float:
        generator = self.models[model]
        context = generator.config.context_length
        length = request.length or min(LONGEST_DEFAULT, context)
        if given := request.template or request.text:
            pieces = parse(given) if request.template else [Fixed(given)]
            sizes = (
                p.high if isinstance(p, Gap) else 1 + len(p.text) // CHARACTERS for p in pieces
            )
            length = min(context, sum(sizes))
        steps = request.steps if isinstance(request.steps, int) else generator.defaults["steps"]
        return float(request.best_of * length * steps)

    def _retry(self) -> int:
        """Seconds until some of the queue is done."""
        cost = sum(work.cost for work in self._waiting) * self._pace
        return max(1, min(LONGEST_RETRY, round(cost / 2)))

    def _lane(self, model: str) -> _Lane:
        generator = self.models[model]
        return _Lane(generator, Running(generator, batch_size=self.batch_size, fair=True))

    def _run(self) -> None:
        while True:
            with self._condition:
                idle = not self.running
                while not (self._waiting or self.running or self._stopping):
                    self._condition.wait()
                if self._stopping and not (self._waiting or self.running):
                    return
            if idle:
                time.sleep(LINGER)
            try:
                self._round()
            except Exception as error:  # a bug of ours; the thread must live on
                note_bug("The batcher stumbled:", error)

    def _round(self) -> None:
        """Look at the queue, and make a call."""
        self._give_up()
        self._take_on()
        busy = [lane for lane in self._lanes() if lane.works]
        if busy:
            self._call(busy[next(self._turn) % len(busy)])
        self._alone = [lane for lane in self._alone if lane.works]

    def _give_up(self) -> None:
        """Leave what nobody wants, or what is late."""
        now = time.monotonic()
        with self._condition:
            everything = [work.of for work in self._waiting]
        everything += [w.of for lane in self._lanes() for w in lane.works.values()]
        for submission in {id(each): each for each in everything}.values():
            if not submission.gone and now > submission.deadline:
                self._fail(submission, Refused(504, "The deadline of the request has passed."))
        with self._condition:
            self._waiting = [work for work in self._waiting if not work.of.gone]
        for lane in self._lanes():
            for ticket in [t for t, work in lane.works.items() if work.of.gone]:
                del lane.works[ticket]
                lane.running.cancel(ticket)

    def _lanes(self) -> list[_Lane]:
        return [*self._shared.values(), *self._alone]

    def _take_on(self) -> None:
        """Begin those whose turn it is."""
        while True:
            with self._condition:
                if not self._waiting:
                    return
                work = min(self._waiting, key=lambda w: w.of.arrived + w.cost * self._pace)
                costs = [w.cost for lane in self._lanes() for w in lane.works.values()]
                if len(costs) >= 2 * self.batch_size and work.cost >= min(costs):
                    return
                self._waiting.remove(work)
            if not work.of.gone:
                self._begin(self._shared[work.of.model], work)

    def _begin(self, lane: _Lane, work: _Work) -> None:
        """Take a text on; in which case it is told, and else why not."""
        try:
            ticket = lane.running.admit(work.request)
        except FsdfmError as error:
            self._fail(work.of, error)
            return
        except Exception as error:
            note_bug("A request could not be begun:", error)
            self._fail(work.of, _bug())
            return
        lane.works[ticket], work.job = work, lane.running.job(ticket)
        if not work.told:
            layout = work.job.layout
            pairs = zip(layout.pieces, layout.ids, strict=True)
            given = sum(len(ids) for piece, ids in pairs if isinstance(piece, Fixed))
            work.told = True
            work.of.tell(Begun(work.index, given))

    def _call(self, lane: _Lane) -> None:
        """One call, and what it did."""
        began = time.monotonic()
        try:
            events = lane.running.step()
        except Exception as error:
            self._mend(lane, error)
            return
        seconds = time.monotonic() - began
        if self._on_call is not None:
            self._on_call(seconds, len(events))
        size = sum(lane.works[e.ticket].cost / max(1, e.total) for e in events)
        if size:
            self._pace += 0.1 * (seconds / size - self._pace)
        for event in events:
            work = lane.works[event.ticket]
            work.of.began = work.of.began or began
            try:
                self._tell(lane, work, event)
            except Exception as error:
                note_bug("A text could not be told:", error)
                self._fail(work.of, _bug())

    def _tell(self, lane: _Lane, work: _Work, event: Event) -> None:
        if event.result is not None:
            del lane.works[event.ticket]
            assert work.job is not None
            draws, layout = work.job.sampling.draws, work.job.attempts[0].layout
            work.of.tell(Done(work.index, event.result, draws, layout))
        elif work.of.watch != "result":
            job = lane.running.job(event.ticket)
            settled, seen = job.settled(), work.of.watch != "settled" and bool(job.attempts)
            draft = job.draft() if seen else None
            tokens = seen and work.of.watch == "tokens"
            shot = snapshot(lane.generator, job, 0.0) if tokens else None
            work.of.tell(Moved(work.index, event.step, event.total, settled, draft, shot))

    def _mend(self, lane: _Lane, error: Exception) -> None:
        """After a call that failed, each text begins again on its own."""
        works = list(lane.works.values())
        lane.works = {}
        lane.running = Running(lane.generator, batch_size=self.batch_size, fair=True)
        if len(works) == 1:
            self._fail(works[0].of, _told(error))
            return
        log.warning("A call of %d texts failed: each begins again on its own.", len(works))
        for work in works:
            self._alone.append(self._lane(work.of.model))
            self._begin(self._alone[-1], work)

    def _fail(self, submission: Submission, error: FsdfmError | Refused) -> None:
        """Tell an error, once, and leave the rest of the request."""
        if not submission.gone:
            submission.gone = True
            submission.tell(error)


def _texts(works: Iterable[_Work]) -> int:
    # A copy: the thread may change them meanwhile.
    return sum(work.request.best_of for work in list(works))


def _told(error: Exception) -> FsdfmError | Refused:
    """What is said of a call of one text that failed."""
    if isinstance(error, ConfigError) and "batch_size" in error.fields:
        return Refused(503, str(error))  # of memory: no client can set it
    if isinstance(error, FsdfmError):
        return error
    note_bug("A call failed:", error)
    return _bug()


def _bug() -> Refused:
    return Refused(500, "The server could not do this request; its log says why.")


def quiet(tell: Callable[[Any], object]) -> Callable[[Update], None]:
    """The same, where nobody may be left to be told."""

    def told(update: Update) -> None:
        try:
            tell(update)
        except RuntimeError:  # the event loop is closed
            log.debug("Nobody was left to be told.")

    return told
