"""What a command line asks for, as requests."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fsdfm.core.errors import ConfigError, DataError
from fsdfm.core.files import one_line
from fsdfm.generate.request import Request

ELSEWHERE = ("text", "span", "id")
"""Fields of a request that the command says in its own words."""
REPEATED = ("stop", "ban", "require")
FORMS = ("template", "prompt", "prompt_file", "suffix", "edit", "initial")
"""What may be given of a text; the first two of these that a command line has are told."""


def values(request: Mapping[str, Any], own: Any) -> dict[str, Any]:
    """Fields of a request, with the text of the files that are named.

    Args:
        request: the flags that are fields of it.
        own: `prompt_file`, `edit`, `span` and `initial`.

    Raises:
        ConfigError: two flags that exclude each other, or a span that is none.
        DataError: a file that cannot be read, is empty or not UTF-8.
    """
    found = {name: value for name, value in request.items() if value is not None}
    given = [n for n in FORMS if found.get(n, getattr(own, n, None)) is not None]
    pairs = {("prompt", "suffix"), ("prompt_file", "suffix")}
    if len(given) > 1 and tuple(given) not in pairs:
        raise ConfigError(f"{given[0]} and {given[1]} are both given: leave one out.", *given[:2])
    if own.span is not None and own.edit is None:
        raise ConfigError("span is of a file to edit: give edit too.", "span", "edit")
    if found["strength"] != 1.0 and own.edit is None and own.initial is None:
        raise ConfigError(
            "strength is of a draft: give initial or edit too.", "strength", "initial", "edit"
        )
    if own.prompt_file is not None:
        text = _read(own.prompt_file).removeprefix("\ufeff")
        found["prompt"] = text.removesuffix("\n").removesuffix("\r")
    file = own.edit if own.edit is not None else own.initial
    if file is not None:
        found["text"] = _read(file)
        if not found["text"]:
            raise DataError(f"{file} is empty: there is nothing to write anew.")
    if own.edit is not None:
        if own.span is None:
            raise ConfigError("edit needs the span that is written anew.", "edit", "span")
        found["span"] = _span(own.span)
    return found


def asked(found: Mapping[str, Any], count: int) -> Iterator[tuple[int, Request]]:
    """A request for each of `count` texts: their seeds follow each other.

    Raises:
        ConfigError: a value that cannot be.
    """
    first = Request.from_dict(found)
    for number in range(count):
        yield number, replace(first, seed=first.seed + number * first.best_of)


def _span(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return int(first), int(last)
    except ValueError:
        raise ConfigError(
            f"span must be two numbers as in 120:180, got {text!r}.", "span"
        ) from None


def _read(file: str) -> str:
    """The text of a file, or of standard input, as it is.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    name = "Standard input" if file == "-" else file
    try:
        if file == "-":
            data = sys.stdin.buffer.read() if sys.stdin is not None else b""
        else:
            data = Path(name).read_bytes()
        return data.decode("utf-8")
    except OSError as error:
        raise DataError(f"Cannot read {name}: {one_line(error)}.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 (byte {error.start}): convert it first.") from None
