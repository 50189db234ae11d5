"""Truths of the known law: its closed forms and its exact posterior, by enumeration."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fsdfm.flow.grid import even_grid
from fsdfm.flow.path import MaskSource, UniformSource, make_source
from fsdfm.flow.posterior import Grouped, Sequences
from fsdfm.flow.sampler import Drawing, Noise, sample
from fsdfm.study import chain as chains
from fsdfm.study.chain import (
    Chain,
    ExactConditionals,
    ExactPosterior,
    OneStream,
    path_gap,
    perfect_student,
)
from fsdfm.study.divergence import figures, trigram_counts, trigram_figures

SYMBOLS, LENGTH = 3, 5


def every_sequence() -> Tensor:
    """All V ** L sequences, int64."""
    return torch.tensor(list(itertools.product(range(SYMBOLS), repeat=LENGTH)))


def chances(chain: Chain) -> Tensor:
    """Chance of every sequence, multiplied out factor by factor."""
    chance = []
    for x in every_sequence().tolist():
        p = float(chain.first[x[0], x[1]])
        for a, b, c in zip(x, x[1:], x[2:], strict=False):
            p *= float(chain.following[a, b, c])
        chance.append(p)
    return torch.tensor(chance, dtype=torch.float64)


@pytest.fixture(scope="module")
def chain() -> Chain:
    return Chain.random(SYMBOLS, 0.7, 0.05, seed=3)


def test_likelihoods_are_those_of_the_chain_and_sum_to_one(chain: Chain) -> None:
    chance = chances(chain)
    assert float(chance.sum()) == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(
        chain.nll(every_sequence()), -chance.log() / LENGTH, rtol=1e-12, atol=1e-12
    )


def test_entropy_in_closed_form_is_that_of_the_enumeration(chain: Chain) -> None:
    chance = chances(chain)
    entropy = -float((chance * chance.log()).sum()) / LENGTH
    assert chain.entropy(LENGTH) == pytest.approx(entropy, abs=1e-12)


def test_every_window_of_three_has_the_true_trigram_law(chain: Chain) -> None:
    chance = chances(chain)
    for start in range(LENGTH - 2):
        window = every_sequence()[:, start : start + 3]
        law = chance @ trigram_counts(window, SYMBOLS)
        torch.testing.assert_close(law, chain.trigrams.flatten(), rtol=0.0, atol=1e-12)


def test_a_floor_bounds_every_transition_from_below() -> None:
    chain = Chain.random(4, 0.1, 0.2, seed=0)
    assert float(chain.following.min()) >= 0.2 / 4
    ones = torch.ones(4, 4, dtype=torch.float64)
    torch.testing.assert_close(chain.following.sum(-1), ones, rtol=0.0, atol=1e-12)


def test_drawn_sequences_have_the_entropy_of_the_chain(chain: Chain) -> None:
    nll = chain.nll(chain.draw(20_000, LENGTH, seed=1))
    error = float(nll.std()) / math.sqrt(len(nll))
    assert abs(float(nll.mean()) - chain.entropy(LENGTH)) < 4.5 * error


@pytest.mark.parametrize("t", [0.0, 0.3, 0.85, 1.0 - 1e-6])
def test_exact_posterior_is_that_of_the_enumeration(chain: Chain, t: float) -> None:
    x_1, chance = every_sequence(), chances(chain)
    x_t = x_1[:: 7 if t < 0.5 else 1]
    same = x_t[:, None, :] == x_1[None]  # (states, data, L)
    joint = ((1 - t) / SYMBOLS + t * same.double()).prod(-1) * chance
    joint = joint / joint.sum(1, keepdim=True)
    expected = torch.einsum("sd,dlv->slv", joint, torch.nn.functional.one_hot(x_1).double())
    times = torch.full((len(x_t),), t, dtype=torch.float64)
    log_p = ExactPosterior(chain).body(x_t, times, times)
    torch.testing.assert_close(log_p.exp(), expected, rtol=0.0, atol=1e-12)


def test_one_step_of_the_exact_posterior_draws_positions_independently(chain: Chain) -> None:
    """At t = 0 nothing is seen: the nll is the cross-entropy of independent symbols."""
    expected = independent_nll(chain)
    nll = chain.nll(drawn(chain, steps=1))
    error = float(nll.std()) / math.sqrt(len(nll))
    assert abs(float(nll.mean()) - expected) < 4.5 * error
    assert expected > chain.entropy(LENGTH) + 0.1  # else this test could not tell them apart


def test_a_perfect_student_of_one_small_step_is_the_exact_posterior(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One small step for each position, one step in all: again independent symbols."""
    monkeypatch.setattr(chains, "SMALL_STEPS", 1)
    row = figures(perfect_student(chain, even_grid(1), 1000, LENGTH, seed=4), chain)
    assert abs(row["nats"] - independent_nll(chain)) < 4.5 * row["nats_se"]


def test_a_perfect_student_beats_the_posterior_it_follows(chain: Chain) -> None:
    """Its jump from noise depends on the noise, so positions are not quite independent."""
    row = figures(perfect_student(chain, even_grid(1), 1000, LENGTH, seed=4), chain)
    assert row["nats"] < independent_nll(chain) - 4.5 * row["nats_se"]
    assert row["nats"] > chain.entropy(LENGTH) + 4.5 * row["nats_se"]


def test_samples_of_the_exact_posterior_approach_the_true_law(chain: Chain) -> None:
    law = chain.trigrams.flatten()
    divergences = []
    for steps in (1, 2, 8):
        counts = trigram_counts(drawn(chain, steps), SYMBOLS).sum(0)
        divergences.append(trigram_figures(counts, law)[1])
    assert divergences[0] > 1.5 * divergences[1] > 3 * divergences[2] > 0.0


def independent_nll(chain: Chain) -> float:
    """Cross-entropy of independent symbols with the chain's single-symbol law, nats a token."""
    product = chain.first.sum(0)[every_sequence()].prod(-1)
    return float(product @ chain.nll(every_sequence()))


def drawn(chain: Chain, steps: int, count: int = 1000) -> Tensor:
    """Samples of the exact posterior."""
    noise = Noise(range(count))
    x_0 = noise.start(UniformSource(SYMBOLS), LENGTH)
    model = Sequences(ExactPosterior(chain))
    *_, last = sample(model, x_0, even_grid(steps), noise, UniformSource(SYMBOLS))
    return last.x


def test_trigram_figures_of_the_true_law_are_its_entropy_and_zero(chain: Chain) -> None:
    law = chain.trigrams.flatten()
    entropy, divergence = trigram_figures(1000.0 * law, law)
    assert entropy == pytest.approx(-float((law * law.log()).sum()), abs=1e-12)
    assert divergence == pytest.approx(0.0, abs=1e-12)


def test_an_error_of_one_window_shows_there_and_hardly_in_the_pool(chain: Chain) -> None:
    x = chain.draw(4000, LENGTH, seed=2)
    found, true = figures(x, chain), chain.trigrams.flatten()
    assert found["kl"] == pytest.approx(
        trigram_figures(trigram_counts(x, SYMBOLS).sum(0), true)[1], abs=1e-12
    )
    assert len(found["windows"]) == LENGTH - 2
    # Plug-in of true samples: about (27 - 1) / 2n for n 3-grams, a third as many in a window.
    assert found["windows_mean"] == pytest.approx(13 / 4000, rel=0.6)
    assert found["kl"] < 13 / 4000
    # The first two tokens of every text come from one fixed pair: only the first windows see it.
    x = x.clone()
    x[:, :2] = 0
    spoilt = figures(x, chain)
    assert spoilt["windows"][0] > 20 * found["windows"][0]
    assert spoilt["windows"][-1] == found["windows"][-1]
    assert spoilt["kl"] < 0.5 * spoilt["windows"][0]


def test_standard_errors_are_those_of_repeated_draws(chain: Chain) -> None:
    rows = [figures(chain.draw(500, LENGTH, seed), chain) for seed in range(30)]
    for name in ("nats", "entropy"):
        spread = torch.tensor([row[name] for row in rows]).std()
        assert rows[0][f"{name}_se"] == pytest.approx(float(spread), rel=0.5)


def test_the_gap_of_the_exact_posterior_to_itself_is_zero(chain: Chain) -> None:
    assert path_gap(ExactPosterior(chain), chain, LENGTH, seed=1) == pytest.approx(0.0, abs=1e-12)


def test_masks_say_nothing_and_all_else_is_data(chain: Chain) -> None:
    source = MaskSource(SYMBOLS)
    x_1, chance = every_sequence(), chances(chain)
    x_t = x_1[::5].clone()
    x_t[torch.rand(x_t.shape, generator=torch.Generator().manual_seed(0)) < 0.6] = SYMBOLS
    agree = (x_t[:, None, :] == x_1[None]) | (x_t[:, None, :] == SYMBOLS)
    joint = agree.all(-1) * chance
    joint = joint / joint.sum(1, keepdim=True)
    expected = torch.einsum("sd,dlv->slv", joint, torch.nn.functional.one_hot(x_1).double())
    times = torch.full((len(x_t),), 0.4, dtype=torch.float64)
    found = ExactPosterior(chain, source).body(x_t, times, times).exp()
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("source", ["uniform", "mask"])
def test_exact_conditionals_in_as_many_groups_as_positions_have_the_law_in_one_call(
    chain: Chain, source: str
) -> None:
    start = make_source(source, SYMBOLS)
    model = Sequences(ExactConditionals(chain, start))
    noise = OneStream(4000, 1)
    drawing = Drawing(posterior=Grouped(model, LENGTH))
    for steps in (1, 4):
        x_0 = noise.start(start, LENGTH)
        *_, last = sample(model, x_0, even_grid(steps), noise, start, drawing=drawing)
        nll = chain.nll(last.x)
        error = float(nll.std()) / math.sqrt(len(nll))
        assert abs(float(nll.mean()) - chain.entropy(LENGTH)) < 4.5 * error
        # Plug-in of as many true samples: 13 / 4000 (see the test of windows).
        assert figures(last.x, chain)["windows_mean"] < 2 * 13 / 4000
