"""What preparing text can be told."""

from __future__ import annotations

from dataclasses import dataclass

from fsdfm.core.options import AT_LEAST_0, AT_LEAST_1, POSITIVE, Range, check, option
from fsdfm.text.tokenizer import SMALLEST_VOCABULARY


@dataclass(frozen=True, slots=True)
class PrepareSettings:
    """How documents become shards."""

    vocab_size: int | None = option(
        None, within=Range(SMALLEST_VOCABULARY), form="N", unset="8192, or all of the tokenizer"
    )
    """Entries of the byte-level BPE that is trained on the files; of a given tokenizer, how many to
    keep: those that the files use most, and their parts."""
    validation_fraction: float = option(0.02, within=Range(0, 1, above=True, below=True))
    """Chance that a document is held out for validation. Where chance leaves a split without a
    document (one book, say), this share of the text at its end is held out instead."""
    seed: int = option(0, within=AT_LEAST_0)
    """Decides which documents those are."""
    shard_tokens: int = option(1 << 27, within=AT_LEAST_1)
    """Most tokens in one shard."""
    tokenizer_bytes: int = option(200_000_000, within=AT_LEAST_1)
    """Most text that a tokenizer is trained on: the first of the training text."""
    field: str = "text"
    """Column of a table, or field of a .jsonl file's objects, that holds the text."""
    weights: tuple[float, ...] = option((), within=POSITIVE)
    """How often the documents of each source are seen in training, in the order of the sources: 2
    is twice, 0.5 a random half of them. Without it, all once."""
    min_length: int = option(0, within=AT_LEAST_0)
    """Documents of fewer characters are dropped."""
    duplicates: str = option("drop", choices=("drop", "keep"))
    """What happens to a document that came before, letter for letter. Only documents of up to a
    million characters are compared."""

    def __post_init__(self) -> None:
        check(self)
