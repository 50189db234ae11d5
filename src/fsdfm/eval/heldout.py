"""Held-out text, cut into the blocks that an evaluation needs."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from fsdfm.core.errors import ConfigError, DataError
from fsdfm.core.files import digest
from fsdfm.text.corpus import check_files, read_documents
from fsdfm.text.store import TokenStore
from fsdfm.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Documents that no model was trained on (whoever names them answers for that)."""

    name: str
    documents: list[str]

    @classmethod
    def open(cls, path: Path | None) -> HeldOut:
        """Read a text file, a prepared directory's validation split, or the bundled text (None).

        Raises:
            DataError: missing, unreadable or empty.
        """
        if path is None:
            place = Path(str(resources.files("fsdfm") / "assets" / "heldout.jsonl.gz"))
            return cls("bundled", read_texts(place))
        if path.is_dir():
            store = TokenStore.open(path)
            text = store.validation.block(0, store.validation.tokens).tolist()
            tokenizer = Tokenizer.from_json(store.tokenizer_json)
            return cls(f"{path.name} (validation)", _documents(text, tokenizer))
        return cls(path.name, read_texts(path))

    @property
    def sha256(self) -> str:
        """Of the documents."""
        return digest(["\0".join(self.documents)])


def read_texts(path: Path) -> list[str]:
    """The documents of one text file.

    Raises:
        DataError: missing, unreadable, or white space only.
    """
    check_files([path])
    texts = ["".join(pieces) for pieces in read_documents(path)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DataError(f"{path} holds no text: give a file that does.")
    return texts


@dataclass(frozen=True, slots=True)
class Blocks:
    """Held-out tokens in blocks of one length, dealt into two hands that share none."""

    human: list[list[int]]
    """Prompts, originals of infills, and the human row."""
    others: list[list[int]]
    """What fidelity is measured against."""

    @classmethod
    def cut(cls, heldout: HeldOut, tokenizer: Tokenizer, length: int, seed: int) -> Blocks:
        """Documents joined by EOS and cut; the order depends on the seed alone.

        Raises:
            ConfigError: fewer than two blocks.
        """
        stream: list[int] = []
        for ids in tokenizer.encode_batch(heldout.documents):
            stream += [*ids, tokenizer.eos_id]
        count = len(stream) // length
        if count < 2:
            raise ConfigError(
                f"The held-out text ({heldout.name}) has {len(stream):,} tokens, fewer than two "
                f"blocks of {length:,}: take a smaller length or more text as heldout.",
                "length",
                "heldout",
            )
        order = np.random.default_rng(seed).permutation(count).tolist()
        blocks = [stream[i * length : (i + 1) * length] for i in order]
        half = count // 2
        return cls(blocks[:half], blocks[half : 2 * half])


def _documents(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    documents, start = [], 0
    for end in [i for i, token in enumerate(ids) if token == tokenizer.eos_id] + [len(ids)]:
        if text := tokenizer.decode(ids[start:end]):
            documents.append(text)
        start = end + 1
    return documents
