"""Claims: figures that the README shows, each with the command, machine and date that gave it.

In the README a comment names them. Before a table, `<!-- claims: speed -->`: the figure in row
`fsdfm` and column `seconds` is the claim `speed/fsdfm/seconds`. Behind a figure in a sentence,
`5.7 seconds<!-- claim: speed/fsdfm/seconds -->`: the last number before the comment is its value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fsdfm.core.errors import DataError

NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?")
FIGURE = re.compile(r"[*~ ]*\d[\d,.]*( (MiB|GiB|ms|s|%))?[*% ]*(\([^)]*\))?[*% ]*")
"""A cell that is a figure, perhaps with a unit and an interval."""
OF_TABLE = re.compile(r"<!-- claims: ([\w/ .-]+) -->")
OF_SENTENCE = re.compile(r"<!-- claim: ([^>]+?) -->")
FIELDS = ("id", "value", "interval", "n", "command", "machine", "date")


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A figure that was measured."""

    id: str
    value: float
    interval: tuple[float, float] | None
    """95 %, or none where none was computed."""
    n: int
    """Samples, texts, or repeats."""
    command: str
    """What repeats it."""
    machine: str
    date: str
    """ISO 8601."""

    @property
    def numbers(self) -> tuple[float, ...]:
        """As the README shows them: the value, and its interval if it has one."""
        return (self.value, *(self.interval or ()))


@dataclass(frozen=True, slots=True)
class Shown:
    """What a document says of a claim."""

    id: str
    texts: tuple[str, ...]
    """Numbers as they stand there."""

    def says(self, claim: Claim) -> bool:
        """Whether these are the claim's numbers, rounded to the digits that are shown."""
        numbers = claim.numbers if len(self.texts) > 1 else claim.numbers[:1]
        return len(numbers) == len(self.texts) and all(
            f"{number:.{_digits(text)}f}" == text.replace(",", "")
            for number, text in zip(numbers, self.texts, strict=True)
        )


def read_claims(path: Path) -> dict[str, Claim]:
    """All claims of a file, by id.

    Raises:
        DataError: not the list of claims that it should be; the message names the claim.
    """
    try:
        listed = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {path}: {error}.") from None
    claims: dict[str, Claim] = {}
    for each in listed:
        if sorted(each) != sorted(FIELDS):
            raise DataError(f"{path}: {each.get('id')} needs the fields {', '.join(FIELDS)}.")
        interval = None if each["interval"] is None else tuple(each["interval"])
        claim = Claim(**each | {"interval": interval})
        if claim.id in claims:
            raise DataError(f"{path}: {claim.id} is there twice.")
        claims[claim.id] = claim
    return claims


def shown(markdown: str) -> Iterator[Shown]:
    """Every figure of a document's tables and every figure that a comment names.

    A figure of a table that no comment stands before has an id that begins with `?`.
    """
    table, columns = "?", list[str]()
    for line in markdown.splitlines():
        if named := OF_TABLE.fullmatch(line.strip()):
            table = named[1]
            continue
        if line.startswith("|"):
            cells = [each.strip() for each in line.strip().strip("|").split("|")]
            if not columns:
                columns = cells
            for column, cell in zip(columns[1:], cells[1:], strict=False):
                if cells is not columns and FIGURE.fullmatch(cell):
                    yield Shown(f"{table}/{_plain(cells[0])}/{_plain(column)}", _numbers(cell))
            continue
        if line.strip() or columns:  # a table ends, or text stands between it and its comment
            table, columns = "?", []
    yield from _of_sentences(markdown)


def _of_sentences(markdown: str) -> Iterator[Shown]:
    start = 0
    for named in OF_SENTENCE.finditer(markdown):
        found = _numbers(markdown[start : named.start()])
        yield Shown(named[1], found[-1:])
        start = named.end()


def _numbers(text: str) -> tuple[str, ...]:
    return tuple(NUMBER.findall(text))


def _digits(text: str) -> int:
    """Behind the point."""
    return len(text.partition(".")[2])


def _plain(cell: str) -> str:
    """A cell without emphasis, code marks and what stands in brackets."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)|[*`]", r"\1", cell).strip()
