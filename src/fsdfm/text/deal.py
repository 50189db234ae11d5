"""Which documents are kept, how often, and which of them are held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import numpy as np

from fsdfm.core.errors import DataError
from fsdfm.core.files import digest
from fsdfm.core.progress import Progress
from fsdfm.text.corpus import Advance
from fsdfm.text.settings import PrepareSettings
from fsdfm.text.sources import Source

DIGEST_BYTES = 8
"""Of a text, to know it again: among 1e8 texts two differ and agree in it with chance 3e-4."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a document, and the split that it belongs to."""

    text: str
    ends: bool
    """Whether the document ends with it."""
    held_out: bool

    @property
    def units(self) -> int:
        """Its characters, and one for the end of a document."""
        return len(self.text) + self.ends


@dataclass(slots=True)
class Dropped:
    """How many documents were left out, and why."""

    blank: int = 0
    short: int = 0
    duplicates: int = 0


Counter = Callable[[str], Advance | None]
"""A phase of the work -> who is told of bytes that are read in it."""


def counter(sources: Sequence[Source], progress: Progress | None) -> Counter:
    """Tell progress of bytes read in all sources; each phase counts from 0."""

    def of(phase: str) -> Advance | None:
        if progress is None:
            return None
        total, done = sum(s.bytes * math.ceil(s.weight) for s in sources), 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(phase, done, total)

        return advance

    return of


@dataclass(frozen=True, slots=True)
class Deal:
    """Which text is held out: documents by chance, or the tail of it all."""

    sources: Sequence[Source]
    settings: PrepareSettings
    tail: int | None = None
    """Units before the tail that is held out; None where documents are held out by chance."""

    @classmethod
    def of(
        cls, sources: Sequence[Source], settings: PrepareSettings, advance: Advance | None
    ) -> Deal:
        """Deal by chance, or cut off a tail where chance would leave a split empty.

        Reads until both splits have a document.

        Raises:
            DataError: there is no text at all, or too little to hold some out.
        """
        chance, seen, units = cls(sources, settings), set[bool](), 0
        for piece in chance.pieces(advance):
            seen.add(piece.held_out)
            units += piece.units
            if len(seen) == 2:
                return chance
        if not units:
            raise DataError(
                "The files hold no text (white space only, or shorter than min_length): give some.",
                "min_length",
            )
        if any(source.weight != 1.0 for source in sources):
            raise DataError(
                "The sources have too few documents to hold some out beside weights: raise "
                "validation_fraction, or leave weights out.",
                "validation_fraction",
                "weights",
            )
        share = round(units * settings.validation_fraction)
        return cls(sources, settings, units - max(1, min(units // 2, share)))

    def pieces(self, advance: Advance | None, dropped: Dropped | None = None) -> Iterator[Piece]:
        """All that is kept, the same way each time.

        Args:
            advance: told of bytes read.
            dropped: counts what is not kept.
        """
        start = 0
        for document, held_out in self._documents(advance, dropped or Dropped()):
            for text, ends in _until_the_end(document):
                piece = Piece(text, ends, held_out)
                if self.tail is None:
                    yield piece
                else:
                    yield from _cut(piece, self.tail - start)
                    start += piece.units

    def training(self, advance: Advance | None) -> Iterator[str]:
        """The first of the text that training will see, for a tokenizer."""
        most = self.settings.tokenizer_bytes
        for piece in self.pieces(advance):
            if not piece.held_out:
                yield piece.text
                most -= len(piece.text.encode())
                if most <= 0:
                    return

    def _documents(
        self, advance: Advance | None, dropped: Dropped
    ) -> Iterator[tuple[Iterator[str], bool]]:
        """Documents in order, and whether each is held out; what is held out comes once."""
        settings = self.settings
        chance, sieve = np.random.default_rng(settings.seed), _Sieve(settings, dropped)
        for number, source in enumerate(self.sources):
            # Later turns deal as the first did: what was held out or dropped stays so.
            # No zero at the end of the words: it would add nothing, and make this `chance` again.
            share = np.random.default_rng([settings.seed, number, 1])
            before = chance.bit_generator.state
            turns, kept = math.ceil(source.weight), bytearray()
            for turn in range(turns):
                chance.bit_generator.state = before
                often = source.weight - turn
                for place, document in enumerate(source.documents(advance, settings.field)):
                    held_out = bool(chance.random() < settings.validation_fraction)
                    # Chosen before it is sieved: a text is no duplicate of one that is left out.
                    chosen = often >= 1.0 or share.random() < often
                    if turn == 0:
                        good = sieve.passed(document) if chosen else None
                        if turns > 1:
                            kept.append(good is not None)
                    else:
                        again = chosen and kept[place] and not held_out
                        good = document if again else None
                    if good is not None:
                        yield good, held_out


@dataclass(slots=True)
class _Sieve:
    """Leaves out documents that are blank, short or known."""

    settings: PrepareSettings
    dropped: Dropped
    seen: set[bytes] = field(default_factory=set)

    def passed(self, document: Iterator[str]) -> Iterator[str] | None:
        """The document, or None; one of several pieces is long, and not compared with others."""
        document = _unless_blank(document)
        first = list(islice(document, 2))
        if not first:
            self.dropped.blank += 1
            return None
        if len(first) == 1:
            (text,) = first
            if len(text) < self.settings.min_length:
                self.dropped.short += 1
                return None
            if self.settings.duplicates == "drop" and self._known(text):
                self.dropped.duplicates += 1
                return None
        return chain(first, document)

    def _known(self, text: str) -> bool:
        mark = bytes.fromhex(digest([text])[: 2 * DIGEST_BYTES])
        if mark in self.seen:
            return True
        self.seen.add(mark)
        return False


def _cut(piece: Piece, room: int) -> Iterator[Piece]:
    """The first `room` units of a piece for training, the others held out."""
    if room >= piece.units:
        yield replace(piece, held_out=False)
    elif room <= 0:
        yield replace(piece, held_out=True)
    else:
        yield Piece(piece.text[:room], False, False)
        yield Piece(piece.text[room:], piece.ends, True)


def _until_the_end(pieces: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """Each piece, and whether it is the last."""
    last: Any = None
    for piece in pieces:
        if last is not None:
            yield last, False
        last = piece
    if last is not None:
        yield last, True


def _unless_blank(document: Iterator[str]) -> Iterator[str]:
    """The pieces of a document, or none if they are all white space."""
    held: list[str] = []
    for piece in document:
        held.append(piece)
        if piece.strip():
            yield from held
            yield from document
            return
