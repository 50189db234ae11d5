r"""Templates: text with gaps.

    The [[12]] was [[?]] of [[3-8]].

A gap is [[N]], exactly N tokens; [[A-B]], from A to B; or [[?]], 1 to FREE. A backslash before a
bracket makes it a literal one, and two of them before a bracket are a literal backslash.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fsdfm.core.errors import ConfigError

FREE = 32
"""Tokens that [[?]] may have at most."""

# Not within backslashes: a long run of them would be gone through once from each.
_MARK = re.compile(r"(?<!\\)(?P<slashes>\\*)(?P<mark>\[\[|\]\]|[\[\]])")
_GAP = re.compile(r"(?P<free>\?)|(?P<low>\d{1,18})(?:-(?P<high>\d{1,18}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Fixed:
    """Text that is given."""

    text: str


@dataclass(frozen=True, slots=True)
class Gap:
    """A place to write from `low` up to `high` tokens."""

    low: int
    high: int

    @property
    def free(self) -> bool:
        """Whether its length is to be found."""
        return self.low < self.high


Piece = Fixed | Gap


def parse(template: str) -> list[Piece]:
    """Fixed text and gaps, in order; no text is empty, and no two stand beside each other.

    Raises:
        ConfigError: brackets that do not pair, a gap of no tokens or no number, or no gap at all.
    """
    pieces: list[Piece] = []
    text, at = "", 0
    while found := _MARK.search(template, at):
        text += template[at : found.start()] + "\\" * (len(found["slashes"]) // 2)
        mark, escaped = found["mark"], len(found["slashes"]) % 2 == 1
        at = found.end()
        if escaped or len(mark) == 1:
            text += mark[0] if escaped else mark
            at -= len(mark) - 1 if escaped else 0
            continue
        if mark == "]]":
            raise ConfigError(
                f"template has ]] at character {found.end() - 2} that no [[ opens: write \\] for "
                "a literal bracket.",
                "template",
            )
        close = template.find("]]", at)
        if close < 0:
            raise ConfigError(
                f"template has [[ at character {at - 2} that no ]] closes: close the gap, or write "
                "\\[ for a literal bracket.",
                "template",
            )
        pieces += [Fixed(text)] if text else []
        pieces.append(_gap(template[at:close]))
        text, at = "", close + 2
    text += template[at:]
    pieces += [Fixed(text)] if text else []
    if not any(isinstance(piece, Gap) for piece in pieces):
        raise ConfigError(
            "template has no gap: write [[12]] where 12 tokens are wanted, [[3-8]] for 3 to 8, or "
            "[[?]].",
            "template",
        )
    return pieces


def write(pieces: Iterable[Piece]) -> str:
    """A template that `parse` reads as these pieces."""
    return "".join(_written(list(pieces)))


def _written(pieces: list[Piece]) -> Iterator[str]:
    for number, piece in enumerate(pieces):
        if isinstance(piece, Gap):
            yield f"[[{piece.low}-{piece.high}]]" if piece.free else f"[[{piece.low}]]"
            continue
        text = re.sub(r"(?<!\\)(\\*)([\[\]])", r"\1\1\\\2", piece.text)
        if number + 1 < len(pieces):  # what follows is a bracket
            slashes = len(text) - len(text.rstrip("\\"))
            text += "\\" * slashes
        yield text


def _gap(inside: str) -> Gap:
    found = _GAP.fullmatch(inside.strip())
    if found is None:
        raise ConfigError(
            f"template has the gap [[{inside:.40}]]: a gap is a number of tokens as in [[12]], a "
            "range as in [[3-8]], or [[?]].",
            "template",
        )
    if found["free"]:
        return Gap(1, FREE)
    low = int(found["low"])
    high = int(found["high"] or low)
    if not 1 <= low <= high:
        raise ConfigError(
            f"template has the gap [[{inside}]]: it needs 1 token or more, and the smaller number "
            "first.",
            "template",
        )
    return Gap(low, high)
