"""Truths of the Markov benchmark: its closed forms and its exact posterior, by enumeration."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fsdfm.flow.grid import even_grid
from fsdfm.flow.path import UniformSource
from fsdfm.flow.posterior import Sequences
from fsdfm.flow.sampler import Noise, sample

SYMBOLS, LENGTH = 3, 5


@pytest.fixture(scope="module")
def markov() -> Iterator[ModuleType]:
    """The benchmark, which is a script and not a part of the package."""
    path = Path(__file__).parents[1] / "benchmarks" / "markov.py"
    spec = importlib.util.spec_from_file_location("markov_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def every_sequence() -> Tensor:
    """All V ** L sequences, int64."""
    return torch.tensor(list(itertools.product(range(SYMBOLS), repeat=LENGTH)))


def chances(chain) -> Tensor:  # type: ignore[no-untyped-def]
    """Chance of every sequence, multiplied out factor by factor."""
    chance = []
    for x in every_sequence().tolist():
        p = float(chain.first[x[0], x[1]])
        for a, b, c in zip(x, x[1:], x[2:], strict=False):
            p *= float(chain.following[a, b, c])
        chance.append(p)
    return torch.tensor(chance, dtype=torch.float64)


@pytest.fixture(scope="module")
def chain(markov: ModuleType):  # type: ignore[no-untyped-def]
    return markov.Chain.random(SYMBOLS, 0.7, 0.05, seed=3)


def test_likelihoods_are_those_of_the_chain_and_sum_to_one(chain) -> None:  # type: ignore[no-untyped-def]
    chance = chances(chain)
    assert float(chance.sum()) == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(
        chain.nll(every_sequence()), -chance.log() / LENGTH, rtol=1e-12, atol=1e-12
    )


def test_entropy_in_closed_form_is_that_of_the_enumeration(chain) -> None:  # type: ignore[no-untyped-def]
    chance = chances(chain)
    entropy = -float((chance * chance.log()).sum()) / LENGTH
    assert chain.entropy(LENGTH) == pytest.approx(entropy, abs=1e-12)


def test_every_window_of_three_has_the_true_trigram_law(markov: ModuleType, chain) -> None:  # type: ignore[no-untyped-def]
    chance = chances(chain)
    for start in range(LENGTH - 2):
        window = every_sequence()[:, start : start + 3]
        law = chance @ markov.trigram_counts(window, SYMBOLS)
        torch.testing.assert_close(law, chain.trigrams.flatten(), rtol=0.0, atol=1e-12)


def test_a_floor_bounds_every_transition_from_below(markov: ModuleType) -> None:
    chain = markov.Chain.random(4, 0.1, 0.2, seed=0)
    assert float(chain.following.min()) >= 0.2 / 4
    ones = torch.ones(4, 4, dtype=torch.float64)
    torch.testing.assert_close(chain.following.sum(-1), ones, rtol=0.0, atol=1e-12)


def test_drawn_sequences_have_the_entropy_of_the_chain(chain) -> None:  # type: ignore[no-untyped-def]
    nll = chain.nll(chain.draw(20_000, LENGTH, seed=1))
    error = float(nll.std()) / math.sqrt(len(nll))
    assert abs(float(nll.mean()) - chain.entropy(LENGTH)) < 4.5 * error


@pytest.mark.parametrize("t", [0.0, 0.3, 0.85, 1.0 - 1e-6])
def test_exact_posterior_is_that_of_the_enumeration(markov: ModuleType, chain, t: float) -> None:  # type: ignore[no-untyped-def]
    x_1, chance = every_sequence(), chances(chain)
    x_t = x_1[:: 7 if t < 0.5 else 1]
    same = x_t[:, None, :] == x_1[None]  # (states, data, L)
    joint = ((1 - t) / SYMBOLS + t * same.double()).prod(-1) * chance
    joint = joint / joint.sum(1, keepdim=True)
    expected = torch.einsum("sd,dlv->slv", joint, torch.nn.functional.one_hot(x_1).double())
    times = torch.full((len(x_t),), t, dtype=torch.float64)
    log_p = markov.ExactPosterior(chain).body(x_t, times, times)
    torch.testing.assert_close(log_p.exp(), expected, rtol=0.0, atol=1e-12)


def test_one_step_of_the_exact_posterior_draws_positions_independently(  # type: ignore[no-untyped-def]
    markov: ModuleType, chain
) -> None:
    """At t = 0 nothing is seen: the nll is the cross-entropy of independent symbols."""
    expected = independent_nll(chain)
    nll = chain.nll(drawn(markov, chain, steps=1))
    error = float(nll.std()) / math.sqrt(len(nll))
    assert abs(float(nll.mean()) - expected) < 4.5 * error
    assert expected > chain.entropy(LENGTH) + 0.1  # else this test could not tell them apart


def test_a_perfect_student_of_one_small_step_is_the_exact_posterior(  # type: ignore[no-untyped-def]
    markov: ModuleType, chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One small step for each position, one step in all: again independent symbols."""
    monkeypatch.setattr(markov, "SMALL_STEPS", 1)
    args = argparse.Namespace(length=LENGTH, seed=4)
    row = markov.judge_perfect_student(markov.Setting(1, 1.0, 1.0), 1000, args, chain)
    assert abs(row["nll"] - independent_nll(chain)) < 4.5 * row["nll_se"]


def test_a_perfect_student_beats_the_posterior_it_follows(  # type: ignore[no-untyped-def]
    markov: ModuleType, chain
) -> None:
    """Its jump from noise depends on the noise, so positions are not quite independent."""
    args = argparse.Namespace(length=LENGTH, seed=4)
    row = markov.judge_perfect_student(markov.Setting(1, 1.0, 1.0), 1000, args, chain)
    assert row["nll"] < independent_nll(chain) - 4.5 * row["nll_se"]
    assert row["nll"] > chain.entropy(LENGTH) + 4.5 * row["nll_se"]


def test_samples_of_the_exact_posterior_approach_the_true_law(markov: ModuleType, chain) -> None:  # type: ignore[no-untyped-def]
    law = chain.trigrams.flatten()
    divergences = []
    for steps in (1, 2, 8):
        counts = markov.trigram_counts(drawn(markov, chain, steps), SYMBOLS).sum(0)
        divergences.append(markov.trigram_figures(counts, law)[1])
    assert divergences[0] > 1.5 * divergences[1] > 3 * divergences[2] > 0.0


def independent_nll(chain) -> float:  # type: ignore[no-untyped-def]
    """Cross-entropy of independent symbols with the chain's single-symbol law, nats a token."""
    product = chain.first.sum(0)[every_sequence()].prod(-1)
    return float(product @ chain.nll(every_sequence()))


def drawn(markov: ModuleType, chain, steps: int, count: int = 1000) -> Tensor:  # type: ignore[no-untyped-def]
    """Samples of the exact posterior."""
    noise = Noise(range(count))
    x_0 = noise.start(UniformSource(SYMBOLS), LENGTH)
    model = Sequences(markov.ExactPosterior(chain))
    *_, last = sample(model, x_0, even_grid(steps), noise, vocab_size=SYMBOLS)
    return last.x


def test_trigram_figures_of_the_true_law_are_its_entropy_and_zero(
    markov: ModuleType, chain
) -> None:  # type: ignore[no-untyped-def]
    law = chain.trigrams.flatten()
    entropy, divergence = markov.trigram_figures(1000.0 * law, law)
    assert entropy == pytest.approx(-float((law * law.log()).sum()), abs=1e-12)
    assert divergence == pytest.approx(0.0, abs=1e-12)


def test_entropies_between_two_temperatures_are_interpolated_and_others_refused(
    markov: ModuleType,
) -> None:
    rows = [
        {"model": "m", "steps": 8, "temperature": 0.5, "entropy": 2.0, "nll": 1.0},
        {"model": "m", "steps": 8, "temperature": 1.0, "entropy": 4.0, "nll": 1.5},
        {"model": "m", "steps": 8, "temperature": 1.2, "entropy": 4.5, "nll": 2.0},
    ]
    middle = markov.at_entropy(reversed(rows), 2.5)
    assert middle == pytest.approx(
        {"temperature": 0.625, "entropy": 2.5, "nll": 1.125, "nll_slope": 0.25}
    )
    assert markov.at_entropy(rows, 4.5)["nll"] == pytest.approx(2.0)
    assert markov.at_entropy(rows, 1.9) is None
    assert markov.at_entropy(rows, 4.6) is None
