"""Controls of what is drawn: each does what it says, in every kind of model."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steering_fixtures import SOURCES, make_generators

from fsdfm.flow.controls import Bans, Controls, Shaping, cut, present
from fsdfm.flow.step import sharpen
from fsdfm.generate.attempt import windows
from fsdfm.generate.request import Request

GENERATORS = make_generators()
TOKENIZER = GENERATORS["mask"].tokenizer
CPU = torch.device("cpu")
TOGETHER = 50
"""Requests that share a call: many small texts cost less in few calls."""


def rows(n: int = 6, vocab: int = 11) -> torch.Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(1)) * 2


def test_the_cuts_keep_the_likeliest_by_number_mass_and_share() -> None:
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 4)
    kept = cut(
        p,
        torch.tensor([2, 0, 0, 3]),
        torch.tensor([1.0, 0.65, 1.0, 0.5]),
        torch.tensor([0.0, 0.0, 0.6, 0.0]),
    )
    expected = [[4, 3, 0, 0], [4, 3, 0, 0], [4, 3, 0, 0], [4, 3, 0, 0]]
    # The last: of the best 3, which are 0.9, the best two make half.
    want = torch.tensor(expected, dtype=torch.float32)
    want = want / want.sum(1, keepdim=True)
    want[3] = torch.tensor([4 / 7, 3 / 7, 0, 0])
    torch.testing.assert_close(kept, want)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, [1]), (0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 3, 0]), (1.0, range(5))],
)
def test_top_p_keeps_the_nucleus_and_drops_the_rest(top_p: float, kept: list[int]) -> None:
    p = torch.tensor([0.2, 0.4, 0.06, 0.3, 0.04])
    expected = torch.zeros(5)
    expected[list(kept)] = p[list(kept)] / p[list(kept)].sum()
    found = cut(p[None], torch.tensor([0]), torch.tensor([top_p]), torch.tensor([0.0]))[0]
    torch.testing.assert_close(found, expected)


def test_every_sequence_has_its_own_controls() -> None:
    kinds = [
        Controls(),
        Controls(temperature=0.0),
        Controls(temperature=0.5, top_p=0.7),
        Controls(top_k=1),
        Controls(min_p=0.3),
        Controls(repetition_penalty=3.0),
        Controls(bans=Bans(torch.arange(11)[None] < 9, torch.tensor([0, -1]), ((1, 10),))),
    ]
    x = torch.arange(14).view(7, 2) % 11
    settled, at = torch.ones_like(x, dtype=torch.bool), torch.arange(14)
    logits = rows(14)
    together = Shaping(kinds, CPU).posterior(logits, at, x, settled)
    for i, kind in enumerate(kinds):
        mine = slice(2 * i, 2 * i + 2)
        alone = Shaping([kind], CPU).posterior(
            logits[mine], torch.arange(2), x[i : i + 1], settled[:1]
        )
        assert torch.equal(alone, together[mine])
    torch.testing.assert_close(together[0:2], logits[0:2].softmax(-1))
    nucleus = (torch.tensor([v] * 2) for v in (0, 0.7, 0.0))
    torch.testing.assert_close(together[4:6], cut(sharpen(logits[4:6], 0.5), *nucleus))
    assert (together[2:4].max(-1).values == 1).all() and (together[6:8].max(-1).values == 1).all()
    assert (together[12, :9] == 0).all() and together[12, 9:].sum() == pytest.approx(1.0)
    assert together[13, 10] == 0 and (together[13, :10] > 0).all()


def test_a_repeated_token_has_its_odds_divided() -> None:
    logits, x = rows(1), torch.tensor([[3, 5, 5]])
    settled = torch.tensor([[True, True, False]])
    plain = logits.softmax(-1)[0]
    p = Shaping([Controls(repetition_penalty=2.0)], CPU).posterior(
        logits, torch.tensor([2]), x, settled
    )[0]
    seen = torch.zeros(11, dtype=torch.bool).index_fill(0, torch.tensor([3, 5]), True)
    assert torch.equal(present(x, settled, 11)[0], seen)
    torch.testing.assert_close(p[~seen] / p[0], plain[~seen] / plain[0])
    torch.testing.assert_close(p[seen] / p[0], plain[seen] / plain[0] / 2.0)


@pytest.mark.parametrize("source", SOURCES)
def test_the_best_token_alone_is_the_likeliest(source: str) -> None:
    request = Request(prompt="the ", length=20, seed=4, end="never")
    one, greedy = GENERATORS[source].answer(
        [replace(request, top_k=1), replace(request, temperature=0.0)]
    )
    assert one.token_ids == greedy.token_ids
    if source != "uniform":  # one call from masks has no noise but in who moves
        first, second = GENERATORS[source].answer(
            [replace(request, top_k=1, steps=1, seed=seed) for seed in (1, 2)]
        )
        assert first.token_ids == second.token_ids


@pytest.mark.parametrize("source", SOURCES)
def test_banned_words_and_ids_are_never_written(source: str) -> None:
    plain = Request(length=24, steps=2, end="keep")
    seen = GENERATORS[source].answer([replace(plain, seed=i) for i in range(10)])
    counts = torch.bincount(torch.tensor([i for r in seen for i in r.token_ids]))
    ids = tuple(counts.argsort(descending=True)[:5].tolist())
    requests = [replace(plain, seed=i, ban_ids=ids) for i in range(200)]
    for result in GENERATORS[source].answer(requests, batch_size=TOGETHER):
        assert not set(ids) & set(result.token_ids)
    # Letters beside each other are banned too, whatever tokens make them.
    text = "".join(r.text for r in seen)
    pairs = sorted({a + b for a, b in itertools.pairwise(text)} - {"\ufffd\ufffd"}, key=text.count)
    words = tuple(pair for pair in pairs[::-1] if "\ufffd" not in pair)[:6]
    assert any(word in text for word in words)
    requests = [replace(plain, seed=i, ban=words) for i in range(200)]
    for result in GENERATORS[source].answer(requests, batch_size=TOGETHER):
        assert not [word for word in words if word in result.text]


@pytest.mark.parametrize("source", SOURCES)
def test_a_banned_word_is_not_made_with_what_is_given(source: str) -> None:
    requests = [Request(template="the fo[[1]]", ban=("fox", "fo "), seed=i) for i in range(30)]
    for result in GENERATORS[source].answer(requests, batch_size=TOGETHER):
        assert "fox" not in result.text and "fo " not in result.text


@pytest.mark.parametrize("source", SOURCES)
def test_required_words_are_written(source: str) -> None:
    words = ("fox", "über dog", "🦊")
    requests = [
        Request(length=24, require=words, seed=i, steps=2, end="trim", stop=("e",))
        for i in range(150)
    ] + [Request(template="a [[8]] b [[12-20]]!", require=words, seed=i) for i in range(50)]
    results = GENERATORS[source].answer(requests, batch_size=TOGETHER)
    for result in results:
        assert all(" " + word in result.text for word in words)
    assert len({tuple(r.text.find(word) for word in words) for r in results[:150]}) > 1


def test_a_required_word_that_is_given_is_not_written_again() -> None:
    request = Request(prompt="the fox", require=("fox",), length=12)
    with_it, without = GENERATORS["mask"].answer([request, replace(request, require=())])
    assert with_it.token_ids == without.token_ids


@pytest.mark.parametrize("source", SOURCES)
def test_the_end_of_a_document_ends_the_text_or_is_never_written(source: str) -> None:
    eos = TOKENIZER.eos_id
    plain = Request(length=60, steps=2, prompt="the ", temperature=3.0)
    many = [replace(plain, seed=i) for i in range(60)]
    kept = GENERATORS[source].answer([replace(r, end="keep") for r in many], batch_size=TOGETHER)
    trimmed = GENERATORS[source].answer(many, batch_size=TOGETHER)
    never = GENERATORS[source].answer([replace(r, end="never") for r in many], batch_size=TOGETHER)
    assert any(eos in r.token_ids for r in kept), "else this test says nothing"
    for whole, short, long in zip(kept, trimmed, never, strict=True):
        assert eos not in long.token_ids and len(long.token_ids) == 60
        assert (short.finish == "end") == (eos in whole.token_ids)
        assert eos not in short.token_ids
        n = len(short.token_ids)
        assert short.token_ids == whole.token_ids[:n]
        assert n == len(short.logprobs)
        assert short.text == TOKENIZER.decode(short.token_ids)
        assert short.spans == [(4, len(short.text))]


@pytest.mark.parametrize("source", SOURCES)
def test_a_text_ends_before_the_first_stop_string(source: str) -> None:
    plain = Request(length=40, steps=2, prompt="the ", end="never", temperature=3.0)
    stopped = 0
    for seed in range(20):
        whole, short = GENERATORS[source].answer(
            [replace(plain, seed=seed), replace(plain, seed=seed, stop=("e", "o"))]
        )
        places = [i for i in (whole.text.find(c, 4) for c in "eo") if i >= 0]
        if places:
            stopped += 1
            assert (short.text, short.finish) == (whole.text[: min(places)], "stop")
            assert TOKENIZER.decode(short.token_ids).startswith(short.text)
        else:
            assert (short.text, short.finish) == (whole.text, "length")
    assert stopped


def test_gaps_with_something_behind_them_hold_no_end_of_a_document() -> None:
    for source in SOURCES:
        requests = [Request(prompt="a", suffix="b", length=60, steps=1, seed=i) for i in range(20)]
        for result in GENERATORS[source].answer(requests, batch_size=TOGETHER):
            assert TOKENIZER.eos_id not in result.token_ids


@given(st.integers(1, 400), st.integers(2, 64))
@settings(deadline=None)
def test_windows_cover_a_text_and_see_what_is_before(length: int, context: int) -> None:
    found = list(windows(length, context))
    assert found[0][0] == 0 and found[-1][1] == length
    for (_, end), (first, last) in itertools.pairwise(found):
        assert first < end < last and last - first <= context
    assert (len(found) == 1) == (length <= context)


@pytest.mark.parametrize("source", SOURCES)
def test_a_text_longer_than_the_context_is_made_in_windows(source: str) -> None:
    generator = GENERATORS[source]
    request = Request(prompt="the ", suffix=" dog", length=200, steps=2, end="never", seed=2)
    (result,) = generator.answer([request])
    assert len(result.token_ids) == 200
    assert result.text.startswith("the ") and result.text.endswith(" dog")
    assert result.calls <= 2 * len(list(windows(200, 64)))
    if source == "uniform":
        return  # all of its noise comes first
    (short,) = generator.answer([replace(request, suffix=None, length=64)])
    (long,) = generator.answer([replace(request, suffix=None)])
    assert long.token_ids[:64] == short.token_ids, "the first window is a text of its own"


def test_a_long_text_ends_with_its_document() -> None:
    generator = GENERATORS["mask"]
    for seed in range(30):
        (result,) = generator.answer([Request(prompt="the ", length=500, steps=1, seed=seed)])
        if result.finish == "end":
            assert result.calls < len(list(windows(500, 64)))
            return
    raise AssertionError("no document ended")
