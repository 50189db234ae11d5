"""Documents from files: .txt and .jsonl, plain or compressed."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from fsdfm.core.errors import DataError
from fsdfm.core.files import one_line

READ_BYTES = 1 << 20
SUFFIXES = (".txt", ".jsonl")
COMPRESSIONS = ("", ".gz", ".zst")
PIECE_CHARACTERS = 1 << 20
"""Longest piece of text held at once; a longer document is cut at line ends."""

SHOWN_FIELDS = 8

Advance = Callable[[int], None]
"""Called with the number of file bytes just read."""


def check_files(paths: list[Path]) -> None:
    """Look at every file before any work is done.

    Raises:
        DataError: no file, a missing one, a directory, an empty one, or an unknown kind.
    """
    if not paths:
        raise DataError("No input: name at least one file or directory.")
    for path in paths:
        if path.is_dir():
            raise DataError(f"{path} is a directory: name the files in it.")
        if not path.exists():
            raise DataError(f"{path} does not exist.")
        if not path.is_file():  # a pipe can be read only once
            raise DataError(f"{path} is not a regular file: save its contents in one.")
        _kind(path)
        try:
            with path.open("rb") as file:
                empty = not file.read(1)
        except OSError as error:
            raise DataError(f"Cannot read {path} ({one_line(error)}).") from None
        if empty:
            raise DataError(f"{path} is empty.")


def read_documents(
    path: Path, advance: Advance | None = None, *, field: str = "text"
) -> Iterator[Iterator[str]]:
    """Documents of a file, each as an iterator over pieces of its text.

    A .txt file is one document, or several if form feeds part it. A .jsonl file holds one object a
    line with its text in one field.

    Args:
        path: a file of a known kind; the suffix decides.
        advance: told of progress through the file, in (compressed) bytes.
        field: of the objects of a .jsonl file.

    Yields:
        Pieces of at most about a million characters; joined, they are the document. Each iterator
        must be used up before the next one is asked for.

    Raises:
        DataError: not UTF-8 text, binary, a line that is not such an object, or a cut file.
    """
    kind = _kind(path)
    text = _decoded(_unpacked(path, advance), path)
    if kind == ".jsonl":
        yield from (pieces(iter([document])) for document in _json_texts(text, path, field))
    else:
        yield from _split_at_form_feeds(text)


def _kind(path: Path) -> str:
    suffixes = path.suffixes
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS[1:] else ""
    kind = suffixes[-1] if suffixes else ""
    if kind not in SUFFIXES:
        raise DataError(
            f"{path}: cannot tell its kind from {kind + compression or 'no suffix'!r}; "
            f"name it .txt or .jsonl, also with .gz or .zst, or .parquet or .arrow."
        )
    return kind


class _Counted(io.RawIOBase):
    """A file that reports how much of it has been read."""

    def __init__(self, file: BinaryIO, advance: Advance | None) -> None:
        self.file, self.advance = file, advance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        data = self.file.read(len(view))
        view[: len(data)] = data
        if self.advance is not None:
            self.advance(len(data))
        return len(data)


def _unpacked(path: Path, advance: Advance | None) -> Iterator[bytes]:
    """The decompressed bytes of a file, chunk by chunk; errors of any layer are one DataError."""
    try:
        with path.open("rb") as raw:
            file: Any = io.BufferedReader(_Counted(raw, advance), READ_BYTES)
            if path.suffix == ".gz":
                file = gzip.GzipFile(fileobj=file)
            elif path.suffix == ".zst":
                file = _Frames(file)
            while data := file.read(READ_BYTES):
                yield data
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path} is cut short or not a {path.suffix} file ({error}).") from None
    except OSError as error:
        raise DataError(f"Cannot read {path} ({one_line(error)}).") from None


def _new_frame() -> zstandard.ZstdDecompressionObj:
    # 2 GiB: corpora are often made with `zstd --long=31`.
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


class _Frames:
    """Zstandard frames one after the other; unlike the library's reader it notices a cut one."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.frame = _new_frame()
        self.open = False
        self.rest = b""

    def read(self, size: int) -> bytes:
        out = b""
        while not out:
            data = self.rest or self.file.read(size)
            if not data:
                if self.open:
                    raise EOFError("the last frame is incomplete")
                return b""
            if not self.open:
                self.frame = _new_frame()
            out = self.frame.decompress(data)
            self.open = not self.frame.eof
            self.rest = self.frame.unused_data if self.frame.eof else b""
        return out


def _decoded(chunks: Iterator[bytes], path: Path) -> Iterator[str]:
    """UTF-8 text of a file, chunk by chunk, less a byte order mark."""
    # Not utf-8-sig: its errors count bytes from behind the mark.
    decoder, offset, first = codecs.getincrementaldecoder("utf-8")(), 0, True
    for data in chain(chunks, [b""]):
        if b"\0" in data:
            raise DataError(
                f"{path} is binary (a zero byte at offset {offset + data.index(0)}): "
                f"give text in UTF-8."
            )
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not UTF-8 (byte {offset - pending + error.start}): convert it first, "
                f"e.g. iconv -f latin1 -t utf-8."
            ) from None
        if text:
            yield text.removeprefix("\ufeff") if first else text
            first = False
        offset += len(data)


def _lines(chunks: Iterator[str]) -> Iterator[str]:
    """Lines with their ends; only \\n ends a line."""
    waiting: list[str] = []
    for chunk in chunks:
        *whole, rest = chunk.split("\n")
        for line in whole:
            yield "".join(waiting) + line + "\n"
            waiting = []
        waiting.append(rest)
    if last := "".join(waiting):
        yield last


def _json_texts(chunks: Iterator[str], path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(chunks), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError(f"{path}, line {number}: not JSON.") from None
        if not isinstance(value, dict):
            raise DataError(f'{path}, line {number}: no object with a string under "{field}".')
        text = value.get(field)
        if not isinstance(text, str):
            raise DataError(
                f'{path}, line {number}: no string under "{field}"; '
                f"the fields with a string are {_names_of_texts(value)}."
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"{path}, line {number}: half a surrogate pair in the text.") from None
        yield text


def _names_of_texts(value: dict[str, Any]) -> str:
    """Fields of an object that hold a string, quoted; no more than fit on a line."""
    names = [json.dumps(name, ensure_ascii=False) for name in value if isinstance(value[name], str)]
    more = f" and {len(names) - SHOWN_FIELDS} more" if len(names) > SHOWN_FIELDS else ""
    return (", ".join(names[:SHOWN_FIELDS]) or "none") + more


def _split_at_form_feeds(chunks: Iterator[str]) -> Iterator[Iterator[str]]:
    """Documents parted by form feeds, each lazily."""
    parts, ended = _parts(chunks), False

    def document() -> Iterator[str]:
        nonlocal ended
        for part in parts:
            if part is None:
                return
            yield part
        ended = True

    while not ended:
        current = pieces(document())
        yield current
        for _ in current:  # whatever the caller left
            pass


def _parts(chunks: Iterator[str]) -> Iterator[str | None]:
    """The text between form feeds, and None for every form feed."""
    for chunk in chunks:
        first, *others = chunk.split("\f")
        yield first
        for part in others:
            yield None
            yield part


def pieces(chunks: Iterator[str]) -> Iterator[str]:
    """A text cut after line ends (or anywhere, if there are none) into bounded pieces.

    The cuts depend on the text only, not on its chunks: it packs the same from any kind of file.
    """
    held = ""
    for chunk in chunks:
        held += chunk
        start = 0
        while len(held) - start > PIECE_CHARACTERS:
            end = held.rfind("\n", start, start + PIECE_CHARACTERS) + 1
            end = end if end > start else start + PIECE_CHARACTERS
            yield held[start:end]
            start = end
        held = held[start:]
    if held:
        yield held
