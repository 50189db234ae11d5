"""What a prepared directory holds, in words and numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fsdfm.text.layout import SPLITS
from fsdfm.text.store import TokenStore
from fsdfm.text.tokenizer import Tokenizer

DROPPED = {"blank": "blank", "short": "too short", "duplicates": "duplicates"}


def summary(manifest: dict[str, Any]) -> str:
    """One line: tokens, documents, bytes a token, and what was dropped."""
    train, validation = (manifest["splits"][name] for name in SPLITS)
    in_both = manifest["split_documents"]
    documents = train["documents"] + validation["documents"] - in_both
    split = ", one of them split (its end is for validation)" if in_both else ""
    left = manifest.get("dropped", {})
    dropped = ", ".join(f"{left[key]:,} {word}" for key, word in DROPPED.items() if left.get(key))
    per_token = (train["text_bytes"] + validation["text_bytes"]) / (
        train["tokens"] + validation["tokens"]
    )
    return (
        f"{train['tokens']:,} training and {validation['tokens']:,} validation tokens "
        f"of {documents:,} document{'s' * (documents != 1)}{split}, "
        f"{per_token:.2f} bytes a token, vocabulary {manifest['vocab_size']:,}"
        + f"; dropped: {dropped}"
        * bool(dropped)
    )


@dataclass(frozen=True, slots=True)
class Row:
    """Counts of one split."""

    split: str
    documents: int
    tokens: int
    text_bytes: int
    shards: int

    @property
    def bytes_per_token(self) -> float:
        """Of text; the ends of documents count as tokens."""
        return self.text_bytes / max(1, self.tokens)


def rows(manifest: dict[str, Any]) -> list[Row]:
    """The splits."""
    return [
        Row(name, s["documents"], s["tokens"], s["text_bytes"], len(s["shards"]))
        for name, s in manifest["splits"].items()
    ]


def decoded(store: TokenStore, count: int, length: int, seed: int) -> Iterator[str]:
    """Texts of blocks of the training split, at random and each at most once."""
    tokenizer = Tokenizer.from_json(store.tokenizer_json)
    length = min(length, store.train.tokens)
    blocks = store.train.blocks(length)
    for index in np.random.default_rng(seed).permutation(blocks)[:count]:
        yield tokenizer.decode(store.train.block(int(index), length).tolist())
