"""`fsdfm generate`: texts in a pipe, one text while it settles in a terminal."""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from fsdfm.cli.asked import ELSEWHERE, REPEATED, asked, values
from fsdfm.cli.console import note, status, work, write
from fsdfm.cli.flags import Flags, parse
from fsdfm.core.errors import ConfigError, DataError, FsdfmError
from fsdfm.core.files import write_whole
from fsdfm.core.options import AT_LEAST_1, check, option
from fsdfm.core.workers import own_device
from fsdfm.generate.files import answer_file, in_order
from fsdfm.generate.generator import Generator
from fsdfm.generate.gif import gif, needs_pillow
from fsdfm.generate.live import printable, show
from fsdfm.generate.loading import load
from fsdfm.generate.precision import PRECISIONS
from fsdfm.generate.request import Request, Result
from fsdfm.generate.running import Running
from fsdfm.generate.trace import Recorder, page
from fsdfm.generate.watch import watch

SEPARATOR = "---"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Own:
    """What is not said to `Generator.answer`."""

    model: str | None = option(None, form="DIR", unset="the bundled model")
    """Model or run directory, or org/name on the Hugging Face Hub."""
    adapter: str | None = option(None, form="DIR", unset="none")
    """Run directory of a training with lora, whose weights are added to those of the model."""
    prompt_file: str | None = option(None, form="FILE", unset="none; - for standard input")
    """File with the prompt, in UTF-8; one line end at its end is left out."""
    edit: str | None = option(None, form="FILE", unset="none; - for standard input")
    """File of which a span is written anew; the rest is kept to the byte."""
    span: str | None = option(None, form="A:B", unset="none")
    """Characters of the file to edit that are written anew, from A up to B."""
    initial: str | None = option(None, form="FILE", unset="none; - for standard input")
    """File with a draft of the text, of which a share (see strength) is written anew."""
    requests: str | None = option(None, form="FILE", unset="none")
    """File with a request a line, as JSON; other flags say what its lines leave open."""
    out: str | None = option(None, form="FILE", unset="standard output")
    """File for the text, or for the results of requests; those that it has are not done again."""
    trace: str | None = option(None, form="FILE.html", unset="none")
    """Page that shows how the text came about, with a slider over the calls; of one text."""
    gif: str | None = option(None, form="FILE.gif", unset="none")
    """The same as a picture that moves; needs Pillow."""
    num_samples: int = option(1, within=AT_LEAST_1)
    """Texts to generate; each takes the next seed."""
    batch_size: int = option(1, within=AT_LEAST_1)
    """Texts made together; more than 1 pays on a GPU, and for short texts."""
    device: str | None = option(None, form="DEVICE", unset="cuda, else mps, else cpu")
    """cpu, cuda, cuda:N or mps."""
    precision: str | None = option(None, choices=PRECISIONS, unset="bfloat16 where it is fast")
    """Of the matrix products; int8 is faster for large models on CPUs with AVX512-VNNI or AMX."""
    json: bool = False
    """Print one JSON object per text: text, tokens, nfe, seed, seconds, tokens_per_second, spans,
    finish."""
    logprobs: bool = False
    """With JSON, also token_ids and logprobs."""

    def __post_init__(self) -> None:
        check(self)


ABOUT = "Generate text. In a terminal, one text is shown while it settles."


def run(argv: Sequence[str]) -> None:
    """Print texts; live in a terminal."""
    flags = Flags(of=Request, without=ELSEWHERE, repeated=REPEATED)
    request, given = parse("generate", ABOUT, argv, flags, Flags(of=_Own))
    own = _Own(**given)
    if own.logprobs and not own.json and own.requests is None:
        raise ConfigError("logprobs are told in JSON: give json too.", "logprobs", "json")
    fields = values(request, own)
    if own.requests is not None:
        _batch(fields, own)
        return
    wanted = list(asked(fields, own.num_samples))
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


def _load(own: _Own) -> Generator:
    with status("Loading the model"):
        return load(
            own.model,
            adapter=own.adapter,
            device=own_device(own.device),
            precision=own.precision,
        )


def _fail(_: Any, error: FsdfmError) -> None:
    raise error


def _shown(result: Result, number: int, own: _Own) -> str:
    if own.json:
        return json.dumps(result.record(logprobs=own.logprobs), ensure_ascii=False) + "\n"
    text = result.text if own.edit is not None else f"{result.text}\n"
    return f"{SEPARATOR}\n{text}" if number else text


def _watched(wanted: list[tuple[int, Request]], own: _Own) -> None:
    """One text, and how it came about in files; a file that cannot be written loses no text.

    Raises:
        ConfigError: several texts, or no Pillow for a GIF.
    """
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
        write_whole(own.out, text)
    else:
        write(printable(text) if terminal.is_terminal and not own.json else text)
    if own.trace is not None:
        write_whole(own.trace, page(trace))
    if own.gif is not None:
        write_whole(own.gif, gif(trace))


def _into(generator: Generator, wanted: list[tuple[int, Request]], own: _Own) -> None:
    """Texts into a file, whole."""
    found = in_order(generator, wanted, batch_size=own.batch_size, refused=_fail)
    assert own.out is not None
    write_whole(own.out, "".join(_shown(result, number, own) for number, result in found))


def _batch(found: dict[str, Any], own: _Own) -> None:
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


def _on_terminal(
    generator: Generator, wanted: list[tuple[int, Request]], own: _Own, terminal: Console
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
