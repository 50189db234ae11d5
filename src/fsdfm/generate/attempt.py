"""One text of a request on its way: all of it, of which a window at a time is written.

Shapes: L positions of the text, V data tokens.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fsdfm.flow.controls import Bans
from fsdfm.generate.layout import CONTEXT_SHOWN, Composed, Layout, piece_text
from fsdfm.generate.template import Gap
from fsdfm.generate.track import Track
from fsdfm.generate.words import Place

if TYPE_CHECKING:
    from fsdfm.generate.generator import Generator

OVERLAP = 4
"""A window starts with the last 1 / OVERLAP of a context that the one before has written."""


def windows(length: int, context: int) -> Iterator[tuple[int, int]]:
    """First and last-but-one position of each window of a text.

    Args:
        length: of the text, tokens.
        context: of the model, tokens.

    Yields:
        (0, length), if it fits; else windows of the context, and what is left at the end, each
        from a quarter of a context before the end of the one before.
    """
    first, last = 0, min(context, length)
    yield first, last
    while last < length:
        first = last - max(1, context // OVERLAP)
        last = min(first + context, length)
        yield first, last


@dataclass(eq=False, slots=True)
class Attempt:
    """A text on its way."""

    seed: int
    layout: Layout
    places: list[Place]
    """Of required phrases."""
    noise: torch.Generator
    x: Tensor
    """Of the windows that are done, the tokens; else what they start from. int64, shape (L,)."""
    free: Tensor
    """Positions that no window has written, bool, shape (L,)."""
    bans: Bans | None
    upto: int = 0
    """Positions before it are done."""
    ended: bool = False
    """Whether the text ends before its last position."""
    calls: int = 0
    steps: int = 0
    window: tuple[int, int] = (0, 0)
    track: Track | None = None
    fresh: Tensor = field(init=False)
    """Positions that were to be written, bool, shape (L,)."""
    logprobs: Tensor = field(init=False)
    """See `Track`; float32, shape (L,)."""
    drawn_in: Tensor = field(init=False)
    """Of all its steps the one in which each was drawn last, see `Track`; int64, shape (L,)."""

    def __post_init__(self) -> None:
        self.fresh = self.free.clone()
        self.logprobs = torch.full(self.x.shape, math.nan)
        self.drawn_in = torch.zeros_like(self.x)

    @property
    def planned(self) -> tuple[int, int]:
        """Steps that are taken, of those that there are as far as is known."""
        if self.track is None:
            return self.steps, self.steps
        stride = max(1, self.window[1] - self.window[0])
        left = max(0, len(self.x) - self.window[1])
        each = len(self.track.times) - 1
        more = 0 if self.ended else -(-left // stride) * each
        return self.steps + self.track.step, self.steps + each + more

    @property
    def kept(self) -> int:
        """Positions before it hold what was given or drawn; see `upto` for those that stay."""
        if self.track is None:
            return self.upto
        waiting = (~self.track.settled).nonzero()[:1, 0].tolist()
        return self.window[0] + waiting[0] if waiting else self.window[1]

    def now(self, mask: int) -> list[int]:
        """The tokens with those of the window that is being written; a mask where none is yet."""
        x, hidden = self.x.clone(), self.free.clone()
        if self.track is not None:
            x[slice(*self.window)] = self.track.x
            hidden[slice(*self.window)] = False
        return x.masked_fill(hidden, mask).tolist()

    def moved(self) -> list[int]:
        """Step in which each position was drawn last, with those of the window; 0 if it was not."""
        drawn_in = self.drawn_in.clone()
        if self.track is not None:
            part = slice(*self.window)
            drawn_in[part] = _later(self.track.drawn_in, self.steps, drawn_in[part])
        return drawn_in.tolist()

    def begin(self, window: tuple[int, int], track: Track) -> None:
        """Write a window."""
        self.window, self.track = window, track

    def finish(self) -> None:
        """The window is written."""
        assert self.track is not None
        self.take(self.track, self.window)
        self.calls, self.steps = self.calls + self.track.calls, self.steps + self.track.step
        self.free[slice(*self.window)] = False
        self.upto, self.track = self.window[1], None

    def take(self, track: Track, window: tuple[int, int]) -> None:
        """Keep what a track over a window has drawn."""
        part = slice(*window)
        self.x[part] = track.x
        drawn = ~track.logprobs.isnan()
        self.logprobs[part] = torch.where(drawn, track.logprobs, self.logprobs[part])
        self.drawn_in[part] = _later(track.drawn_in, self.steps, self.drawn_in[part])

    def ban(self, position: int, token: int, vocab_size: int) -> None:
        """Have a token no more at a position."""
        if self.bans is None:
            none = torch.full((len(self.x),), -1, dtype=torch.int64)
            self.bans = Bans(torch.zeros((1, vocab_size), dtype=torch.bool), none)
        self.bans = replace(self.bans, pairs=(*self.bans.pairs, (position, token)))

    def culprit(
        self, generator: Generator, composed: Composed, where: tuple[int, int]
    ) -> int | None:
        """The last position that was written, of those that make some characters of the text.

        Args:
            generator: whose tokenizer decodes.
            composed: the text.
            where: the characters, from the first up to the second.
        """
        ids, found = self.x.tolist(), None
        gaps = [
            place
            for piece, place in zip(self.layout.pieces, self.layout.places(), strict=True)
            if isinstance(piece, Gap)
        ]
        for (first, last), (begin, end) in zip(gaps, composed.spans, strict=True):
            if not (where[0] < end and where[1] > begin):
                continue
            before = ids[max(0, first - CONTEXT_SHOWN) : first]

            def reach(count: int, first: int = first, before: list[int] = before) -> int:
                """Characters of the gap's first tokens."""
                return len(piece_text(before, ids[first : first + count], generator))

            size = max(0, min(last, self.upto) - first)
            count = bisect_left(range(size), where[1] - begin, key=reach)
            while count > 0 and begin + reach(count) > where[0]:
                if self.fresh[first + count - 1]:
                    found = first + count - 1
                    break
                count -= 1
        return found


def _later(drawn_in: Tensor, steps: int, before: Tensor) -> Tensor:
    """Steps of a track, after so many of the text, where it has drawn; else those before."""
    return torch.where(drawn_in > 0, drawn_in + steps, before)
