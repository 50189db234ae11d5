"""What every command shows: text on stdout; spinners, bars and notes on stderr."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from fsdfm.core.errors import DataError
from fsdfm.core.files import one_line
from fsdfm.core.progress import Progress as Told

LINE_EVERY = 30.0
"""Seconds between two lines of progress, where there is no terminal."""


class Stopped(Exception):
    """Training was interrupted, saved its state and said so."""


def write(text: str) -> None:
    """Print to stdout, now."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_stdout()
        raise DataError(f"Cannot write the output: {one_line(error)}.") from None


def note(text: str) -> None:
    """A dim line on stderr, for people."""
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(text, style="dim")


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
    """A spinner on stderr; nothing where nobody watches."""
    console = Console(stderr=True)
    with console.status(text) if console.is_terminal else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def bars(titles: Mapping[str, str]) -> Iterator[Told]:
    """Progress bars on stderr, one for each phase, told (phase, bytes done, bytes in all)."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bars: dict[str, TaskID] = {}

        def advance(phase: str, done: int, total: int) -> None:
            if phase not in bars:
                bars[phase] = progress.add_task(titles.get(phase, phase))
            progress.update(bars[phase], completed=done, total=total)

        yield advance


@contextlib.contextmanager
def work(first: str) -> Iterator[Told]:
    """A bar on stderr, told (what was done, done, in all); lines without a terminal."""
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar, last = progress.add_task(first, total=None, rate=""), ""
        started = said = time.monotonic()

        def advance(label: str, done: int, total: int) -> None:
            nonlocal last, said
            now = time.monotonic()
            rate = _rate(done, now - started)
            progress.update(bar, description=label, completed=done, total=total, rate=rate)
            due = label != last or now - said >= LINE_EVERY or done == total > 1
            if not console.is_terminal and due:
                left = (now - started) / done * (total - done)
                console.print(f"{label}  {done}/{total}  {rate}  ETA {left / 60:.1f} min")
                said = now
            last = label

        yield advance


def _rate(done: int, seconds: float) -> str:
    """So many a second, or a minute where they are slow."""
    each = done / max(seconds, 1e-9)
    return f"{each:.1f}/s" if each >= 1.0 else f"{60.0 * each:.1f}/min"


def use_utf8(stream: Any) -> None:
    """What is piped on is UTF-8; a terminal gets its own encoding, with what it lacks replaced."""
    if not isinstance(stream, io.TextIOWrapper):
        return
    if stream.isatty():
        stream.reconfigure(errors="replace")
    else:
        stream.reconfigure(encoding="utf-8", errors="surrogateescape")  # names that are not UTF-8


def discard_stdout() -> None:
    """Let the interpreter's own last flush succeed."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
