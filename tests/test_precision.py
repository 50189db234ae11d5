"""Drawing in float32 lowers the entropy of a peaked posterior; `draw` in float64 does not.

A posterior over GPT-2's 50,257 tokens has one token of mass 1 - tail, and the rest evenly. What a
sampler makes of it is computed over all 2 ** 24 uniforms of float32, or by searching for the edges
of `draw`, so there is no sampling noise. The measure is the mean of -ln p(drawn), which is the
entropy where the sampler is right.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fsdfm.flow.step import draw

VOCAB_SIZE = 50257
FIRST, MIDDLE, LAST = 0, VOCAB_SIZE // 2, VOCAB_SIZE - 1
GRID = 2**24  # uniforms of float32 are k / 2 ** 24; so is the spacing of float32 in [0.5, 1)


@pytest.fixture(scope="module")
def uniforms() -> NDArray[np.float32]:
    """All of them, ascending."""
    return np.arange(GRID, dtype=np.float32) / np.float32(GRID)


def peaked(tail: float, top: int) -> NDArray[np.float32]:
    p = np.full(VOCAB_SIZE, tail / (VOCAB_SIZE - 1))
    p[top] = 1.0 - tail
    return p.astype(np.float32)


def nats(p: NDArray[np.float32], top: int, top_mass: float) -> float:
    """Mean of -ln p(drawn) where the top token is drawn with top_mass, the others evenly."""
    exact = p.astype(np.float64) / p.sum(dtype=np.float64)
    other = exact[top - 1]
    return -(top_mass * math.log(exact[top]) + (1.0 - top_mass) * math.log(other))


def entropy(p: NDArray[np.float32], top: int) -> float:
    return nats(p, top, p[top] / p.sum(dtype=np.float64))


def float32_inverse_cdf(p: NDArray[np.float32], u: NDArray[np.float32]) -> NDArray[np.float64]:
    """Chance of each token: the first whose float32 cumulative sum exceeds u times the total."""
    cumulative = np.cumsum(p, dtype=np.float32)
    below = np.searchsorted(u * cumulative[-1], cumulative)
    below[-1] = GRID  # u = 1 - 2 ** -24 may round to the total; it too draws the last token
    return np.diff(below, prepend=0) / GRID


def float32_gumbel(p: NDArray[np.float32], top: int, u: NDArray[np.float32]) -> float:
    """Chance that the top token wins argmax(ln p + g), g = -ln(-ln u), all in float32.

    Another token's best g is the j-th largest of the grid with chance
    (1 - (j - 1) / 2^24)^(V - 1) - (1 - j / 2^24)^(V - 1); past j = 2^16 that sums to e^-196.
    """
    log_p = np.log(p)
    with np.errstate(divide="ignore"):
        g = -np.log(-np.log(u))
    best = np.arange(2**16 + 1)
    at_most = (1.0 - best / GRID) ** (VOCAB_SIZE - 1)
    chance = at_most[:-1] - at_most[1:]
    others = log_p[top - 1] + g[: -len(best) : -1]
    top_below = np.searchsorted(log_p[top] + g, others) / GRID
    return 1.0 - float(chance @ top_below)


def edge(p: NDArray[np.float32], token: int) -> float:
    """The u at which `draw` passes from tokens below this one to it: 64-fold search, to 1e-14."""
    weights = torch.from_numpy(p)[None].expand(65, -1)
    low, high = 0.0, 1.0
    while high - low > 1e-14:
        u = torch.linspace(low, high, 65, dtype=torch.float64).clamp_max(math.nextafter(1.0, 0.0))
        passed = int((draw(weights, u) < token).sum())  # draw never falls as u grows
        if passed == 65:
            return 1.0
        if passed == 0:
            return 0.0
        low, high = float(u[passed - 1]), float(u[passed])
    return high


@pytest.mark.parametrize("top", [FIRST, MIDDLE, LAST])
@pytest.mark.parametrize("tail", [1.4e-3, 3e-3, 1e-2])
def test_our_draw_has_the_entropy_of_its_posterior(tail: float, top: int) -> None:
    p = peaked(tail, top)
    top_mass = edge(p, top + 1) - edge(p, top)
    # Two edges to 1e-14 and float64 sums of 50,257 terms, eps = 1.1e-16 each: below 1e-11; times
    # ln(p_top / p_other) < 18. Found: at most 6e-14 nats of 0.03 to 0.16.
    assert nats(p, top, top_mass) == pytest.approx(entropy(p, top), abs=18e-11)


@pytest.mark.parametrize("top", [FIRST, MIDDLE, LAST])
def test_our_draw_reaches_each_rare_token_at_its_own_place(top: int) -> None:
    p = peaked(1.4e-3, top)
    upper = p.cumsum(dtype=np.float64)
    centre = (upper - p / 2.0) / upper[-1]
    for tokens in np.split(np.arange(0, VOCAB_SIZE, 97), range(64, VOCAB_SIZE // 97, 64)):
        weights = torch.from_numpy(p)[None].expand(len(tokens), -1)
        # float32 would need 2 ** -24 = 6.0e-8 to tell neighbours apart; they are 2.8e-8 wide.
        assert draw(weights, torch.from_numpy(centre[tokens])).tolist() == tokens.tolist()


@pytest.mark.parametrize(
    ("tail", "top", "share"),
    [
        # A rare token's 2.8e-8 is below half the spacing 2 ** -24 of sums in [0.5, 1): added after
        # the top token it is rounded away, all of them or half of them.
        (1.4e-3, FIRST, 0.0),
        (1.4e-3, MIDDLE, 0.5),
        (1.4e-3, LAST, 1.0),
        # 1.99e-7 is 3.34 spacings and becomes 3.
        (1e-2, FIRST, 3 / (1e-2 / (VOCAB_SIZE - 1) * GRID)),
        # 5.97e-8 is 1.0015 spacings by luck: hardly a loss. The error is erratic.
        (3e-3, FIRST, 1 / (3e-3 / (VOCAB_SIZE - 1) * GRID)),
    ],
)
def test_inverse_cdf_in_float32_loses_the_tail_behind_the_top_token(
    uniforms: NDArray[np.float32], tail: float, top: int, share: float
) -> None:
    p = peaked(tail, top)
    chance = float32_inverse_cdf(p, uniforms)
    # Sums of tail / 2 that stay below 0.5 round by a part in 2 ** 24 each, u by 1 / 2 ** 24.
    assert 1.0 - chance[top] == pytest.approx(share * tail, rel=2e-3, abs=2 / GRID)
    # Entropy 0.02575 -> 0.00140 (first), 0.01359 (middle), 0.02575 (last);
    # 0.16425 -> 0.14876 (1e-2); 0.05290 -> 0.05282 (3e-3) nats.
    shift = nats(p, top, chance[top]) - entropy(p, top)
    lost = (1.0 - share) * tail
    spread = math.log(p[top] / p[top - 1])
    assert shift == pytest.approx(-lost * spread, abs=(2e-3 * share * tail + 2 / GRID) * spread)


def test_inverse_cdf_in_float32_never_draws_half_of_the_tokens_it_has_mass_for(
    uniforms: NDArray[np.float32],
) -> None:
    # Mass 1.4e-3 holds 23,489 uniforms for 50,256 tokens, whatever the sums: one token each.
    p = peaked(1.4e-3, LAST)
    drawn = np.count_nonzero(float32_inverse_cdf(p, uniforms))
    assert drawn == pytest.approx(1.4e-3 * GRID, abs=3)


@pytest.mark.parametrize("tail", [1.4e-3, 3e-3, 1e-2])
def test_gumbel_noise_in_float32_loses_the_tail_wherever_the_top_token_is(
    uniforms: NDArray[np.float32], tail: float
) -> None:
    p = peaked(tail, LAST)
    lost_from = float32_gumbel(p, LAST, uniforms)
    # The largest g are ln(2^24 / j), j = 1, 2, ...; so rare tokens win with chance
    # sum_j (V - 1) / 2^24 exp(-j r), r = p_top / (p_other 2^24): r / (e^r - 1) of their mass.
    r = float(p[LAST] / p[0]) / GRID
    kept = r / math.expm1(r)
    # Leading order in (V - 1) / 2^24 = 3e-3, and in tail: two rare tokens at once.
    assert 1.0 - lost_from == pytest.approx(kept * tail, rel=3e-3 + tail)
    # Entropy 0.02575 -> 0.00836, 0.05290 -> 0.03211, 0.16425 -> 0.14251 nats: less by 68, 39, 13 %.
    found = nats(p, LAST, lost_from) / entropy(p, LAST)
    assert found == pytest.approx({1.4e-3: 0.325, 3e-3: 0.607, 1e-2: 0.868}[tail], abs=5e-3)
