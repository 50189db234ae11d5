"""Lengths of gaps that leave them open, and calls that are left open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from steering_fixtures import SOURCES, make_generators

from fsdfm.generate import track
from fsdfm.generate.lengths import TRIED, candidates
from fsdfm.generate.request import Request

GENERATORS = make_generators()


@given(st.integers(1, 50), st.integers(0, 200))
def test_lengths_are_tried_from_the_shortest_to_the_longest(low: int, more: int) -> None:
    found = candidates(low, low + more)
    assert found == sorted(set(found))
    assert (found[0], found[-1]) == (low, low + more)
    assert len(found) == min(TRIED, more + 1)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("wanted", [2, 3, 5])
def test_the_length_that_the_model_finds_likely_is_taken(
    monkeypatch: pytest.MonkeyPatch, source: str, wanted: int
) -> None:
    generator, seen = GENERATORS[source], []
    given_ = len(generator.tokenizer.encode("the ")) + len(generator.tokenizer.encode(" dog"))

    def look(_: Any, probes: Sequence[track.Probe]) -> None:
        for probe in probes:
            # Rows behind the gap are sure of everything where the gap has the wanted length.
            likely = len(probe.x) == given_ + wanted
            logp = torch.full((len(probe.positions), generator.config.vocab_size), -9.0)
            probe.read(logp + 8.0 * likely)
            probe.calls, probe.done = 1, True
            seen.append(len(probe.x) - given_)

    monkeypatch.setattr(track, "_look", look)
    (result,) = generator.answer([Request(template="the [[2-5]] dog", steps=1)])
    assert result.tokens == wanted
    assert seen == [2, 3, 4, 5]
    assert result.calls == 4 + 1


@pytest.mark.parametrize("source", SOURCES)
def test_a_gap_that_ends_the_text_ends_with_its_document(source: str) -> None:
    generator, finishes = GENERATORS[source], []
    requests = [
        Request(template="the [[20-40]]", steps=1, seed=i, temperature=3.0) for i in range(60)
    ]
    for result in generator.answer(requests):
        n = len(result.token_ids) - len(generator.tokenizer.encode("the "))
        assert 20 <= n <= 40
        assert generator.tokenizer.eos_id not in result.token_ids
        assert (n < 40) <= (result.finish == "end")
        finishes.append(result.finish)
    assert set(finishes) == {"end", "length"}


@pytest.mark.parametrize("source", SOURCES)
def test_automatic_steps_end_early_where_the_model_is_sure(
    monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    generator = GENERATORS[source]
    request = Request(length=40, steps="auto", seed=1)
    head = generator.engine.head
    spent = []
    for sharpness in (0.0, 1.0, 100.0):
        monkeypatch.setattr(
            generator.engine, "head", lambda rows, s=sharpness: head(rows).float() * s
        )
        (result,) = generator.answer([request])
        spent.append(result.calls)
        assert len(result.token_ids) == 40 and result.tokens == 40
    bound = 4 * generator.defaults["steps"]
    assert bound >= spent[0] > spent[2] >= 2, spent


def test_automatic_steps_spend_their_nats_evenly() -> None:
    how = Request(steps=4).sampling({})
    noise = torch.Generator().manual_seed(0)
    times = [k / 100 for k in range(101)]
    free = torch.ones(10, dtype=torch.bool)
    from fsdfm.flow.controls import Controls

    one = track.Track(torch.zeros(10).long(), free, times, how, Controls(), noise, pace=0.5)
    one.entropy, spent = 2.0, []
    while not one.done:
        one.moved(1.0, True)
        if not one.done:
            spent.append(one.times[one.step + 1] - one.times[one.step])
    # After the first hundredth: a quarter of all positions a call, 2 nats each.
    assert spent == pytest.approx([0.25, 0.25, 0.25, 0.24])
