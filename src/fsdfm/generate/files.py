"""Many requests: results in order, and files of them that can be gone on with."""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from fsdfm.core.errors import DataError, FsdfmError
from fsdfm.core.files import one_line
from fsdfm.core.lock import locked
from fsdfm.core.progress import Progress
from fsdfm.core.workers import Workers
from fsdfm.generate.options import BATCH
from fsdfm.generate.parts import PARQUET, Parts, check_kind, results
from fsdfm.generate.request import Request, Result
from fsdfm.generate.running import Event, Running

if TYPE_CHECKING:
    from fsdfm.generate.generator import Generator

T = TypeVar("T")
AHEAD = 4
"""Requests that are looked at together, as a multiple of the batch size."""


def in_order(
    generator: Generator,
    requests: Iterable[tuple[T, Request]],
    *,
    batch_size: int = BATCH,
    refused: Callable[[T, FsdfmError], None],
    on_event: Callable[[Running, Event], None] | None = None,
) -> Iterator[tuple[T, Result]]:
    """Answer any number of requests, a few at a time.

    Args:
        generator: the model.
        requests: each with a name; taken as they are needed.
        batch_size: sequences that share a call, at most.
        refused: told of a request that the model cannot do, which then has no result.
        on_event: told what every call did for every request.

    Yields:
        Names and results, in the order of the requests, as soon as that is known.
    """
    running, coming = Running(generator, batch_size=batch_size), iter(requests)
    order: deque[tuple[T, int]] = deque()
    results: dict[int, Result] = {}
    more = True
    while more or order:
        while more and len(order) < AHEAD * batch_size:
            found = next(coming, None)
            if found is None:
                more = False
                break
            try:
                order.append((found[0], running.admit(found[1])))
            except FsdfmError as error:
                refused(found[0], error)
        for event in running.step():
            if on_event is not None:
                on_event(running, event)
            if event.result is not None:
                results[event.ticket] = event.result
        while order and order[0][1] in results:
            name, ticket = order.popleft()
            yield name, results.pop(ticket)


@dataclass(frozen=True, slots=True)
class Answered:
    """What came of a file of requests."""

    written: int
    found: int
    """Those whose results were there."""
    refused: int
    """Lines that are no request, or one that cannot be done."""
    rank: int = 0
    """Of this process among those that share the file; the numbers are of all of them."""


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    id: str


def answer_file(
    generator: Generator,
    source: str | Path,
    out: str | Path,
    *,
    defaults: Mapping[str, Any] | None = None,
    batch_size: int = BATCH,
    logprobs: bool = False,
    refused: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Answered:
    """Answer a file of requests, one JSON object a line, into a file of results.

    Results are in the order of the requests and are written as soon as they are there. After a
    kill the same call goes on: what has a result is not done again.

    Args:
        generator: the model.
        source: the requests; one without an id is called by the number of its line.
        out: the results, as `Result.record` has them, as JSON lines or, by its name, .parquet; gone
            on with, if it is there. Under torchrun each process takes its share.
        defaults: fields of requests that do not say them.
        batch_size: sequences that share a call, at most.
        logprobs: whether results have their token ids and log-probabilities.
        refused: told of every line that cannot be done, in one sentence with its number.
        progress: told ("requests", done, in all), of those that have no result yet.

    Raises:
        DataError: a file that cannot be read or written, or results that are none.
        ConfigError: somebody else is writing the results.
    """
    lines, place = _lines(source), Path(out)
    check_kind(place)
    if place.exists() and place.samefile(source):
        raise DataError(f"{out} holds the requests: give another place for results.")
    with Workers.joined() as workers, _writing(out), contextlib.ExitStack() as stack:
        bad: list[int] = []

        def refuse(number: int, reason: object) -> None:
            bad.append(number)
            if refused is not None:
                refused(f"{source}, line {number}: {reason}")

        def nobody(number: int, reason: object) -> None:
            """Lines that are no request are told once."""

        asked = _requests(lines, defaults or {}, nobody if workers.rank else refuse)
        todo = stack.enter_context(_shared(asked, place, workers))

        def answers() -> Iterator[tuple[_Line, Result]]:
            return in_order(
                generator,
                todo.mine,
                batch_size=batch_size,
                refused=lambda line, error: refuse(line.number, error),
            )

        written = todo.write(answers(), progress, logprobs=logprobs)
        counts = workers.totals(written, len(bad))
    return Answered(counts[0], todo.found, counts[1], workers.rank)


@dataclass(frozen=True, slots=True)
class _Todo:
    """Requests that have no result yet, and where their results go.

    Results go straight into a file of JSON lines, where one process writes it. A parquet file, and
    one of several processes, is put together of parts.
    """

    workers: Workers
    file: Path
    parts: Parts | None
    order: list[str]
    """Ids of all requests."""
    found: int
    mine: list[tuple[_Line, Request]]
    """Those that this process answers."""

    def write(
        self,
        answers: Iterator[tuple[_Line, Result]],
        progress: Progress | None,
        *,
        logprobs: bool,
    ) -> int:
        """Write the results as they come; returns their number."""
        written = 0
        with open(self.file, "ab") as file:
            for line, result in answers:
                written += 1
                _append(file, replace(result, id=line.id).record(logprobs=logprobs))
                if progress is not None:
                    progress("requests", written, len(self.mine))
        self.workers.wait()
        if self.parts is not None and self.workers.rank == 0:
            self.parts.finish(self.order, logprobs=logprobs)
        self.workers.wait()
        return written


@contextlib.contextmanager
def _shared(asked: Sequence[tuple[_Line, Request]], out: Path, workers: Workers) -> Iterator[_Todo]:
    """This process's share of what has no result yet; while it lasts nobody else writes there."""
    parts = Parts(out)
    in_parts = workers.size > 1 or out.suffix == PARQUET or parts.directory.exists()
    file = parts.own(workers.rank) if in_parts else out
    file.parent.mkdir(parents=True, exist_ok=True)
    with locked(Path(f"{file if workers.rank else out}.lock"), out):
        done = parts.done() if in_parts else {record["id"] for record, _, _ in results(out)}
        workers.wait()  # all have seen the same, before anybody writes
        _cut(file)
        todo = [(line, request) for line, request in asked if line.id not in done]
        mine, order = todo[workers.rank :: workers.size], [line.id for line, _ in asked]
        found = len(asked) - len(todo)
        yield _Todo(workers, file, parts if in_parts else None, order, found, mine)


def _lines(source: str | Path) -> list[bytes]:
    try:
        lines = Path(source).read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"Cannot read {source}: {one_line(error)}.") from None
    if not any(line.strip() for line in lines):
        raise DataError(f"{source} is empty: give one request a line.")
    return lines


@contextlib.contextmanager
def _writing(out: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"Cannot write {out} ({one_line(error)}): free some space or choose another place, "
            "then run the same command again."
        ) from None


def _append(file: IO[bytes], record: Mapping[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    file.flush()


def _requests(
    lines: Iterable[bytes], defaults: Mapping[str, Any], refuse: Callable[[int, object], None]
) -> list[tuple[_Line, Request]]:
    """The requests of a file; lines that are none are refused."""
    found: dict[str, tuple[_Line, Request]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            if not isinstance(values, dict):
                raise DataError(f"a request is an object, got {type(values).__name__}.")
            request = Request.from_dict({**defaults, **values})
        except UnicodeDecodeError as error:
            refuse(number, f"not UTF-8 (byte {error.start}).")
        except (ValueError, RecursionError) as error:  # ours, or JSON's
            reason = error if isinstance(error, FsdfmError) else f"no JSON ({one_line(error)})."
            refuse(number, reason)
        except DataError as error:
            refuse(number, error)
        else:
            name = str(number) if request.id is None else request.id
            if name in found:
                refuse(number, f"id {name!r} is that of line {found[name][0].number} too.")
            else:
                found[name] = _Line(number, name), request
    return list(found.values())


def _cut(file: Path) -> None:
    """Cut off the last line of a file of results, where a kill has cut it already."""
    if not file.exists():
        return
    data = file.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(file, whole)
