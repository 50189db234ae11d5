"""The bytes of tokens, and where tokens begin in a text."""

from __future__ import annotations

import codecs
import functools
import json
from collections.abc import Mapping, Sequence

from fsdfm.generate.generator import Generator
from fsdfm.generate.layout import CONTEXT_SHOWN, Layout, piece_text
from fsdfm.generate.request import Result
from fsdfm.generate.template import Gap

_PRINTED = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
"""Bytes that a byte-level vocabulary spells as the characters of their numbers."""
_OTHERS = (byte for byte in range(0x100) if byte not in _PRINTED)
BYTES = {chr(b): b for b in _PRINTED} | {chr(0x100 + k): b for k, b in enumerate(_OTHERS)}
"""What each character of a spelling stands for."""


def token_bytes(generator: Generator, token: int) -> bytes:
    """The bytes of a token; of one that holds part of a character, that part.

    Of a vocabulary that is not byte-level, those of its text.
    """
    text, spelling = generator.piece(token), _spellings(generator).get(token, "")
    if "\ufffd" in text and spelling and BYTES.keys() >= set(spelling):
        return bytes(BYTES[character] for character in spelling)
    return text.encode()


def begins(result: Result, layout: Layout, generator: Generator) -> dict[int, int]:
    """The character of the text that each token of its gaps begins in, by the token's position.

    Args:
        result: of which.
        layout: its own; every gap has its length.
        generator: that wrote it.
    """
    places = zip(layout.pieces, layout.places(), strict=True)
    gaps = [place for piece, place in places if isinstance(piece, Gap)]
    found: dict[int, int] = {}
    for (first, last), (begin, end) in zip(gaps, result.spans, strict=True):
        parts = _parts(result.token_ids[:last], first, generator)
        for position, at in enumerate(_characters(parts, begin), start=first):
            found[position] = min(at, end)  # documents that end the text add nothing
    return found


def _parts(ids: Sequence[int], first: int, generator: Generator) -> list[bytes | None]:
    """What each token from a position on adds to a text, None for the end of a document."""
    eos, exact = generator.tokenizer.eos_id, bool(_spellings(generator))
    found: list[bytes | None] = []
    for place in range(first, len(ids)):
        before = ids[max(0, place - CONTEXT_SHOWN) : place]
        if ids[place] == eos:
            apart = bool(before) and before[-1] != eos  # else nothing is between them
            found.append(None if apart else b"")
        elif exact:
            found.append(token_bytes(generator, ids[place]))
        else:
            found.append(piece_text(before, ids[place : place + 1], generator).encode())
    return found


def _characters(parts: Sequence[bytes | None], at: int) -> list[int]:
    """The character that each part of a text begins in; those of the text begin at `at`."""
    decoder, found = codecs.getincrementaldecoder("utf-8")("replace"), []
    for part in parts:
        if part is None:  # what is left of a character ends with its document
            at += len(decoder.decode(b"", final=True))
            found.append(at)
            at += len("\n\n")
            continue
        at += len(decoder.decode(part[:1]))
        whole = bool(part) and not decoder.getstate()[0]
        found.append(at - whole)
        at += len(decoder.decode(part[1:]))
    return found


@functools.lru_cache(maxsize=8)
def _spellings(generator: Generator) -> Mapping[int, str]:
    """How a byte-level vocabulary spells its tokens; of another, nothing."""
    decoder = json.loads(generator.tokenizer.to_json()).get("decoder")
    if '"ByteLevel"' not in json.dumps(decoder):
        return {}
    return {token: spelling for spelling, token in generator.tokenizer.vocabulary().items()}
