"""A request as tokens: what is given of them, what is to be written, and what may not be."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fsdfm.core.errors import ConfigError
from fsdfm.generate.request import Request
from fsdfm.generate.template import Fixed, Gap, Piece, parse
from fsdfm.text.tokenizer import DOCUMENT_SEPARATOR, Tokenizer

if TYPE_CHECKING:
    from fsdfm.generate.generator import Generator

LONGEST_DEFAULT = 1024
CONTEXT_SHOWN = 4
"""Tokens before a gap that are decoded with it: a tokenizer may treat the first of a text apart."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Pieces of a text in order, each with its tokens."""

    pieces: tuple[Piece, ...]
    ids: tuple[tuple[int, ...], ...]
    """Of the fixed pieces; of a gap its draft, or none."""
    least: int = 0
    """Tokens that the last gap has before the text may end."""

    @property
    def sizes(self) -> list[int]:
        """Tokens of each piece; every gap must have its length."""
        return [
            piece.low if isinstance(piece, Gap) else len(ids)
            for piece, ids in zip(self.pieces, self.ids, strict=True)
        ]

    @property
    def open(self) -> bool:
        """Whether the text ends in a gap."""
        return isinstance(self.pieces[-1], Gap)

    @property
    def shortest(self) -> int:
        """Tokens with every gap at its least."""
        return sum(self.sizes)

    def places(self) -> list[tuple[int, int]]:
        """First and last-but-one position of each piece."""
        edges, at = [], 0
        for size in self.sizes:
            edges.append((at, at + size))
            at += size
        return edges

    def most(self, number: int, context: int) -> int:
        """Tokens that the gap that is piece `number` may have while the text fits a context."""
        gap = self.pieces[number]
        assert isinstance(gap, Gap)
        return min(gap.high, gap.low + max(0, context - self.shortest))

    def with_length(self, number: int, length: int) -> Layout:
        """The same with the gap that is piece `number` at a length."""
        pieces = list(self.pieces)
        pieces[number] = Gap(length, length)
        return replace(self, pieces=tuple(pieces))

    def with_least(self, number: int, length: int) -> Layout:
        """The same with the gap that is piece `number` no shorter than a length."""
        gap = self.pieces[number]
        assert isinstance(gap, Gap)
        pieces = list(self.pieces)
        pieces[number] = Gap(max(gap.low, length), gap.high)
        return replace(self, pieces=tuple(pieces))

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Tokens, int64, shape (L,), 0 in gaps without a draft; and which are gaps', bool, (L,)."""
        ids: list[int] = []
        free: list[bool] = []
        for piece, given, size in zip(self.pieces, self.ids, self.sizes, strict=True):
            ids += given or [0] * size
            free += [isinstance(piece, Gap)] * size
        return torch.tensor(ids, dtype=torch.int64), torch.tensor(free)


def lay_out(request: Request, generator: Generator) -> Layout:
    """The pieces of a request; gaps may still be without a length.

    Raises:
        ConfigError: what is given does not fit the length or the model's context.
    """
    tokenizer, context = generator.tokenizer, generator.config.context_length
    if request.text is not None:
        layout = _rewritten(request, request.text, tokenizer)
    elif request.template is not None:
        layout = _encoded(parse(request.template), tokenizer)
    else:
        return _ends(request, tokenizer, context)
    if layout.shortest > context:
        name = "text" if request.template is None else "template"
        raise ConfigError(
            f"{name} has {layout.shortest} tokens, but this model's context is {context}: "
            "shorten it.",
            name,
        )
    return layout


def _encoded(pieces: Sequence[Piece], tokenizer: Tokenizer) -> Layout:
    ids = [tokenizer.encode(p.text) if isinstance(p, Fixed) else [] for p in pieces]
    return Layout(tuple(pieces), tuple(map(tuple, ids)))


def _rewritten(request: Request, text: str, tokenizer: Tokenizer) -> Layout:
    """The text around the span, and a gap with the span's tokens as its draft."""
    first, last = request.span or (0, len(text))
    draft = tokenizer.encode(text[first:last])
    before, after = text[:first], text[last:]
    layout = _encoded([Fixed(before), Gap(len(draft), len(draft)), Fixed(after)], tokenizer)
    given = (layout.ids[0], tuple(draft) if request.strength < 1.0 else (), layout.ids[2])
    kept = [(p, i) for p, i in zip(layout.pieces, given, strict=True) if p != Fixed("")]
    return Layout(tuple(p for p, _ in kept), tuple(i for _, i in kept))


def _ends(request: Request, tokenizer: Tokenizer, context: int) -> Layout:
    """A prompt, a gap and a suffix, either of which may be missing."""
    length = min(LONGEST_DEFAULT, context) if request.length is None else request.length
    texts = [Fixed(request.prompt or ""), Fixed(request.suffix or "")]
    prompt, suffix = (tokenizer.encode(fixed.text) for fixed in texts)
    given = len(prompt) + len(suffix)
    if given >= length:
        ends = [n for n in ("prompt", "suffix") if getattr(request, n)]
        names = " and ".join(ends)
        raise ConfigError(
            f"The {names} {'has' if len(ends) == 1 else 'have'} {given} tokens, but with "
            f"length={length} only {length - 1} fit: shorten {'it' if len(ends) == 1 else 'them'} "
            "or raise the length.",
            "length",
        )
    if length > context and given >= context // 2:
        raise ConfigError(
            f"length={length} is made in windows of this model's context of {context} tokens, and "
            f"the prompt and suffix have {given}: half of the context is the most.",
            "length",
        )
    pieces: list[Piece] = [texts[0], Gap(length - given, length - given), texts[1]]
    kept = [(p, i) for p, i in zip(pieces, (prompt, [], suffix), strict=True) if p != Fixed("")]
    return Layout(tuple(p for p, _ in kept), tuple(tuple(i) for _, i in kept))


def ending(request: Request, layout: Layout) -> str:
    """What is done at the end of a document (see `Request.end`)."""
    if request.end is not None:
        return request.end
    return "keep" if layout.pieces == layout.pieces[:1] and request.text is None else "trim"


@dataclass(frozen=True, slots=True)
class Composed:
    """A text put together from its pieces."""

    text: str
    spans: list[tuple[int, int]]
    tokens: int
    """Of the text, from the first; the rest was trimmed."""
    finish: str


def compose(
    layout: Layout, ids: Sequence[int], generator: Generator, how: tuple[str, Sequence[str], int]
) -> Composed:
    """The text of tokens: what was given as it was, what was written decoded.

    Args:
        layout: every gap has its length.
        ids: of all positions; those of a mask are no text.
        generator: whose tokenizer decodes.
        how: what is done at the end of a document, the stop strings, and the first position at
            which the text may end.
    """
    end, stop, earliest = how
    text, spans, tokens, finish = "", [], len(ids), "length"
    for number, (piece, (first, last)) in enumerate(
        zip(layout.pieces, layout.places(), strict=True)
    ):
        if isinstance(piece, Fixed):
            text += piece.text
            continue
        before, written = ids[max(0, first - CONTEXT_SHOWN) : first], list(ids[first:last])
        if number == len(layout.pieces) - 1:
            kept, shown, finish = _trimmed(
                before, written, generator, (end, stop, max(earliest - first, 0))
            )
            tokens = first + kept
        else:
            shown = piece_text(before, written, generator)
        spans.append((len(text), len(text) + len(shown)))
        text += shown
    return Composed(text, spans, tokens, finish)


def _trimmed(
    before: Sequence[int],
    written: list[int],
    generator: Generator,
    how: tuple[str, Sequence[str], int],
) -> tuple[int, str, str]:
    """Tokens that are kept of the last gap, their text, and why it ends there."""
    end, stop, earliest = how
    keep, finish = len(written), "length"
    eos = generator.tokenizer.eos_id
    if end == "trim" and eos in written[earliest:]:
        keep, finish = written.index(eos, earliest), "end"
    text = piece_text(before, written[:keep], generator)
    after = len(piece_text(before, written[:earliest], generator)) if earliest else 0
    found = [place for each in stop if (place := text.find(each, after)) >= 0]
    if not found:
        return keep, text, finish
    place = min(found)
    keep = bisect_left(
        range(keep), place, key=lambda count: len(piece_text(before, written[:count], generator))
    )
    return keep, text[:place], "stop"


def piece_text(before: Sequence[int], written: Sequence[int], generator: Generator) -> str:
    """The text of a gap's tokens; documents in it are apart by a blank line."""
    eos = generator.tokenizer.eos_id
    if eos in before or eos in written:
        lead = bool(written) and written[0] == eos and bool(before)
        return DOCUMENT_SEPARATOR * lead + generator.decode(written)
    context = generator.decode(before)
    whole = generator.decode([*before, *written])
    return whole[len(context) :] if whole.startswith(context) else generator.decode(written)
