"""How a text came about, call by call: recorded, and as one page that shows it.

A frame holds what its step changed, position by position. Given text stands as it is at the first
of its positions, and a character of several tokens at the last of them, so that the texts of all
positions make the text.
"""

from __future__ import annotations

import colorsys
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING

from fsdfm.generate.attempt import Attempt
from fsdfm.generate.job import Job
from fsdfm.generate.layout import CONTEXT_SHOWN, Layout, piece_text
from fsdfm.generate.request import Result
from fsdfm.generate.template import Fixed
from fsdfm.text.tokenizer import DOCUMENT_SEPARATOR, HALF

if TYPE_CHECKING:
    from fsdfm.generate.generator import Generator

GIVEN, HOLE, NOISE = -1, -2, 0
"""What a position is that no call has drawn; else the number of the call, from 1."""
LONGEST_CHARACTER = 4
"""Tokens, where each is a byte."""
FIRST_HUE, LAST_HUE = 225, 10
"""Of the first call and the last, in degrees."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A position as it is shown."""

    text: str
    call: int
    """The one that drew it last, or GIVEN, HOLE or NOISE."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A text after a step."""

    step: int
    steps: int
    """In all, as far as it was known."""
    calls: int
    seconds: float
    changed: dict[int, Cell]
    """Positions that are not as in the frame before."""


@dataclass(frozen=True, slots=True)
class Trace:
    """How a text came about; the last frame is the result."""

    frames: list[Frame]
    result: Result

    def states(self) -> list[list[Cell]]:
        """Every position of every frame."""
        found: list[list[Cell]] = []
        now = [Cell("", HOLE)] * (1 + max(self.frames[0].changed, default=-1))
        for frame in self.frames:
            now = list(now)
            for place, cell in frame.changed.items():
                now[place] = cell
            found.append(now)
        return found


@dataclass(eq=False, slots=True)
class _Kept:
    """What was recorded of one text."""

    layout: Layout
    cells: list[Cell] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    since: int = 0
    """Where its window began."""

    def add(self, cells: list[Cell], figures: tuple[int, int, int, float]) -> None:
        changed = {
            place: cell
            for place, cell in enumerate(cells)
            if place >= len(self.cells) or cell != self.cells[place]
        }
        self.frames.append(Frame(*figures, changed))
        self.cells = cells


class Recorder:
    """Notes a request while it is written; for `fsdfm.generate.watch.watch`.

    Args:
        generator: the model.
    """

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self._kept: dict[int, _Kept] = {}

    def see(self, job: Job, seconds: float) -> None:
        """Note a job as it stands."""
        for attempt in job.attempts:
            kept = self._kept.setdefault(attempt.seed, _Kept(attempt.layout))
            track, (step, steps) = attempt.track, attempt.planned
            if kept.frames and step == kept.frames[-1].step:
                continue
            calls = attempt.calls + (0 if track is None else track.calls)
            since = min(kept.since, attempt.window[0])  # a window may have ended, too
            cells = _cells(self.generator, attempt, kept.cells, since)
            kept.since = attempt.window[0]
            kept.add(cells, (step, steps, calls, seconds))

    def trace(self, result: Result) -> Trace:
        """What was noted of the text that became the result."""
        kept = self._kept[result.seed]
        last = kept.frames[-1]
        figures = last.step, last.step, last.calls, result.seconds
        kept.add(_closed(kept.layout, kept.cells, result), figures)
        *before, last, closing = kept.frames
        return Trace([*before, Frame(*figures, last.changed | closing.changed)], result)


def _cells(generator: Generator, attempt: Attempt, before: list[Cell], since: int) -> list[Cell]:
    """The positions of a text as they stand; those before some position are as they were."""
    ids, moved = attempt.now(generator.config.vocab_size), attempt.moved()
    found: list[Cell] = []
    for piece, (first, last) in zip(attempt.layout.pieces, attempt.layout.places(), strict=True):
        if isinstance(piece, Fixed):
            found += [Cell(piece.text, GIVEN), *[Cell("", GIVEN)] * (last - first - 1)]
            continue
        begin = min(max(first, since), last)
        while begin > first and before[begin - 1].text == "":
            begin -= 1  # of a character of several tokens
        found += before[first:begin]
        texts = _texts(generator, ids[max(0, begin - CONTEXT_SHOWN) : begin], ids[begin:last])
        for place, text in enumerate(texts, start=begin):
            call = moved[place]
            if call == 0:
                call = HOLE if ids[place] >= generator.config.vocab_size else NOISE
                call = GIVEN if call == NOISE and not bool(attempt.fresh[place]) else call
            found.append(Cell(text, call))
    return found


def _texts(generator: Generator, before: Sequence[int], ids: Sequence[int]) -> list[str]:
    """What each of some tokens adds to the text; a character is the last of its tokens'."""
    eos, mask = generator.tokenizer.eos_id, generator.tokenizer.vocab_size
    texts, context, group = [""] * len(ids), list(before), list[int]()
    for place, token in enumerate(ids):
        if token == eos or token >= mask:
            texts[place] = DOCUMENT_SEPARATOR if token == eos else ""
            context = [*context, token][-CONTEXT_SHOWN:] if token == eos else context
            continue
        group.append(token)
        text = piece_text(context, group, generator)
        whole = place + 1 == len(ids) or ids[place + 1] == eos or ids[place + 1] >= mask
        if whole or len(group) == LONGEST_CHARACTER or not text.endswith(HALF):
            texts[place] = text
            context, group = [*context, *group][-CONTEXT_SHOWN:], []
    return texts


def _closed(layout: Layout, cells: list[Cell], result: Result) -> list[Cell]:
    """Cells whose texts make the result's: cut at its end, and mended where they differ."""
    found, spans = list(cells), iter(result.spans)
    for piece, (first, last) in zip(layout.pieces, layout.places(), strict=True):
        if isinstance(piece, Fixed):
            continue
        begin, end = next(spans)
        left = result.text[begin:end]
        for place in range(first, last):
            text = cells[place].text
            if not left.startswith(text):  # documents without a text are not set apart
                text = "" if text == DOCUMENT_SEPARATOR else left[: len(text)]
            text = left if place == last - 1 else text
            found[place], left = Cell(text, cells[place].call), left[len(text) :]
    return found


def warmth(call: int, total: int, lightness: float) -> tuple[int, int, int]:
    """Red, green and blue of a call, from 0 to 255: blue is the first, red the last."""
    share = (call - 1) / (total - 1) if total > 1 else 0.0
    hue = (FIRST_HUE + (LAST_HUE - FIRST_HUE) * min(share, 1.0)) / 360.0
    red, green, blue = (round(255 * x) for x in colorsys.hls_to_rgb(hue, lightness, 0.7))
    return red, green, blue


def page(trace: Trace) -> str:
    """One page with a slider over the calls; it needs nothing from elsewhere."""
    last = trace.frames[-1]
    facts = {
        "calls": trace.result.calls,
        "steps": last.step,
        "tokens": trace.result.tokens,
        "seed": trace.result.seed,
        "finish": trace.result.finish,
        "frames": [
            {
                "step": frame.step,
                "calls": frame.calls,
                "seconds": round(frame.seconds, 3),
                "changed": [[place, c.text, c.call] for place, c in frame.changed.items()],
            }
            for frame in trace.frames
        ],
    }
    data = json.dumps(facts, ensure_ascii=False).replace("<", "\\u003c")
    template = with_look((resources.files("fsdfm.generate") / "trace.html").read_text("utf-8"))
    plain = html.escape(trace.result.text)
    before, after = template.split("/* the trace */ null")
    head, tail = before.split("<!-- the text -->")
    return f"{head}{plain}{tail}{data}{after}"


def with_look(template: str) -> str:
    """A page with the style and the script that pages of ours share."""
    files = resources.files("fsdfm.generate")
    for mark, name in (("/* look.css */", "look.css"), ("/* look.js */", "look.js")):
        template = template.replace(mark, (files / name).read_text("utf-8"))
    return template
