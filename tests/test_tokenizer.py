"""Text to token ids and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from fsdfm.core.errors import ConfigError, DataError
from fsdfm.text.tokenizer import EOS, Tokenizer, train_bpe

GPT2 = Path(__file__).parents[2] / "shared" / "tokenizers" / "gpt2"
SAMPLE = ["It was the best of times,\n  it was the worst of times.\n"] * 9
TOKENIZER = train_bpe(SAMPLE, 270)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    if not (GPT2 / "vocab.json").exists():
        pytest.skip("GPT-2's vocabulary is not here")
    return Tokenizer.from_gpt2_files(GPT2 / "vocab.json", GPT2 / "merges.txt")


# Texts in which the end of text is spelled, whole or in part, are likely here.
TEXTS = st.lists(st.text() | st.sampled_from([EOS, EOS[:6], EOS[6:], "\0", "\r\n"])).map("".join)


@settings(deadline=None, max_examples=60)
@given(TEXTS)
def test_any_text_survives_encoding_and_decoding(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.eos_id not in ids


@pytest.mark.parametrize("text", [EOS, f"a{EOS}b{EOS}", f"{EOS}{EOS}", f"a\0b{EOS}c\0", "", "\0"])
def test_a_text_that_spells_eos_round_trips_without_an_eos_id(text: str, gpt2: Tokenizer) -> None:
    for tokenizer in (TOKENIZER, gpt2):
        ids = tokenizer.encode(text)
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode(ids) == text


def test_a_batch_encodes_as_its_texts_do() -> None:
    texts = ["best of times", "", f"the {EOS} of", "\0 worst", "é😀"]
    for batch in (texts, texts[:2]):  # with and without a text that spells EOS
        assert TOKENIZER.encode_batch(batch) == [TOKENIZER.encode(text) for text in batch]
    assert TOKENIZER.encode_batch([]) == []


def test_eos_decodes_to_a_blank_line_between_documents() -> None:
    one, two, eos = TOKENIZER.encode("one"), TOKENIZER.encode("two"), TOKENIZER.eos_id
    assert TOKENIZER.decode([*one, eos, *two, eos]) == "one\n\ntwo"
    assert TOKENIZER.decode([eos, eos, *one, eos, eos, *two]) == "one\n\ntwo"
    assert TOKENIZER.decode([eos]) == TOKENIZER.decode([]) == ""


def test_a_cut_at_a_character_is_the_last_that_cuts_none() -> None:
    tokenizer = train_bpe([""], 257)  # a token for each byte
    text, spare = "aé東😀\ufffdz", tokenizer.encode("東")[:2]
    ids = tokenizer.encode(text)
    whole = {len(text[:k].encode()) for k in range(len(text) + 1)}
    for near in range(len(ids) + 1):
        cut = tokenizer.character_cut(ids, near)
        assert cut == max(place for place in whole if place <= near)
        assert tokenizer.decode(ids[:cut]) + tokenizer.decode(ids[cut:]) == text
    # Half a character stays in one piece; a stray byte and the end of a document are pieces.
    eos = tokenizer.eos_id
    for others, cuts in (
        ([*spare, *spare], [0, 0, 2, 2, 4]),
        ([*spare, eos, *spare], [0, 0, 2, 3, 3]),
        ([eos, eos, ids[2], ids[2]], [0, 1, 2, 3, 4]),
    ):
        assert [tokenizer.character_cut(others, k) for k in range(5)] == cuts


@settings(deadline=None, max_examples=40)
@given(TEXTS, st.integers(0, 30))
def test_what_is_cut_at_a_character_makes_up_the_text(text: str, near: int) -> None:
    ids = TOKENIZER.encode(text)
    near = min(near, len(ids))
    cut = TOKENIZER.character_cut(ids, near)
    assert near - 3 <= cut <= near
    assert TOKENIZER.decode(ids[:cut]) + TOKENIZER.decode(ids[cut:]) == text


def test_an_id_out_of_range_is_refused() -> None:
    for wrong in (TOKENIZER.vocab_size, -1):  # the first is what a mask has
        with pytest.raises(ValueError, match=rf"\[0, 270\).*{wrong}"):
            TOKENIZER.decode([0, wrong])


def test_training_gives_the_size_asked_for_or_less_and_is_repeatable() -> None:
    assert TOKENIZER.vocab_size == 270
    assert train_bpe(["ab"], 5000).vocab_size < 300
    assert train_bpe(SAMPLE, 270).to_json() == TOKENIZER.to_json()
    assert len(TOKENIZER.encode("the worst of times")) < len("the worst of times")


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    assert train_bpe(SAMPLE, 257).vocab_size == 257
    with pytest.raises(ConfigError, match=r"257.*256"):
        train_bpe(SAMPLE, 256)


def test_fingerprints_are_equal_for_equal_tokenizers_only() -> None:
    again = Tokenizer.from_json(TOKENIZER.to_json())
    assert again.fingerprint == TOKENIZER.fingerprint
    assert train_bpe(SAMPLE, 269).fingerprint != TOKENIZER.fingerprint
    spread = json.dumps(json.loads(TOKENIZER.to_json()), indent=2)
    assert Tokenizer.from_json(spread).fingerprint == TOKENIZER.fingerprint


def test_json_and_file_keep_the_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(TOKENIZER.to_json(), encoding="utf-8")
    for again in (Tokenizer.from_json(TOKENIZER.to_json()), Tokenizer.from_file(path)):
        assert (again.eos_id, again.vocab_size) == (TOKENIZER.eos_id, TOKENIZER.vocab_size)
        assert again.encode("worst of times") == TOKENIZER.encode("worst of times")


def test_gpt2_is_gpt2(gpt2: Tokenizer) -> None:
    assert gpt2.encode("Hello world") == [15496, 995]
    assert (gpt2.eos_id, gpt2.vocab_size) == (50256, 50257)
    again = Tokenizer.from_json(gpt2.to_json())
    assert (again.eos_id, again.fingerprint) == (50256, gpt2.fingerprint)
    assert again.decode(again.encode(text := "naïve\t\n\n  – 東京 😀")) == text


def test_truncation_and_padding_of_a_foreign_tokenizer_are_switched_off() -> None:
    backend = Backend.from_str(TOKENIZER.to_json())
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    tokenizer = Tokenizer.from_json(backend.to_str())
    assert tokenizer.encode("zq" * 9) == TOKENIZER.encode("zq" * 9)
    assert tokenizer.fingerprint == TOKENIZER.fingerprint


def test_a_foreign_eos_that_is_not_marked_special_is_never_made_from_text() -> None:
    value = json.loads(TOKENIZER.to_json())
    value["added_tokens"][0]["special"] = False
    tokenizer = Tokenizer.from_json(json.dumps(value))
    ids = tokenizer.encode(f"a{EOS}b")
    assert tokenizer.eos_id == TOKENIZER.eos_id
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == f"a{EOS}b"


def unigram() -> Backend:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>", EOS], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator([*SAMPLE, "< | endoftext >"], trainer)
    return backend


def word_level(unknown: str = "<unk>") -> Backend:
    backend = Backend(models.WordLevel(unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(
        special_tokens=["<unk>", EOS, "[CLS]", "\N{PILE OF POO}"], show_progress=False
    )
    backend.train_from_iterator(SAMPLE, trainer)
    return backend


def word_piece() -> Backend:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
    special = ["[UNK]", "[CLS]", EOS, "<|endo"]  # halves of names may be names
    trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=special, show_progress=False)
    backend.train_from_iterator(SAMPLE, trainer)
    return backend


@pytest.mark.parametrize("make", [unigram, word_level, word_piece])
def test_a_control_token_is_never_made_from_text(make: Callable[[], Backend]) -> None:
    backend = make()
    tokenizer = Tokenizer.from_json(backend.to_str())
    known = {backend.token_to_id(name) for name in (EOS, "[CLS]", "<|endo")} - {None}
    texts = [EOS, f"the {EOS} of [CLS] times", f"{EOS}{EOS} <|endo", "<unk> [UNK] \n\0 best"]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids and not known & set(ids), text
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode("the times") == backend.encode("the times").ids
    if make is unigram:
        assert EOS in tokenizer.decode(tokenizer.encode(f"the {EOS} of"))


def test_unknown_text_may_become_the_unknown_token_but_not_eos() -> None:
    tokenizer = Tokenizer.from_json(word_level().to_str())
    assert tokenizer.encode("the zebra <unk>")[1:] == [0, 0]
    with pytest.raises(DataError) as caught:
        Tokenizer.from_json(word_level(unknown=EOS).to_str(), name="x.json")
    assert str(caught.value).startswith(f'x.json reads text that it does not know as "{EOS}"')
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_fails_at_unknown_text_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"^x\.json fails at text that it does not know \(WordLevel"
    ):
        Tokenizer.from_json(word_level(unknown="missing").to_str(), name="x.json")


def test_a_control_token_of_one_character_is_refused_in_a_text() -> None:
    tokenizer = Tokenizer.from_json(word_level().to_str())
    with pytest.raises(DataError, match=r"A text holds '\N{PILE OF POO}', which is a control"):
        tokenizer.encode("the \N{PILE OF POO}")


def test_ids_with_gaps_count_up_to_the_highest() -> None:
    value = json.loads(TOKENIZER.to_json())
    vocabulary = value["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.__getitem__)
    vocabulary[last] = 999
    tokenizer = Tokenizer.from_json(json.dumps(value))
    assert tokenizer.vocab_size == 1000
    assert tokenizer.decode([999]) == TOKENIZER.decode([269])


def test_what_is_no_tokenizer_gets_one_clear_line(tmp_path: Path) -> None:
    value = json.loads(TOKENIZER.to_json())
    value["added_tokens"] = []
    del value["model"]["vocab"][EOS]
    contents = {
        "no.json": b"{}",
        "empty.json": b"",
        "text.json": b"not\nJSON",
        "latin.json": b"\xe9",
        "no-eos.json": json.dumps(value).encode(),
    }
    for name, data in contents.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises((ConfigError, DataError)) as caught:
            Tokenizer.from_file(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert EOS in str(caught.value)
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(DataError) as caught:
            Tokenizer.from_file(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"missing\.json"):
        Tokenizer.from_gpt2_files(tmp_path / "missing.json", tmp_path / "merges.txt")
