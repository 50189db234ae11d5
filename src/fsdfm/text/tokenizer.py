"""Text to token ids and back: byte-level BPE, by the Hugging Face tokenizers library."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fsdfm.errors import ConfigError, DataError

EOS = "<|endoftext|>"
DOCUMENT_BREAK = "\n\n"
SMALLEST_VOCABULARY = 257
"""256 bytes and EOS."""


class Tokenizer:
    """A byte-level BPE: any text survives `decode(encode(text))`.

    Args:
        inner: a tokenizer that knows the token `<|endoftext|>`.

    Raises:
        ConfigError: it does not.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        eos_id = inner.token_to_id(EOS)
        if eos_id is None:
            raise ConfigError(f"The tokenizer has no {EOS} token: add it, or use another.")
        self._inner = inner
        self.eos_id: int = eos_id
        self.vocab_size: int = inner.get_vocab_size(with_added_tokens=True)
        self._json: str = inner.to_str(pretty=False)

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """From the text of a tokenizer.json.

        Raises:
            ConfigError: it is not one, or lacks `<|endoftext|>`.
        """
        try:
            inner = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(f"Not a tokenizer.json ({_first_line(error)}).") from None
        return cls(inner)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """From a tokenizer.json.

        Raises:
            DataError: it cannot be read.
            ConfigError: it is not a tokenizer, or lacks `<|endoftext|>`.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"Cannot read tokenizer {path} ({_first_line(error)}).") from None
        try:
            return cls.from_json(text)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_gpt2_files(cls, vocab: str | Path, merges: str | Path) -> Tokenizer:
        """From GPT-2's vocab.json and merges.txt.

        Raises:
            DataError: a file cannot be read, or is not of this kind.
        """
        try:
            inner = _byte_level(models.BPE.from_file(str(vocab), str(merges)))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"Cannot read {vocab} and {merges} ({_first_line(error)}).") from None
        inner.add_special_tokens([EOS])
        return cls(inner)

    @property
    def fingerprint(self) -> str:
        """sha256 of the JSON: equal for equal tokenizers."""
        return hashlib.sha256(self._json.encode()).hexdigest()

    def to_json(self) -> str:
        """Text of a tokenizer.json."""
        return self._json

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; EOS is not added, and never made from the text's own letters."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, in parallel."""
        # A document that spells out the special token must not end there: encode it in parts.
        if any(EOS in text for text in texts):
            return [self._encode_spelled(text) for text in texts]
        return [e.ids for e in self._inner.encode_batch(list(texts), add_special_tokens=False)]

    def _encode_spelled(self, text: str) -> list[int]:
        cut = len(EOS) // 2
        parts = text.replace(EOS, EOS[:cut] + "\0" + EOS[cut:]).split("\0")
        encoded = self._inner.encode_batch(parts, add_special_tokens=False)
        return [token for part in encoded for token in part.ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; EOS becomes a blank line between documents.

        Args:
            ids: each in [0, vocab_size); ids that the tokenizer does not have are an error.

        Raises:
            ValueError: an id out of range, e.g. a mask id.
        """
        documents: list[list[int]] = [[]]
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"Token id {token} is not in [0, {self.vocab_size}).")
            if token == self.eos_id:
                documents.append([])
            else:
                documents[-1].append(token)
        texts = self._inner.decode_batch([d for d in documents if d], skip_special_tokens=False)
        return DOCUMENT_BREAK.join(texts)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE.

    Args:
        texts: documents to learn merges from; consumed once.
        vocab_size: entries with EOS and the 256 bytes; fewer come out if the text is short.

    Raises:
        ConfigError: vocab_size < 257.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"--vocab-size must be at least {SMALLEST_VOCABULARY} (256 bytes and the end of text), "
            f"got {vocab_size}."
        )
    inner = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(_lines(texts), trainer)
    return Tokenizer(inner)


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Pieces that the trainer can count in parallel; line breaks stay at the end of lines."""
    for text in texts:
        yield from text.splitlines(keepends=True)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
