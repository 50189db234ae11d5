"""A cut vocabulary: whole parts, valid merges, any bytes; and tokenizers that cannot be cut."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from language_models import PROSE
from language_models import tokenizer as trained
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel

from fsdfm.core.errors import ConfigError, DataError
from fsdfm.text.tokenizer import EOS, Tokenizer, train_bpe
from fsdfm.text.vocabulary import completed, count_tokens, cut, tokens_within

BYTES = sorted(ByteLevel.alphabet())
HERE = [text for text in PROSE if "inn" in text]
"""What the cuts are made for."""


def with_changes(tokenizer: Tokenizer, change: Callable[[dict[str, Any]], None]) -> Tokenizer:
    values = json.loads(tokenizer.to_json())
    change(values)
    return Tokenizer.from_json(json.dumps(values))


def added_eos() -> Tokenizer:
    """The end of text is no entry of the model's vocabulary (Qwen): it comes after."""

    def change(values: dict[str, Any]) -> None:
        vocabulary = values["model"]["vocab"]
        (eos,) = (a for a in values["added_tokens"] if a["content"] == EOS)
        del vocabulary[EOS]
        order = sorted(vocabulary, key=vocabulary.get)
        values["model"]["vocab"] = {token: i for i, token in enumerate(order)}
        eos["id"] = len(order)

    return with_changes(trained(), change)


def plain_eos() -> Tokenizer:
    """The end of text is an entry of the vocabulary and nothing else."""
    return with_changes(trained(), lambda values: values.update(added_tokens=[]))


def without_some_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """As a vocabulary that was cut to the bytes that its text has (SmolLM2)."""

    def change(values: dict[str, Any]) -> None:
        vocabulary = values["model"]["vocab"]
        dropped = set(BYTES[150:200]) & vocabulary.keys()
        assert not any(token in dropped for pair in values["model"]["merges"] for token in pair)
        order = [t for t in sorted(vocabulary, key=vocabulary.get) if t not in dropped]
        values["model"]["vocab"] = {token: i for i, token in enumerate(order)}
        for added in values["added_tokens"]:
            added["id"] = values["model"]["vocab"].get(added["content"], len(order))

    return with_changes(tokenizer, change)


def byte_fallback(vocab_size: int = 420) -> Tokenizer:
    """As SentencePiece's are after conversion: characters, and bytes for those that are not there.

    Every pair of tokens that makes a token is a merge, by the rank of what it makes.
    """
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<unk>", "<s>", "</s>", *names], show_progress=False
    )
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    backend.train_from_iterator(PROSE, trainer)
    values = json.loads(backend.to_str())
    values["pre_tokenizer"] = None
    values["added_tokens"] = [a for a in values["added_tokens"] if a["content"] not in names]
    vocabulary = values["model"]["vocab"]
    values["model"]["merges"] = [
        (token[:i], token[i:])
        for token in sorted(vocabulary, key=vocabulary.get)
        for i in range(1, len(token))
        if not token.startswith("<") and {token[:i], token[i:]} <= vocabulary.keys()
    ]
    return Tokenizer.from_json(json.dumps(values))


LARGE = {
    "byte-level": trained(),
    "end of text added": added_eos(),
    "end of text plain": plain_eos(),
    "bytes missing": without_some_bytes(trained()),
    "byte fallback": byte_fallback(),
}
SIZES = {"bytes missing": 262, "byte fallback": 320}


def cut_of(kind: str, vocab_size: int | None = None) -> Tokenizer:
    large = LARGE[kind]
    counts = count_tokens(large, HERE)
    return cut(large, counts, vocab_size or SIZES.get(kind, 280))


CUTS = {kind: cut_of(kind) for kind in LARGE}


def spec(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(tokenizer.to_json())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]


def base(kind: str, vocabulary: dict[str, int]) -> set[str]:
    """Tokens that need no parts."""
    if kind == "byte fallback":
        return {t for t in vocabulary if len(t) == 1 or t.startswith("<0x")} | {"</s>"}
    return {*BYTES, EOS}


# What a cut is.


@pytest.mark.parametrize("kind", CUTS)
def test_every_kept_token_can_be_made_of_kept_parts(kind: str) -> None:
    vocabulary, merges = spec(CUTS[kind])
    made = base(kind, vocabulary)
    assert made & vocabulary.keys() > set() and len(vocabulary) > len(made & vocabulary.keys())
    for left, right in [*merges] * 20:  # until nothing more comes
        if left in made and right in made:
            made.add(left + right)
    assert vocabulary.keys() <= made


@pytest.mark.parametrize("kind", CUTS)
def test_a_cut_is_of_the_size_asked_for_in_the_old_order_with_the_end_of_text(kind: str) -> None:
    small, large = CUTS[kind], LARGE[kind]
    assert small.vocab_size == SIZES.get(kind, 280) < large.vocab_size
    names, old = small.vocabulary(), large.vocabulary()
    assert sorted(names.values()) == list(range(small.vocab_size))
    known = [t for t in sorted(names, key=names.get) if t in old]  # type: ignore[arg-type]
    assert [old[t] for t in known] == sorted(old[t] for t in known)
    assert set(names) - set(old) <= set(BYTES)
    (eos,) = (t for t, i in old.items() if i == large.eos_id)
    assert names[eos] == small.eos_id
    bytes_ = {f"<0x{b:02X}>" for b in range(256)} if kind == "byte fallback" else set(BYTES)
    assert bytes_ <= names.keys()
    assert spec(small)[1] == [m for m in spec(large)[1] if {*m, "".join(m)} <= names.keys()]


def of_merges(*merges: str) -> Tokenizer:
    """A byte-level BPE with these merges, written with a space."""
    pairs = [(left, right) for left, right in (merge.split() for merge in merges)]
    names = [EOS, *BYTES, *dict.fromkeys("".join(pair) for pair in pairs)]
    backend = Backend(models.BPE({token: i for i, token in enumerate(names)}, pairs))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOS])
    return Tokenizer(backend, name="it")


def test_a_token_that_several_pairs_make_brings_the_parts_of_the_first() -> None:
    large = of_merges("a b", "b c", "ab c", "a bc", "d e")
    small = cut(large, count_tokens(large, ["abc"] * 9), 300)
    vocabulary, merges = spec(small)
    assert vocabulary.keys() == {EOS, *BYTES, "ab", "abc"}
    assert merges == [("a", "b"), ("ab", "c")]
    assert small.encode("abc") == [vocabulary["abc"]]
    few = cut(large, count_tokens(large, ["abc"] * 9), 258)  # no room for it and its part
    assert spec(few)[0].keys() == {EOS, *BYTES} and not spec(few)[1]


def test_a_tokenizer_with_the_same_tokens_and_other_merges_is_no_cut() -> None:
    large = of_merges("a b", "b c", "ab c")
    other = of_merges("a b", "b c", "a bc")
    assert other.vocabulary() == large.vocabulary()
    assert tokens_within(other, large) is None
    assert tokens_within(of_merges("a b"), large) is not None


def test_the_most_frequent_tokens_are_kept() -> None:
    large, small = LARGE["byte-level"], CUTS["byte-level"]
    counts = count_tokens(large, HERE)
    names = {i: t for t, i in large.vocabulary().items()}
    frequent = [names[i] for i in np.argsort(-counts, kind="stable")[:8]]
    assert set(frequent) <= small.vocabulary().keys()
    dropped = [t for t in large.vocabulary() if t not in small.vocabulary()]
    assert dropped and all(
        counts[large.vocabulary()[t]] <= counts[large.vocabulary()[frequent[7]]] for t in dropped
    )


@pytest.mark.parametrize("kind", LARGE)
def test_counts_are_those_of_encoding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fsdfm.text.vocabulary.TEXTS_AT_ONCE", 150)  # two texts at a time
    large = LARGE[kind]
    ids = [i for text in PROSE for i in large.encode(text)]
    wanted = np.bincount(ids, minlength=large.vocab_size)
    assert (count_tokens(large, iter(PROSE)) == wanted).all()
    assert not count_tokens(large, []).any()


# Text through a cut.

TEXTS = st.lists(st.text() | st.sampled_from([*PROSE, EOS, "</s>", "\0", "\r\n", "é😀"])).map(
    "".join
)


@pytest.mark.parametrize("kind", CUTS)
@settings(deadline=None, max_examples=40)
@given(text=TEXTS)
def test_any_text_survives_a_cut(kind: str, text: str) -> None:
    if kind == "byte fallback":  # its own sign for a space is one
        text = text.replace("▁", "_")
    small = CUTS[kind]
    ids = small.encode(text)
    assert small.decode(ids) == text and small.eos_id not in ids
    assert all(0 <= i < small.vocab_size for i in ids)


def greedy(word: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """BPE as it is defined: merge the pair of the lowest rank, leftmost first, until none is."""
    rank = {pair: i for i, pair in enumerate(merges)}
    while True:
        pairs = [(rank[p], i) for i, p in enumerate(itertools.pairwise(word)) if p in rank]
        if not pairs:
            return word
        _, i = min(pairs)
        word = [*word[:i], word[i] + word[i + 1], *word[i + 2 :]]


@pytest.mark.parametrize("kind", CUTS)
def test_encoding_is_greedy_merging_with_the_merges_of_the_cut(kind: str) -> None:
    small = CUTS[kind]
    vocabulary, merges = spec(small)
    for text in (*PROSE[:3], "shouted strangers müssen 😀 went  upstairs"):
        if kind == "byte fallback":
            whole = "▁" + text.replace(" ", "▁")
            parts = [
                [c] if c in vocabulary else [f"<0x{b:02X}>" for b in c.encode()] for c in whole
            ]
            words = [[token for part in parts for token in part]]
        else:
            split = ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
            words = [list(word) for word, _ in split]
        tokens = [t for word in words for t in greedy(word, merges)]
        assert small.encode(text) == [vocabulary[t] for t in tokens]
        assert len(tokens) > len(LARGE[kind].encode(text)) or text in HERE


@pytest.mark.parametrize("kind", ["byte-level", "end of text added", "byte fallback"])
def test_a_cut_with_room_for_all_encodes_what_it_was_made_for_as_before(kind: str) -> None:
    large = LARGE[kind]
    small = cut(large, count_tokens(large, HERE), large.vocab_size)
    back = tokens_within(small, large)
    assert back is not None and small.vocab_size <= large.vocab_size
    for text in HERE:
        assert [back[i] for i in small.encode(text)] == large.encode(text)


def test_a_cut_of_a_cut_is_one() -> None:
    once = CUTS["byte-level"]
    again = cut(once, count_tokens(once, HERE), 265)
    assert again.vocab_size == 265
    assert tokens_within(again, LARGE["byte-level"]) is not None


# Refusals.


@pytest.mark.parametrize("kind", ["byte-level", "bytes missing", "end of text added"])
def test_a_cut_without_room_for_the_bytes_is_refused(kind: str) -> None:
    assert cut_of(kind, 257).vocab_size == 257
    for size in (256, 100, 0, -3):
        with pytest.raises(ConfigError, match=rf"at least 257 .*got {size}"):
            cut(LARGE[kind], count_tokens(LARGE[kind], HERE), size)


def word_piece() -> Tokenizer:
    backend = Backend(models.WordPiece({EOS: 0, "[UNK]": 1, "the": 2}, unk_token="[UNK]"))
    return Tokenizer(backend, name="it")


def unigram(byte_fallback: bool = False) -> Tokenizer:
    names = [f"<0x{b:02X}>" for b in range(256)]
    pieces = [(EOS, 0.0), ("<unk>", 0.0), ("a", -1.0), *((n, -5.0) for n in names)]
    return Tokenizer(Backend(models.Unigram(pieces, 1, byte_fallback)), name="it")


def no_bytes() -> Tokenizer:
    return Tokenizer(
        Backend(models.BPE({EOS: 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")])), name="it"
    )


@pytest.mark.parametrize("other", [word_piece, unigram, lambda: unigram(True), no_bytes])
def test_other_kinds_of_tokenizers_give_one_line(other: Callable[[], Tokenizer]) -> None:
    tokenizer = other()
    with pytest.raises(DataError) as caught:
        cut(tokenizer, np.ones(tokenizer.vocab_size, dtype=np.int64), 300)
    kind = json.loads(tokenizer.to_json())["model"]["type"]
    said = "knows no bytes" if kind == "BPE" else f"this one is {kind}"
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("other", [word_piece, unigram, no_bytes])
def test_a_tokenizer_that_would_lose_text_is_not_completed(other: Callable[[], Tokenizer]) -> None:
    with pytest.raises(DataError, match="knows no bytes"):
        completed(other())


# Bytes that are missing.


def test_a_whole_tokenizer_is_complete() -> None:
    for tokenizer in (LARGE["byte-level"], LARGE["byte fallback"], unigram(True)):
        assert completed(tokenizer) is tokenizer


@pytest.mark.parametrize("start", [trained, added_eos, plain_eos])
def test_a_completed_tokenizer_has_one_new_token_for_each_missing_byte(
    start: Callable[[], Tokenizer],
) -> None:
    part = without_some_bytes(start())
    lost = "".join(chr(c) for c in range(0x80, 0x800, 7)) + "😀"
    assert part.decode(part.encode(lost)) != lost
    whole = completed(part)
    assert whole.decode(whole.encode(lost)) == lost and whole.eos_id not in whole.encode(lost)
    old, new = part.vocabulary(), whole.vocabulary()
    assert sorted(new.values()) == list(range(len(new)))  # no two of one id
    assert new.keys() - old.keys() == set(BYTES) - old.keys()
    assert all(new[t] == i for t, i in old.items() if t != EOS)
    for text in PROSE[:3]:
        assert whole.encode(text) == part.encode(text)
    assert completed(whole) is whole


# Whose cut it is.


@pytest.mark.parametrize("kind", LARGE)
def test_a_cut_knows_its_tokens_in_the_large_vocabulary(kind: str) -> None:
    large = LARGE[kind]
    for small in (large, CUTS[kind], completed(large)):
        found = tokens_within(small, large)
        assert found is not None and len(found) == small.vocab_size
        names, old = small.vocabulary(), large.vocabulary()
        assert {t: found[i] for t, i in names.items()} == {t: old.get(t) for t in names}
        assert found[small.eos_id] == large.eos_id
        new = [t for t in names if found[names[t]] is None]
        assert not set(new) & old.keys() and bool(new) == (
            kind == "bytes missing" and small is not large
        )


def test_another_tokenizer_is_none() -> None:
    large = LARGE["byte-level"]
    assert (
        tokens_within(train_bpe(["quite another text, with other words in it. "] * 9, 300), large)
        is None
    )
    assert tokens_within(large, CUTS["byte-level"]) is None
    assert tokens_within(LARGE["byte fallback"], large) is None
    assert tokens_within(word_piece(), large) is None
    assert tokens_within(large, word_piece()) is None


def test_an_id_that_names_no_token_has_none() -> None:
    def gap(values: dict[str, Any]) -> None:
        vocabulary = values["model"]["vocab"]
        last = max(vocabulary, key=vocabulary.get)
        vocabulary[last] += 2

    gapped = with_changes(trained(), gap)
    found = tokens_within(gapped, LARGE["byte-level"])
    assert found is not None and found[-3:-1] == [None, None] and found[-1] == 319


def test_merges_may_be_written_as_strings() -> None:
    def as_strings(values: dict[str, Any]) -> None:
        values["model"]["merges"] = [" ".join(pair) for pair in values["model"]["merges"]]

    text = json.loads(LARGE["byte-level"].to_json())
    as_strings(text)
    other = Tokenizer.from_json(json.dumps(text))
    assert tokens_within(other, LARGE["byte-level"]) == list(range(320))
