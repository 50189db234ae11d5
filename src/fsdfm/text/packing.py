"""Documents to token shards.

A prepared directory holds manifest.json, tokenizer.json and, for each of the two splits, shards of
little-endian token ids: all documents of the split, each followed by EOS.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fsdfm.core.errors import DataError
from fsdfm.core.files import digest, is_taken, one_line, replacing
from fsdfm.core.lock import locked
from fsdfm.core.progress import Progress
from fsdfm.text.deal import Counter, Deal, Dropped, counter
from fsdfm.text.layout import FORMAT, FORMAT_VERSION
from fsdfm.text.settings import PrepareSettings
from fsdfm.text.shards import JOURNAL, Encoder, Shards, write_shards
from fsdfm.text.sources import Source, find_sources
from fsdfm.text.tokenizer import Tokenizer, train_bpe
from fsdfm.text.vocabulary import count_tokens, cut

TRAINED_VOCABULARY = 8192
"""Entries of a tokenizer that is trained here by default."""


def prepare(
    sources: Sequence[str | Path],
    out: Path,
    *,
    settings: PrepareSettings | None = None,
    tokenizer: Tokenizer | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokenize and pack texts into a directory that training reads.

    Everything is written to a sibling directory that takes the final name at the very end. A run
    that was killed or interrupted leaves it there, and the same call goes on with it: what it
    gives is the same, to the byte. (The documents are read again from the first, not tokenized.)

    Args:
        sources: files (.txt and .jsonl, each also .gz or .zst; .parquet, .arrow), directories of
            such files, and names of data sets of the Hub (hf:org/name).
        out: directory to make.
        settings: numbers.
        tokenizer: to use, instead of training one.
        workers: processes that tokenize; the result does not depend on it.
        progress: told how far it is.

    Returns:
        The manifest.

    Raises:
        DataError: unusable input, or an output that exists or cannot be written.
        ConfigError: settings out of range; another process prepares the same output.
    """
    settings = settings or PrepareSettings()
    found = find_sources(sources, settings.weights)
    with _staging(out) as staged:
        told, dropped = counter(found, progress), Dropped()
        given = None if tokenizer is None else tokenizer.fingerprint
        job = _job(found, settings, given)
        _forget_another(staged, job)
        deal = Deal.of(found, settings, told("split"))
        trained = tokenizer is None
        tokenizer = _tokenizer(staged / "tokenizer.json", deal, tokenizer, told)
        encoder = Encoder.of(tokenizer)
        shards = Shards.open(staged, job, encoder.dtype, settings.shard_tokens)
        write_shards(shards, deal.pieces(told("tokens"), dropped), encoder, workers)
        shards.finish()
        manifest = _manifest(found, settings, tokenizer, shards, encoder)
        manifest |= {"tokenizer_trained_here": trained, "dropped": asdict(dropped)}
        (staged / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return json.loads(json.dumps(manifest))  # type: ignore[no-any-return]  # as it is read back


def _manifest(
    sources: Sequence[Source],
    settings: PrepareSettings,
    tokenizer: Tokenizer,
    shards: Shards,
    encoder: Encoder,
) -> dict[str, Any]:
    """What was read, how, and what it became."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "dtype": encoder.dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "tokenizer_sha256": tokenizer.fingerprint,
        "settings": asdict(settings),
        "files": [file for source in sources for file in source.describe()],
        "splits": shards.summaries(),
        "split_documents": shards.split_documents,
    }


def _tokenizer(path: Path, deal: Deal, given: Tokenizer | None, told: Counter) -> Tokenizer:
    """The tokenizer of a run: given, cut, trained, or what an interrupted run made of it."""
    settings = deal.settings
    if path.exists():
        return Tokenizer.from_file(path)
    tokenizer = given
    if tokenizer is None:
        # Not on what is held out: its vocabulary would fit the text that it is judged on.
        sample = deal.training(told("tokenizer"))
        tokenizer = train_bpe(sample, settings.vocab_size or TRAINED_VOCABULARY)
    elif settings.vocab_size is not None and settings.vocab_size < tokenizer.vocab_size:
        sample = deal.training(told("tokenizer"))
        tokenizer = cut(tokenizer, count_tokens(tokenizer, sample), settings.vocab_size)
    with replacing(path) as partial:
        partial.write_text(tokenizer.to_json(), encoding="utf-8")
    return tokenizer


def _job(sources: Sequence[Source], settings: PrepareSettings, tokenizer: str | None) -> str:
    """Digest of all that the shards depend on; files are known by name, size and time."""
    facts = [
        (source.name, [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in source.files])
        for source in sources
    ]
    return digest([json.dumps([facts, asdict(settings), tokenizer])])


def _forget_another(staged: Path, job: str) -> None:
    """Empty the directory unless it holds this very job."""
    staged_job = staged / "job"
    if staged_job.exists() and staged_job.read_text("utf-8") == job:
        return
    shutil.rmtree(staged)
    staged.mkdir()
    staged_job.write_text(job, "utf-8")


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A sibling directory that becomes `out` if the block succeeds, and goes if it fails.

    It stays where the block fails, or is interrupted or killed, after something was written for
    good: the same job goes on with it, and another one begins anew.
    """
    try:
        final = out.resolve()  # `.` has no name, and a link to a directory is not to be replaced
        if is_taken(final):
            raise DataError(f"{out} exists already: choose another out, or delete it.", "out")
        staged = final.with_name(f".{final.name}.partial")
        final.parent.mkdir(parents=True, exist_ok=True)
        with locked(final.with_name(f".{final.name}.lock"), out), _removed_if_in_vain(staged):
            staged.mkdir(exist_ok=True)
            yield staged
            (staged / "job").unlink()
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
def _removed_if_in_vain(directory: Path) -> Iterator[None]:
    """A directory of ours, gone after a failure unless somebody can go on with it."""
    try:
        yield
    except BaseException:
        if not (directory / JOURNAL).exists():
            shutil.rmtree(directory, ignore_errors=True)
        raise
