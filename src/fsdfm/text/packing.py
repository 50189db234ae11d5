"""Documents to token shards, and token shards to batches.

A prepared directory holds manifest.json, tokenizer.json and, for each of the two splits, shards of
little-endian token ids: all documents of the split, each followed by EOS.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fsdfm.core.errors import DataError
from fsdfm.core.files import file_digest, is_taken, one_line
from fsdfm.core.lock import locked
from fsdfm.core.progress import Progress
from fsdfm.text.corpus import Advance, check_files, read_documents
from fsdfm.text.settings import PrepareSettings
from fsdfm.text.store import FORMAT, FORMAT_VERSION, SPLITS
from fsdfm.text.tokenizer import Tokenizer, train_bpe
from fsdfm.text.vocabulary import count_tokens, cut

TRAINED_VOCABULARY = 8192
"""Entries of a tokenizer that is trained here by default."""
BATCH_CHARACTERS = 1 << 22
"""Text that is tokenized at once."""


def prepare(
    files: list[Path],
    out: Path,
    *,
    settings: PrepareSettings | None = None,
    tokenizer: Tokenizer | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenize and pack files into a directory that training reads.

    Everything is written to a sibling directory that takes the final name at the very end, so an
    interrupted run leaves nothing that could be taken for a whole one; run it again.

    Args:
        files: .txt and .jsonl, each also .gz or .zst.
        out: directory to make.
        settings: numbers.
        tokenizer: to use, instead of training one.
        progress: told how far it is.

    Returns:
        The manifest.

    Raises:
        DataError: unusable input, or an output that exists or cannot be written.
        ConfigError: settings out of range; another process prepares the same output.
    """
    settings = settings or PrepareSettings()
    check_files(files)
    with _staging(out) as staged:
        deal = _Deal.of(files, settings, _counter(files, progress, "split"))
        trained = tokenizer is None
        if tokenizer is None:
            # Not on what is held out: its vocabulary would fit the text that it is judged on.
            sample = _limited(deal.training(files, progress), settings.tokenizer_bytes)
            tokenizer = train_bpe(sample, settings.vocab_size or TRAINED_VOCABULARY)
        elif settings.vocab_size is not None and settings.vocab_size < tokenizer.vocab_size:
            sample = _limited(deal.training(files, progress), settings.tokenizer_bytes)
            tokenizer = cut(tokenizer, count_tokens(tokenizer, sample), settings.vocab_size)
        (staged / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        dealt = deal.pieces(files, _counter(files, progress, "tokens"))
        splits, split_documents = _write_splits(dealt, staged, tokenizer, settings)
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "dtype": _dtype(tokenizer).name,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "tokenizer_sha256": tokenizer.fingerprint,
            "tokenizer_trained_here": trained,
            "settings": asdict(settings),
            "files": [_describe(path) for path in files],
            "splits": splits,
            "split_documents": split_documents,
        }
        (staged / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A fresh sibling directory that becomes `out` if the block succeeds, and goes if it fails."""
    final = out.resolve()  # `.` has no name, and a link to a directory is not to be replaced
    staged = final.with_name(f".{final.name}.partial")
    try:
        if is_taken(final):
            raise DataError(f"{out} exists already: choose another out, or delete it.", "out")
        final.parent.mkdir(parents=True, exist_ok=True)
        with locked(final.with_name(f".{final.name}.lock"), out), _removed_at_the_end(staged):
            staged.mkdir()
            yield staged
            if final.exists():
                final.rmdir()
            staged.replace(final)
    except OSError as error:
        raise DataError(
            f"Cannot write {out} ({one_line(error)}): choose another out or free some "
            f"space, then run the same command again.",
            "out",
        ) from None


@contextmanager
def _removed_at_the_end(directory: Path) -> Iterator[None]:
    """A directory of ours that a killed run may have left, gone before and after."""
    if directory.exists():
        shutil.rmtree(directory)
    try:
        yield
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _describe(path: Path) -> dict[str, Any]:
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": file_digest(path)}


def _counter(files: list[Path], progress: Progress | None, phase: str) -> Advance | None:
    if progress is None:
        return None
    total, done = sum(path.stat().st_size for path in files), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(phase, done, total)

    return advance


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a document, and the split that it belongs to."""

    text: str
    ends: bool
    """Whether the document ends with it."""
    held_out: bool

    @property
    def units(self) -> int:
        """Its characters, and one for the end of a document."""
        return len(self.text) + self.ends


@dataclass(frozen=True, slots=True)
class _Deal:
    """Which text is held out: documents by chance, or the tail of it all."""

    settings: PrepareSettings
    tail: int | None = None
    """Units before the tail that is held out; None where documents are held out by chance."""

    @classmethod
    def of(cls, files: list[Path], settings: PrepareSettings, advance: Advance | None) -> _Deal:
        """Deal by chance, or cut off a tail where chance would leave a split empty.

        Reads until both splits have a document.

        Raises:
            DataError: there is no text at all.
        """
        chance, seen, units = cls(settings), set[bool](), 0
        for piece in chance.pieces(files, advance):
            seen.add(piece.held_out)
            units += piece.units
            if len(seen) == 2:
                return chance
        if not units:
            raise DataError("The files hold no text (white space only): give some.")
        share = round(units * settings.validation_fraction)
        return cls(settings, units - max(1, min(units // 2, share)))

    def pieces(self, files: list[Path], advance: Advance | None) -> Iterator[_Piece]:
        """All documents that are not white space alone, the same way each time."""
        chance, start = np.random.default_rng(self.settings.seed), 0
        for path in files:
            for document in read_documents(path, advance, field=self.settings.field):
                held_out = bool(chance.random() < self.settings.validation_fraction)
                for text, ends in _until_the_end(_unless_blank(document)):
                    piece = _Piece(text, ends, held_out)
                    if self.tail is None:
                        yield piece
                    else:
                        yield from _cut(piece, self.tail - start)
                        start += piece.units

    def training(self, files: list[Path], progress: Progress | None) -> Iterator[str]:
        """The text that training will see, for a tokenizer."""
        dealt = self.pieces(files, _counter(files, progress, "tokenizer"))
        return (piece.text for piece in dealt if not piece.held_out)


def _cut(piece: _Piece, room: int) -> Iterator[_Piece]:
    """The first `room` units of a piece for training, the others held out."""
    if room >= piece.units:
        yield replace(piece, held_out=False)
    elif room <= 0:
        yield replace(piece, held_out=True)
    else:
        yield _Piece(piece.text[:room], False, False)
        yield _Piece(piece.text[room:], piece.ends, True)


def _until_the_end(pieces: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """Each piece, and whether it is the last."""
    last = None
    for piece in pieces:
        if last is not None:
            yield last, False
        last = piece
    if last is not None:
        yield last, True


def _limited(pieces: Iterator[str], most: int) -> Iterator[str]:
    """Pieces until `most` bytes have gone by."""
    for piece in pieces:
        yield piece
        most -= len(piece.encode())
        if most <= 0:
            return


def _dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


@dataclass
class _SplitWriter:
    """Shards of one split, and their counts; documents are counted whole or in part."""

    directory: Path
    name: str
    dtype: np.dtype[Any]
    shard_tokens: int
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    _file: BinaryIO | None = None
    _digest: Any = None

    def write(self, ids: NDArray[Any]) -> None:
        """Append token ids, over as many shards as they need."""
        while len(ids):
            if self._file is None:
                path = self.directory / f"{self.name}-{len(self.shards):05d}.bin"
                self._file, self._digest = path.open("wb"), hashlib.sha256()
                self.shards.append({"file": path.name, "tokens": 0})
            shard = self.shards[-1]
            now, ids = np.split(ids, [self.shard_tokens - shard["tokens"]])
            data = now.astype(self.dtype).tobytes()
            self._file.write(data)
            self._digest.update(data)
            shard["tokens"] += len(now)
            self.tokens += len(now)
            if shard["tokens"] == self.shard_tokens:
                self.close()

    def close(self) -> None:
        """End the present shard."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self.shards[-1]["sha256"] = self._digest.hexdigest()
            self._file = None

    def summary(self) -> dict[str, Any]:
        """Counts for the manifest."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "shards": self.shards,
        }


def _write_splits(
    pieces: Iterator[_Piece], staged: Path, tokenizer: Tokenizer, settings: PrepareSettings
) -> tuple[dict[str, Any], int]:
    """Tokenize every piece into its split; gives the splits, and how many documents both hold."""
    writers = {
        name: _SplitWriter(staged, name, _dtype(tokenizer), settings.shard_tokens)
        for name in SPLITS
    }
    try:
        batch, before, in_both = _Batch(tokenizer), _Piece("", True, False), 0
        for piece in pieces:
            if not before.ends and before.held_out != piece.held_out:
                writers[SPLITS[before.held_out]].documents += 1
                in_both += 1
            batch.add(piece, writers[SPLITS[piece.held_out]])
            before = piece
        batch.write()
    finally:
        for writer in writers.values():
            writer.close()
    return {name: writer.summary() for name, writer in writers.items()}, in_both


class _Batch:
    """Text that waits to be tokenized together: many short documents, or a part of a long one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._waiting: list[tuple[_SplitWriter, _Piece]] = []
        self._characters = 0

    def add(self, piece: _Piece, writer: _SplitWriter) -> None:
        """Append a piece, and EOS where its document ends."""
        self._waiting.append((writer, piece))
        self._characters += len(piece.text)
        if self._characters >= BATCH_CHARACTERS:
            self.write()

    def write(self) -> None:
        """Write everything that waits."""
        encoded = self._tokenizer.encode_batch([piece.text for _, piece in self._waiting])
        for (writer, piece), ids in zip(self._waiting, encoded, strict=True):
            writer.write(np.asarray(ids + [self._tokenizer.eos_id] * piece.ends, dtype=np.int64))
            writer.text_bytes += len(piece.text.encode())
            writer.documents += piece.ends
        self._waiting, self._characters = [], 0


def _unless_blank(document: Iterator[str]) -> Iterator[str]:
    """The pieces of a document, or none if they are all white space."""
    held: list[str] = []
    for piece in document:
        held.append(piece)
        if piece.strip():
            yield from held
            yield from document
            return
