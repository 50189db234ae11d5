"""Token shards to batches: reading what `fsdfm.text.packing` wrote."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fsdfm.core.errors import DataError
from fsdfm.core.files import digest, file_digest
from fsdfm.text.layout import FORMAT, FORMAT_VERSION, SPLITS

VERIFIED_BYTES = 1_000_000_000
"""Prepared data up to this size is checked against its digests whenever it is opened: about a
second. Of larger data only the ids that are read are checked."""


@dataclass(frozen=True, slots=True)
class TokenSplit:
    """One logical stream of tokens over memory-mapped shards."""

    name: str
    shards: tuple[NDArray[Any], ...]
    vocab_size: int
    paths: tuple[Path, ...]
    """Files of the shards, to name in errors."""

    @property
    def tokens(self) -> int:
        """Tokens of the stream."""
        return sum(len(shard) for shard in self.shards)

    def blocks(self, length: int) -> int:
        """Whole blocks of `length` tokens."""
        return self.tokens // length

    def require(self, length: int) -> None:
        """Raises DataError unless the split holds at least one block of `length` tokens."""
        if self.tokens < length:
            raise DataError(
                f"The {self.name} split has {self.tokens:,} tokens, fewer than one block of "
                f"{length:,}: prepare more text, or use a smaller context_length.",
                "context_length",
            )

    def block(self, index: int, length: int) -> Tensor:
        """Block number `index` in file order, int64, shape (length,).

        Raises:
            DataError: a shard is damaged.
        """
        return torch.from_numpy(self._read(index * length, length))

    def batch(self, step: int, *, batch_size: int, length: int, seed: int) -> Tensor:
        """Batch number `step`: a pure function of (seed, step).

        Every epoch visits each block once, in an order of its own, with the block borders shifted
        by an amount of its own.

        Args:
            step: counts batches from 0.
            batch_size: blocks in a batch.
            length: tokens in a block.
            seed: of order and shift.

        Returns:
            int64, shape (batch_size, length).

        Raises:
            DataError: the split is shorter than one block, or a shard is damaged.
        """
        self.require(length)
        count, rows = self.blocks(length), []
        for index in range(step * batch_size, (step + 1) * batch_size):
            epoch, place = divmod(index, count)
            shift, order = _epoch(seed, epoch, count, self.tokens - count * length)
            rows.append(self._read(shift + int(order[place]) * length, length))
        return torch.from_numpy(np.stack(rows))

    def _read(self, start: int, length: int) -> NDArray[np.int64]:
        """Tokens [start, start + length) of the stream, over shard borders."""
        parts: list[NDArray[Any]] = []
        for shard, path in zip(self.shards, self.paths, strict=True):
            part = shard[max(start, 0) : max(start + length, 0)]
            if len(part) and (largest := int(part.max())) >= self.vocab_size:
                raise DataError(
                    f"{path} is damaged (a token has id {largest}, the vocabulary ends at "
                    f"{self.vocab_size - 1}): prepare the data again."
                )
            parts.append(part)
            start -= len(shard)
        return np.concatenate(parts).astype(np.int64)


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, blocks: int, slack: int) -> tuple[int, NDArray[np.int64]]:
    """Shift of the block borders in [0, slack], and the order of the blocks."""
    generator = np.random.default_rng([seed, epoch])
    return int(generator.integers(slack + 1)), generator.permutation(blocks)


@dataclass(frozen=True, slots=True)
class TokenStore:
    """A prepared directory, open for reading."""

    manifest: dict[str, Any]
    tokenizer_json: str
    train: TokenSplit
    validation: TokenSplit

    @classmethod
    def open(cls, directory: Path, *, verify: bool = False) -> TokenStore:
        """Open what `prepare` wrote.

        Args:
            directory: of the data.
            verify: check every shard against its digest, however large the data is.

        Raises:
            DataError: missing, incomplete, damaged, or of another format.
        """
        remedy = "make it with fsdfm prepare"
        try:
            manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
            tokenizer_json = (directory / "tokenizer.json").read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise DataError(f"{error.filename} is missing: {remedy}.") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{directory} is not prepared data ({error}): {remedy}.") from None
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise DataError(f"{directory} is not prepared data: {remedy}.")
        if manifest.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"{directory} has data format {manifest.get('format_version')}, this version reads "
                f"{FORMAT_VERSION}: prepare it again."
            )
        try:
            # Of the text as written: another version of the library may lay it out differently.
            if digest([tokenizer_json]) != manifest["tokenizer_sha256"]:
                raise DataError(
                    f"{directory}: tokenizer.json is not the one of its tokens: prepare it again."
                )
            splits = [_open_split(directory, manifest, name) for name in SPLITS]
            size = sum(shard.nbytes for split in splits for shard in split.shards)
            if verify or size <= VERIFIED_BYTES:
                _verify(directory, manifest)
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise DataError(f"{directory} is damaged ({error}): prepare it again.") from None
        return cls(manifest, tokenizer_json, *splits)


def _open_split(directory: Path, manifest: dict[str, Any], name: str) -> TokenSplit:
    dtype: np.dtype[Any] = np.dtype({"uint16": "<u2", "uint32": "<u4"}[manifest["dtype"]])
    shards, paths = [], []
    for shard in manifest["splits"][name]["shards"]:
        path = directory / shard["file"]
        if not path.exists() or path.stat().st_size != shard["tokens"] * dtype.itemsize:
            raise DataError(f"{path} is missing or has the wrong size: prepare the data again.")
        shards.append(np.memmap(path, dtype=dtype, mode="r"))
        paths.append(path)
    return TokenSplit(name, tuple(shards), int(manifest["vocab_size"]), tuple(paths))


def _verify(directory: Path, manifest: dict[str, Any]) -> None:
    """Raises DataError where a shard is not the one that was written."""
    for name in SPLITS:
        for shard in manifest["splits"][name]["shards"]:
            if file_digest(directory / shard["file"]) != shard["sha256"]:
                raise DataError(
                    f"{directory / shard['file']} is damaged (its bytes have changed since it was "
                    "prepared): prepare the data again."
                )
