"""Many requests: results in order, and files of them that can be gone on with."""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from fsdfm.core.errors import DataError, FsdfmError
from fsdfm.core.files import one_line
from fsdfm.core.lock import locked
from fsdfm.core.progress import Progress
from fsdfm.generate.request import Request, Result
from fsdfm.generate.running import BATCH, Event, Running

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
        out: the results, as `Result.record` has them; gone on with, if it is there.
        defaults: fields of requests that do not say them.
        batch_size: sequences that share a call, at most.
        logprobs: whether results have their token ids and log-probabilities.
        refused: told of every line that cannot be done, in one sentence with its number.
        progress: told ("requests", done, in all), of those that have no result yet.

    Raises:
        DataError: a file that cannot be read or written, or results that are none.
        ConfigError: somebody else is writing the results.
    """
    lines = _lines(source)
    bad: list[int] = []

    def refuse(number: int, reason: object) -> None:
        bad.append(number)
        if refused is not None:
            refused(f"{source}, line {number}: {reason}")

    lock = Path(f"{out}.lock")
    with _writing(out), contextlib.ExitStack() as stack:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(lock, Path(out)))
        done = _finished(Path(out))
        asked = _requests(lines, defaults or {}, refuse)
        todo = [(line, request) for line, request in asked if line.id not in done]
        skipped, written = len(asked) - len(todo), 0
        file = stack.enter_context(open(out, "ab"))
        results = in_order(
            generator,
            todo,
            batch_size=batch_size,
            refused=lambda line, error: refuse(line.number, error),
        )
        for line, result in results:
            written += 1
            _append(file, replace(result, id=line.id).record(logprobs=logprobs))
            if progress is not None:
                progress("requests", written, len(todo))
    return Answered(written, skipped, len(bad))


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
        except ValueError as error:  # ours, or JSON's
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


def _finished(out: Path) -> set[str]:
    """Ids of the results that are there; a last line that was cut by a kill is cut off."""
    if not out.exists():
        return set()
    data = out.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(out, whole)
    found = set()
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
        try:
            found.add(json.loads(line)["id"])
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{out}, line {number} is no result of a request: give another place for results."
            ) from None
    return found
