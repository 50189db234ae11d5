"""A smaller vocabulary from a larger one: the tokens that a text uses, with all their parts.

A language model's tokenizer has tokens for much that a given text never says, and each costs a row
of the embedding and of the head. A cut keeps the most frequent tokens, the bytes, and every token
that a kept one is merged from, so that the merges that are left still work and any text still
round-trips.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import ByteLevel

from fsdfm.core.errors import ConfigError, DataError
from fsdfm.text.tokenizer import Tokenizer

TEXTS_AT_ONCE = 1 << 22
"""Characters that are tokenized at a time."""


def count_tokens(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """How often each id occurs in the texts, int64, shape (vocabulary size,)."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    batch: list[str] = []
    size = 0

    def count() -> None:
        for ids in tokenizer.encode_batch(batch):
            np.add.at(counts, np.asarray(ids, dtype=np.int64), 1)

    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= TEXTS_AT_ONCE:
            count()
            batch, size = [], 0
    count()
    return counts


def cut(tokenizer: Tokenizer, counts: np.ndarray[Any, Any], vocab_size: int) -> Tokenizer:
    """The tokenizer with at most `vocab_size` tokens.

    Args:
        tokenizer: a byte-level or byte-fallback BPE.
        counts: how often each of its ids occurs in the texts to come.
        vocab_size: most tokens to keep.

    Returns:
        A tokenizer whose tokens, by their spelling, are some of the old one's, in the same order.

    Raises:
        DataError: a tokenizer of another kind, or one that knows no bytes.
        ConfigError: no room for all bytes and the end of text.
    """
    values = json.loads(tokenizer.to_json())
    model = values["model"]
    if model.get("type") != "BPE":
        raise DataError(
            f"Only a BPE tokenizer can be cut, this one is {model.get('type')}: "
            "keep its whole vocabulary."
        )
    vocabulary: dict[str, int] = model["vocab"]
    alphabet = _alphabet(values)
    eos = next(t for t, i in tokenizer.vocabulary().items() if i == tokenizer.eos_id)
    if vocab_size < (least := len({*alphabet, eos})):
        raise ConfigError(
            f"vocab_size must be at least {least} (the bytes and the end of text), "
            f"got {vocab_size}."
        )
    merges = _merges(model)
    kept = _closure(vocabulary, merges, counts, {*alphabet, eos}, vocab_size)
    # Bytes that the old one lacks come last.
    order = sorted(kept, key=lambda token: (vocabulary.get(token, len(vocabulary)), token))
    if eos not in vocabulary:
        order.remove(eos)
        order.append(eos)
    ids = {token: i for i, token in enumerate(order)}
    model["vocab"] = {t: i for t, i in ids.items() if t in vocabulary or t in alphabet}
    model["merges"] = [
        [left, right]
        for left, right in merges
        if left in ids and right in ids and left + right in ids
    ]
    values["added_tokens"] = [
        {**added, "id": ids[added["content"]]}
        for added in values["added_tokens"]
        if added["content"] in ids
    ]
    values["post_processor"] = None
    return Tokenizer(Backend.from_str(json.dumps(values)), name="the cut tokenizer")


def completed(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with a token for every byte: some models' lack those that they never saw.

    Raises:
        DataError: it is neither byte-level nor falls back to bytes, so that text would get lost.
    """
    values = json.loads(tokenizer.to_json())
    missing = sorted(_alphabet(values) - tokenizer.vocabulary().keys())
    if not missing:
        return tokenizer
    vocabulary = values["model"]["vocab"]
    for token in missing:
        vocabulary[token] = 1 + max(vocabulary.values())
    for added in values["added_tokens"]:  # the library puts those of no vocabulary after it
        if added["content"] not in vocabulary:
            added["id"] += len(missing)
    return Tokenizer(Backend.from_str(json.dumps(values)), name="the completed tokenizer")


def _alphabet(values: Mapping[str, Any]) -> set[str]:
    """The tokens of the 256 bytes in a tokenizer.json, whether it has them all or not.

    Raises:
        DataError: a tokenizer that knows no bytes.
    """
    model = values["model"]
    if model.get("byte_fallback"):
        names = {f"<0x{byte:02X}>" for byte in range(256)}
        spelled = (t if isinstance(t, str) else t[0] for t in model["vocab"])  # Unigram's are pairs
        if names <= set(spelled):
            return names
    elif model.get("type") == "BPE" and '"ByteLevel"' in json.dumps(values.get("decoder")):
        return set(ByteLevel.alphabet())
    raise DataError(
        "The tokenizer knows no bytes, so that not every text could be written: "
        "use one that is byte-level or falls back to bytes."
    )


def _closure(
    vocabulary: Mapping[str, int],
    merges: list[tuple[str, ...]],
    counts: np.ndarray[Any, Any],
    kept: set[str],
    vocab_size: int,
) -> set[str]:
    """The most frequent tokens with all their parts, as many as there is room for."""
    parts: dict[str, tuple[str, ...]] = {}
    for merge in merges:  # a token that several pairs make has the parts of the first
        parts.setdefault("".join(merge), merge)
    names = {i: token for token, i in vocabulary.items()}
    for i in np.argsort(-counts, kind="stable").tolist():
        if counts[i] == 0 or len(kept) >= vocab_size:
            break
        wanted: set[str] = set()
        todo = [names[i]] if i in names else []
        while todo:
            token = todo.pop()
            if token not in kept and token not in wanted:
                wanted.add(token)
                todo += parts.get(token, ())
        if len(kept) + len(wanted) <= vocab_size:
            kept |= wanted
    return kept


def tokens_within(small: Tokenizer, large: Tokenizer) -> list[int | None] | None:
    """The large tokenizer's id of each of the small one's, if that is a cut of it.

    Args:
        small: a tokenizer; it may be the large one itself.
        large: another.

    Returns:
        Ids in the order of the small one's, None for a byte that the large one lacks and for an id
        that names no token; or None for all, where a token or a merge is not the large one's.
    """
    ours, theirs = (json.loads(t.to_json())["model"] for t in (small, large))
    if ours["type"] != theirs["type"]:
        return None
    known, bytes_ = large.vocabulary(), set(ByteLevel.alphabet())
    if not small.vocabulary().keys() <= known.keys() | bytes_:
        return None
    if not set(_merges(ours)) <= set(_merges(theirs)):
        return None
    found: list[int | None] = [None] * small.vocab_size
    for token, i in small.vocabulary().items():
        found[i] = known.get(token)
    return found


def _merges(model: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Pairs that are merged; in files they are lists, or strings with a space between."""
    merges = model.get("merges", ())
    return [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
