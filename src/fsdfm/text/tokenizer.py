"""Text to token ids and back: a byte-level BPE over the Hugging Face `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from fsdfm.core.errors import ConfigError, DataError
from fsdfm.core.files import digest, one_line

EOS = "<|endoftext|>"
"""The token that ends every document, in tokenizers that are trained here."""
EOS_NAMES = (EOS, "<|end_of_text|>", "</s>", "<eos>")
"""What other families call it; the first that a vocabulary has is taken."""

DOCUMENT_SEPARATOR = "\n\n"
"""What `Tokenizer.decode` puts between documents."""

UNKNOWN = "\U000f0000"
"""For private use: a character that no vocabulary of whole words or pieces has."""

HALF = "\ufffd"
"""What a character becomes that is cut."""

SMALLEST_VOCABULARY = 257
"""One token per byte, and EOS."""


class Tokenizer:
    """A tokenizer with an end-of-document token.

    Text is not normalised: with a byte-level BPE (all that this package trains, and GPT-2's),
    decode(encode(text)) == text. Text is never a control token, whatever the model: the name of one
    inside a text ("<|endoftext|>", "[CLS]") is encoded as parts that are none. EOS itself is only
    ever added by the packing.
    """

    def __init__(self, backend: Backend, *, name: str) -> None:
        """Wrap a backend.

        Args:
            backend: the Hugging Face tokenizer; its truncation and padding are switched off.
            name: what to call it in an error message.

        Raises:
            DataError: the vocabulary has no "<|endoftext|>", or no other token for unknown
                text.
        """
        backend.no_truncation()
        backend.no_padding()
        # "<|endoftext|>" in a document is text, not the end of the document.
        backend.encode_special_tokens = True
        known: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        eos = next((e for e in EOS_NAMES if e in known), None)
        if eos is None:
            raise DataError(f'{name} has no "{EOS}" token: add one, or use another tokenizer.')
        eos_id = known[eos]
        added = backend.get_added_tokens_decoder().get(eos_id)
        if added is not None and not added.special:  # else the switch above would pass it over
            backend.add_special_tokens([eos])
        self.eos_id: int = eos_id
        self._backend = backend
        # Ids may have gaps: the network needs a row for each up to the highest.
        self.vocab_size: int = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        self._json: str = backend.to_str()
        self._controls = self._control_ids()
        try:
            unknown = backend.encode(UNKNOWN, add_special_tokens=False).ids
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(
                f"{name} fails at text that it does not know ({one_line(error)}): give a tokenizer "
                "with an unknown token."
            ) from error
        if eos_id in unknown:
            raise DataError(
                f'{name} reads text that it does not know as "{EOS}", which ends a document: give '
                "a tokenizer with an unknown token of its own."
            )

    @classmethod
    def from_json(cls, text: str, *, name: str = "the tokenizer.json") -> Tokenizer:
        """Read the contents of a tokenizer.json.

        Args:
            text: the JSON.
            name: what to call it in an error message.

        Raises:
            DataError: it is not a tokenizer, or has no "<|endoftext|>".
        """
        try:
            backend = Backend.from_str(text)
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(
                f"{name} is not a Hugging Face tokenizer.json ({one_line(error)}): give another."
            ) from error
        return cls(backend, name=name)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json.

        Raises:
            DataError: the file cannot be read, is not a tokenizer, or has no "<|endoftext|>".
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise DataError(f"{path} does not exist: give the path of a tokenizer.json.") from None
        except IsADirectoryError:
            raise DataError(f"{path} is a directory: give the tokenizer.json inside it.") from None
        except OSError as error:
            raise DataError(f"Cannot read {path}: {one_line(error)}.") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not a tokenizer.json: it is not UTF-8 text.") from error
        return cls.from_json(text, name=str(path))

    @classmethod
    def from_gpt2_files(cls, vocab: str | Path, merges: str | Path) -> Tokenizer:
        """Build GPT-2's tokenizer from its two files.

        Args:
            vocab: vocab.json (encoder.json).
            merges: merges.txt (vocab.bpe).

        Raises:
            DataError: a file cannot be read, or is not one of GPT-2's.
        """
        for path in (vocab, merges):
            if not Path(path).is_file():
                raise DataError(f"{path} is not a file: give GPT-2's vocab.json and merges.txt.")
        try:
            model = models.BPE.from_file(str(vocab), str(merges))
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(
                f"{vocab} and {merges} are not a BPE vocabulary and its merges "
                f"({one_line(error)}): give GPT-2's vocab.json and merges.txt."
            ) from error
        backend = _byte_level(model)
        if backend.token_to_id(EOS) is not None:  # else the constructor refuses it
            backend.add_special_tokens([EOS])
        return cls(backend, name=str(vocab))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of `to_json()`, in hexadecimal: equal for equal tokenizers."""
        return digest([self._json])

    def to_json(self) -> str:
        """The contents of a tokenizer.json, EOS included, on one line."""
        return self._json

    def vocabulary(self) -> dict[str, int]:
        """Ids by the spelling of their tokens, with those that were added."""
        known: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return known

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without EOS.

        Raises:
            DataError: the text is not Unicode (a command line that is not UTF-8 gives such texts).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"Character {error.start} of the text is half of a surrogate pair: use UTF-8."
            ) from error
        return self._as_text(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without EOS; on all cores."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._as_text(encoding.ids) for encoding in encodings]

    def _control_ids(self) -> frozenset[int]:
        """Special tokens and EOS; not the one for unknown text, which text may well become."""
        special = {i for i, t in self._backend.get_added_tokens_decoder().items() if t.special}
        model = self._backend.model
        if isinstance(model, models.Unigram):
            unknown = json.loads(self._json)["model"].get("unk_id")
        else:
            unknown = self._backend.token_to_id(getattr(model, "unk_token", None) or "")
        return frozenset((special - {unknown}) | {self.eos_id})

    def _as_text(self, ids: list[int]) -> list[int]:
        """The ids of a text, those of control tokens replaced by what spells them.

        A byte-level BPE has none here, but a model that knows whole words may find a control token
        among them.
        """
        if self._controls.isdisjoint(ids):
            return ids
        return [part for i in ids for part in ([i] if i not in self._controls else self._spell(i))]

    def _spell(self, control: int) -> list[int]:
        """Ids of the halves of a control token's name, or of theirs, so that none is a control.

        Raises:
            DataError: the name is a single character.
        """
        name = self._backend.id_to_token(control) or ""
        if len(name) < 2:
            raise DataError(
                f"A text holds {name!r}, which is a control token of its tokenizer: give another "
                "tokenizer, or take the character out."
            )
        halves = name[: len(name) // 2], name[len(name) // 2 :]
        return self._as_text([t.id for half in halves for t in self._backend.model.tokenize(half)])

    def decode(self, ids: Iterable[int]) -> str:
        r"""Text of token ids; EOS is left out and ends a document.

        Documents that are not empty are joined by a blank line ("\n\n"), so ids with an EOS
        between documents do not decode to something that encodes to the same ids. Bytes that are
        not whole UTF-8 characters become U+FFFD.

        Args:
            ids: each in [0, vocab_size).

        Raises:
            ValueError: an id is out of range (a mask id, say): never the user's doing.
        """
        return DOCUMENT_SEPARATOR.join(self._documents(list(ids)))

    def character_cut(self, ids: Sequence[int], near: int) -> int:
        """The last place at or before `near` where ids can be cut without cutting a character.

        Args:
            ids: each in [0, vocab_size).
            near: from 0 to their number.
        """
        while self._cuts_a_character(ids, near):
            near -= 1
        return near

    def _cuts_a_character(self, ids: Sequence[int], place: int) -> bool:
        before, after = list(ids[max(0, place - 4) : place]), list(ids[place : place + 4])
        while self.eos_id in before:
            before = before[before.index(self.eos_id) + 1 :]
        if self.eos_id in after:
            after = after[: after.index(self.eos_id)]
        # A character has four bytes at most, and what is left of one becomes U+FFFD.
        apart = self._backend.decode(before) + self._backend.decode(after)
        return self._backend.decode(before + after).count(HALF) < apart.count(HALF)

    def _documents(self, ids: list[int]) -> Iterator[str]:
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            raise ValueError(
                f"decode needs ids in [0, {self.vocab_size}), got {min(ids)} to {max(ids)}."
            )
        for is_eos, group in groupby(ids, key=self.eos_id.__eq__):
            if not is_eos:
                yield self._backend.decode(list(group))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE.

    Args:
        texts: the sample to train on; taken one at a time, so it may be larger than memory.
        vocab_size: entries wanted, at least 257 (the bytes and EOS); fewer come out when the
            sample has fewer pairs that occur twice.

    Raises:
        ConfigError: vocab_size is below 257.
    """
    check_vocab_size(vocab_size)
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend, name="the trained tokenizer")


def check_vocab_size(vocab_size: int) -> None:
    """Refuse a vocabulary without room for every byte and EOS.

    Raises:
        ConfigError: vocab_size is below 257.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"A byte-level vocabulary needs {SMALLEST_VOCABULARY} entries or more "
            f"(256 bytes and {EOS}), got {vocab_size}: choose a larger vocabulary size."
        )


def _byte_level(model: models.BPE) -> Backend:
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend
