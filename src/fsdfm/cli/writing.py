"""What `fsdfm generate` does once its flags are read."""

from __future__ import annotations

import contextlib
import json
from collections import deque
from pathlib import Path
from typing import Any

from rich.console import Console

from fsdfm.cli.console import note, status, work, write
from fsdfm.cli.generate import Own
from fsdfm.core.errors import ConfigError, DataError, FsdfmError
from fsdfm.core.files import write_whole
from fsdfm.core.workers import own_device
from fsdfm.generate.files import answer_file, in_order
from fsdfm.generate.generator import Generator
from fsdfm.generate.gif import gif, needs_pillow
from fsdfm.generate.live import printable, show
from fsdfm.generate.loading import load
from fsdfm.generate.request import Request, Result
from fsdfm.generate.running import Running
from fsdfm.generate.trace import Recorder, page
from fsdfm.generate.watch import watch

SEPARATOR = "---"


def texts(wanted: list[tuple[int, Request]], own: Own) -> None:
    """Texts to where they are wanted: a terminal, a pipe, a file, or pictures beside.

    Args:
        wanted: (its number, request) of each.
        own: where from and where to.
    """
    if own.trace is not None or own.gif is not None:
        _watched(wanted, own)
        return
    generator = _load(own)
    if own.out is not None:
        _into(generator, wanted, own)
        return
    terminal = Console()
    first, context = wanted[0][1], generator.config.context_length
    if len(wanted) == first.best_of == 1 and (first.length or 0) > context and not own.json:
        _stream(generator, first, terminal)
        return
    if terminal.is_terminal and not terminal.is_dumb_terminal and not own.json:
        _on_terminal(generator, wanted, own, terminal)
        return
    found = in_order(generator, wanted, batch_size=own.batch_size, refused=_fail)
    for number, result in found:
        write(_shown(result, number, own))


def batch(found: dict[str, Any], own: Own) -> None:
    """A file of requests into a file of results.

    Raises:
        ConfigError: no place for the results.
        DataError: a line that could not be done; the others were.
    """
    if own.out is None or own.requests is None:
        raise ConfigError("requests needs a file for the results: give out.", "requests", "out")
    if own.trace is not None or own.gif is not None:
        name = "trace" if own.trace is not None else "gif"
        raise ConfigError(f"{name} is of one text: leave requests out.", name, "requests")
    if own.num_samples > 1:
        raise ConfigError("num_samples is 1 for each of requests: leave it out.", "num_samples")
    Request.from_dict(found)
    generator = _load(own)
    with work("requests") as progress:
        done = answer_file(
            generator,
            own.requests,
            own.out,
            defaults=found,
            batch_size=own.batch_size,
            logprobs=own.logprobs,
            refused=note,
            progress=progress,
        )
    if done.rank:
        return
    there = f", {done.found:,} were there" if done.found else ""
    note(f"{done.written:,} results written to {own.out}{there}")
    if done.refused:
        raise DataError(
            f"{done.refused} of the lines of {own.requests} could not be done (see above): mend "
            "them and run the same command again; the others are not done twice."
        )


def _load(own: Own) -> Generator:
    with status("Loading the model"):
        return load(
            own.model,
            adapter=own.adapter,
            device=own_device(own.device),
            precision=own.precision,
        )


def _fail(_: Any, error: FsdfmError) -> None:
    raise error


def _shown(result: Result, number: int, own: Own) -> str:
    if own.json:
        return json.dumps(result.record(logprobs=own.logprobs), ensure_ascii=False) + "\n"
    text = result.text if own.edit is not None else f"{result.text}\n"
    return f"{SEPARATOR}\n{text}" if number else text


def _watched(wanted: list[tuple[int, Request]], own: Own) -> None:
    """One text, and how it came about in files; a file that cannot be written loses no text.

    Raises:
        ConfigError: several texts, or no Pillow for a GIF.
    """
    places = [Path(each).resolve() for each in (own.out, own.trace, own.gif) if each is not None]
    if len(set(places)) < len(places):
        raise ConfigError("out, trace and gif are one file: name another.", "out", "trace", "gif")
    if len(wanted) > 1:
        name = "trace" if own.trace is not None else "gif"
        raise ConfigError(f"{name} is of one text: leave num_samples out.", name, "num_samples")
    if own.gif is not None:
        needs_pillow()
    generator, terminal, done = _load(own), Console(), list[Result]()
    recorder = Recorder(generator)
    snapshots = watch(generator, wanted[0][1], done, recorder.see)
    if terminal.is_terminal and not terminal.is_dumb_terminal and not own.json:
        show(snapshots, terminal)
    else:
        with status("Generating"):
            deque(snapshots, maxlen=0)
    trace = recorder.trace(done[0])
    text = _shown(done[0], 0, own)
    if own.out is not None:
        _keep(text, own.out)
    else:
        write(printable(text) if terminal.is_terminal and not own.json else text)
    if own.trace is not None:
        write_whole(own.trace, page(trace))
    if own.gif is not None:
        write_whole(own.gif, gif(trace))


def _into(generator: Generator, wanted: list[tuple[int, Request]], own: Own) -> None:
    """Texts into a file, whole."""
    found = in_order(generator, wanted, batch_size=own.batch_size, refused=_fail)
    assert own.out is not None
    _keep("".join(_shown(result, number, own) for number, result in found), own.out)


def _keep(text: str, out: str) -> None:
    """Into a file; if it cannot be written, to stdout, and then the error."""
    try:
        write_whole(out, text)
    except FsdfmError:
        write(text)
        raise


def _on_terminal(
    generator: Generator, wanted: list[tuple[int, Request]], own: Own, terminal: Console
) -> None:
    if len(wanted) == 1:
        done: list[Result] = []
        show(watch(generator, wanted[0][1], done), terminal)
        write(printable(done[0].text) + "\n")
        note(_cost(done[0]))
        return
    with status(f"Generating {len(wanted)} texts"):
        found = in_order(generator, wanted, batch_size=own.batch_size, refused=_fail)
        for number, result in found:
            write((f"{SEPARATOR}\n" if number else "") + printable(result.text) + "\n")
            note(_cost(result))


def _cost(result: Result) -> str:
    rate = result.tokens / result.seconds if result.seconds else 0.0
    return (
        f"{result.tokens:,} tokens in {result.calls} model calls, {result.seconds:.2f} s, "
        f"{rate:,.0f} tokens/s, seed {result.seed}"
    )


def _stream(generator: Generator, request: Request, terminal: Console) -> None:
    """A text longer than the context, each window as soon as it is written."""
    running = Running(generator)
    ticket, shown = running.admit(request), ""
    bar = contextlib.nullcontext(None) if terminal.is_terminal else work("steps")
    clean = printable if terminal.is_terminal else str
    with bar as progress:
        while len(running):
            for event in running.step():
                last = event.result
                text = running.settled(ticket) if last is None else last.text
                write(clean(text[len(shown) :]))
                shown = text
                if progress is not None:
                    progress("steps", event.step, event.total)
    write("\n")
    if last is not None:
        note(_cost(last))
