"""Pieces of documents to shards of token ids: tokenized by several processes, written by one.

What is written depends on the pieces alone. After every batch a journal says how far the shards
are; whoever finds it goes on from there.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fsdfm.core.errors import DataError
from fsdfm.core.files import file_digest, replacing
from fsdfm.text.deal import Piece
from fsdfm.text.layout import SPLITS
from fsdfm.text.tokenizer import Tokenizer

BATCH_CHARACTERS = 1 << 22
"""Text that is tokenized at once."""
JOURNAL = "journal.json"


@dataclass(frozen=True, slots=True)
class Encoded:
    """What became of the pieces of one split in a batch."""

    ids: NDArray[Any]
    documents: int
    text_bytes: int


@dataclass(frozen=True, slots=True)
class Encoder:
    """A tokenizer that makes batches of pieces into token ids; a process can be given one."""

    tokenizer: Tokenizer
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Encoder:
        """Two bytes a token where all ids fit in them."""
        return cls(tokenizer, np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"))

    def encode(self, pieces: list[Piece]) -> list[Encoded]:
        """Token ids of pieces, EOS where a document ends, for each split."""
        rows = self.tokenizer.encode_batch([piece.text for piece in pieces])
        eos = np.array([self.tokenizer.eos_id], self.dtype)
        found = []
        for held_out in (False, True):
            parts, documents, text_bytes = [np.zeros(0, self.dtype)], 0, 0
            for piece, ids in zip(pieces, rows, strict=True):
                if piece.held_out == held_out:
                    parts.append(np.array(ids, self.dtype))
                    if piece.ends:
                        parts.append(eos)
                    documents += piece.ends
                    text_bytes += len(piece.text.encode())
            found.append(Encoded(np.concatenate(parts), documents, text_bytes))
        return found


@dataclass
class SplitWriter:
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

    def write(self, encoded: Encoded) -> None:
        """Append token ids, over as many shards as they need."""
        ids = encoded.ids
        while len(ids):
            if self._file is None:
                path = self.directory / f"{self.name}-{len(self.shards):05d}.bin"
                self._file = path.open("wb")
                self.shards.append({"file": path.name, "tokens": 0})
            shard = self.shards[-1]
            now, ids = np.split(ids, [self.shard_tokens - shard["tokens"]])
            self._file.write(now.tobytes())
            shard["tokens"] += len(now)
            self.tokens += len(now)
            if shard["tokens"] == self.shard_tokens:
                self.close()
        self.documents += encoded.documents
        self.text_bytes += encoded.text_bytes

    def sync(self) -> None:
        """What was written is on the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """End the present shard."""
        if self._file is not None:
            self.sync()
            self._file.close()
            shard = self.shards[-1]
            shard["sha256"] = file_digest(self.directory / shard["file"])
            self._file = None

    def summary(self) -> dict[str, Any]:
        """Counts for the manifest and the journal."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "shards": self.shards,
        }

    def resume(self, summary: dict[str, Any]) -> None:
        """Go on after what a journal says was written.

        Raises:
            OSError, ValueError: the files are not as the journal says.
        """
        self.documents, self.tokens = int(summary["documents"]), int(summary["tokens"])
        self.text_bytes, self.shards = int(summary["text_bytes"]), list(summary["shards"])
        for shard in self.shards:
            path, size = self.directory / shard["file"], shard["tokens"] * self.dtype.itemsize
            if path.stat().st_size < size:
                raise ValueError(f"{path} is shorter than its journal says")
            if "sha256" in shard:
                continue
            os.truncate(path, size)
            self._file = path.open("ab")


@dataclass
class Shards:
    """The shards of both splits in a directory, and the journal of how far they are."""

    directory: Path
    job: str
    """Digest of all that the shards depend on: a journal of another job is not gone on with."""
    writers: list[SplitWriter]
    pieces: int = 0
    """Written so far."""
    split_documents: int = 0
    """Documents of which both splits hold a part."""
    inside: bool | None = None
    """The split in which a document has begun and not ended; None between documents."""

    @classmethod
    def open(cls, directory: Path, job: str, dtype: np.dtype[Any], shard_tokens: int) -> Shards:
        """Those that the journal tells of, or none yet."""

        def fresh() -> Shards:
            writers = [SplitWriter(directory, name, dtype, shard_tokens) for name in SPLITS]
            return cls(directory, job, writers)

        shards = fresh()
        try:
            told = json.loads((directory / JOURNAL).read_text("utf-8"))
            if told["job"] != job:
                return shards
            for writer in shards.writers:
                writer.resume(told["splits"][writer.name])
            shards.pieces, shards.inside = int(told["pieces"]), told["inside"]
            shards.split_documents = int(told["split_documents"])
        except (OSError, ValueError, KeyError, TypeError):
            return fresh()
        return shards

    def write(self, pieces: list[Piece], encoded: list[Encoded]) -> None:
        """Append a batch, and say so in the journal."""
        for piece in pieces:
            if self.inside is not None and self.inside != piece.held_out:
                self.writers[self.inside].documents += 1
                self.split_documents += 1
            self.inside = None if piece.ends else piece.held_out
        for writer, part in zip(self.writers, encoded, strict=True):
            writer.write(part)
            writer.sync()
        self.pieces += len(pieces)
        told = {
            "job": self.job,
            "pieces": self.pieces,
            "inside": self.inside,
            "split_documents": self.split_documents,
            "splits": self.summaries(),
        }
        with replacing(self.directory / JOURNAL) as partial:
            partial.write_text(json.dumps(told))

    def summaries(self) -> dict[str, dict[str, Any]]:
        """Counts of each split."""
        return {writer.name: writer.summary() for writer in self.writers}

    def finish(self) -> None:
        """Whole shards, and no journal any more."""
        self.close()
        (self.directory / JOURNAL).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files."""
        for writer in self.writers:
            writer.close()


def write_shards(shards: Shards, pieces: Iterator[Piece], encoder: Encoder, workers: int) -> None:
    """Tokenize all pieces that are not written yet, and write them.

    Args:
        shards: where to.
        pieces: all of them, from the first.
        encoder: makes token ids of them.
        workers: processes that tokenize; 1: this one, with the tokenizer's own threads.

    Raises:
        DataError: a process was killed.
    """
    batches = _batches(islice(pieces, shards.pieces, None))
    try:
        with _encoding(encoder, workers) as encoded:
            for batch, found in encoded(batches):
                shards.write(batch, found)
    finally:
        shards.close()


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Many short documents, or a part of a long one."""
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@contextmanager
def _encoding(encoder: Encoder, workers: int) -> Iterator[Any]:
    """A function from batches to batches with their ids, in order; few are held at a time."""
    if workers == 1:
        yield lambda batches: ((batch, encoder.encode(batch)) for batch in batches)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy threads in mid-air
    told = (encoder.tokenizer.to_json(),)
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=told)

    def encoded(batches: Iterator[list[Piece]]) -> Iterator[tuple[list[Piece], list[Encoded]]]:
        waiting: deque[tuple[list[Piece], Future[list[Encoded]]]] = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(_work, batch)))
            if len(waiting) > workers:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()

    try:
        yield encoded
    except BrokenProcessPool:
        raise DataError(
            "A process that tokenizes was killed (out of memory?): take fewer workers, then run "
            "the same command again.",
            "workers",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_ENCODER: Encoder | None = None
"""Of a worker."""


def _start_worker(tokenizer_json: str) -> None:
    global _ENCODER
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process hears it, and ends the others
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the threads
    _ENCODER = Encoder.of(Tokenizer.from_json(tokenizer_json))


def _work(pieces: list[Piece]) -> list[Encoded]:
    assert _ENCODER is not None
    return _ENCODER.encode(pieces)
