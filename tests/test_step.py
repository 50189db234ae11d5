"""Truths of one step: transitions in closed form, movers, draws."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fsdfm.flow import step
from fsdfm.flow.grid import even_grid
from fsdfm.flow.schedule import Polynomial, jump_probability
from fsdfm.flow.step import (
    EULER,
    EXACT,
    MOVERS,
    PUBLISHED,
    STEP_RULES,
    Movers,
    StepRule,
    advance,
    draw,
    independent_movers,
    sharpen,
    systematic_movers,
    transition,
)

LINEAR = Polynomial()
SCHEDULES = [Polynomial(1.0), Polynomial(2.0), Polynomial(3.5)]
RULES = list(STEP_RULES.values())
BELOW_1 = math.nextafter(1.0, 0.0)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def simplex(rows: int, vocab_size: int, seed: int) -> Tensor:
    """Random posteriors, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab_size, dtype=torch.float64, generator=generator).softmax(-1)


def step_matrix(rule: StepRule, p: Tensor, schedule: Polynomial, t: Tensor, h: Tensor) -> Tensor:
    """Transition matrix of a step; row x of p is the posterior in state x, of V or V + 1."""
    states, vocab_size = p.shape
    a = rule.mover_probability(schedule, t, h).expand(states)
    matrix = transition(rule, p, torch.arange(states), a)
    if states > vocab_size:  # what a mask id does not send to data stays with it
        masked = F.one_hot(torch.tensor(vocab_size), states) * (1.0 - a[0])
        matrix = torch.cat([matrix, masked[:, None]], 1)
    return matrix


def bayes(p_1: Tensor, kappa: Tensor, source: str) -> tuple[Tensor, Tensor]:
    """Posterior p(x_1 | x_t) by state, and the marginal of x_t, of one token distributed as p_1."""
    vocab_size = len(p_1)
    if source == "mask":
        posterior = torch.cat([torch.eye(vocab_size, dtype=torch.float64), p_1[None]])
        return posterior, torch.cat([kappa * p_1, (1.0 - kappa)[None]])
    # p(x_t | x_1 = y) = kappa 1[x_t = y] + (1 - kappa) / V
    likelihood = kappa * torch.eye(vocab_size, dtype=torch.float64) + (1.0 - kappa) / vocab_size
    joint = likelihood * p_1  # [x_t, x_1]
    marginal = joint.sum(1)
    return joint / marginal[:, None], marginal


def random_grid(steps: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    inside = torch.rand(steps - 1, dtype=torch.float64, generator=generator).sort().values
    return torch.cat([f64(0.0), inside, f64(1.0)])


def chi_square_z(counts: Tensor, expected: Tensor) -> float:
    """Normal score of the chi-square statistic (Wilson and Hilferty)."""
    k = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return ((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))


# The exact rule.


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_exact_step_is_the_matrix_exponential_of_a_constant_posterior(
    schedule: Polynomial,
) -> None:
    p = simplex(1, 5, seed=1)
    t, s = f64(0.3)[0], f64(0.7)[0]
    # The rate matrix is g(t) (1 p^T - I); its integral over the step takes g to Lambda.
    integral = ((1 - schedule.kappa(t)) / (1 - schedule.kappa(s))).log()
    solution = torch.linalg.matrix_exp(integral * (p.expand(5, 5) - torch.eye(5)))
    step = step_matrix(EXACT, p.expand(5, 5), schedule, t, s - t)
    torch.testing.assert_close(step, solution, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_exact_steps_are_one(schedule: Polynomial) -> None:
    p = simplex(1, 5, seed=2).expand(5, 5)
    t, u, s = f64(0.1, 0.35, 0.8)
    two = step_matrix(EXACT, p, schedule, t, u - t) @ step_matrix(EXACT, p, schedule, u, s - u)
    torch.testing.assert_close(step_matrix(EXACT, p, schedule, t, s - t), two, rtol=0, atol=1e-12)


def walk_error(rule: StepRule, source: str, schedule: Polynomial, grid: Tensor) -> float:
    """Largest error of a one-token marginal on any time of a grid, the true posterior given."""
    p_1, worst = simplex(1, 6, seed=3)[0], 0.0
    _, marginal = bayes(p_1, schedule.kappa(grid[0]), source)
    for t, s in itertools.pairwise(grid):
        posterior, _ = bayes(p_1, schedule.kappa(t), source)
        marginal = marginal @ step_matrix(rule, posterior, schedule, t, s - t)
        _, truth = bayes(p_1, schedule.kappa(s), source)
        worst = max(worst, float((marginal - truth).abs().max()))
    return worst


@pytest.mark.parametrize("source", ["uniform", "mask"])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_exact_rule_keeps_a_one_token_marginal_on_any_grid(
    source: str, steps: int, schedule: Polynomial
) -> None:
    for grid in (even_grid(steps), random_grid(steps, seed=steps)):
        assert walk_error(EXACT, source, schedule, grid) < 1e-12


def test_published_rule_keeps_a_one_token_marginal_from_masks_but_not_from_uniform_noise() -> None:
    grid = random_grid(7, seed=7)
    assert walk_error(PUBLISHED, "mask", LINEAR, grid) < 1e-12
    assert 1e-3 < walk_error(PUBLISHED, "uniform", LINEAR, grid) < 0.1


def test_errors_of_one_step_are_those_of_the_method_note() -> None:
    p = f64(0.5, 0.3, 0.2, 0.0).expand(4, 4)
    t, h = f64(0.3)[0], f64(0.4)[0]
    truth = (1 - 4 / 7) * torch.eye(4, dtype=torch.float64) + 4 / 7 * p
    errors = {
        rule.name: float((step_matrix(rule, p, LINEAR, t, h) - truth).abs().max()) for rule in RULES
    }
    assert errors["exact"] < 1e-15
    assert errors["published"] == pytest.approx(6e-2, abs=5e-3)
    assert errors["euler"] == pytest.approx(1.4e-1, abs=5e-3)


# The published rule.


@pytest.mark.parametrize("a", [1e-9, 0.003, 0.4, 0.999])
def test_published_step_leaves_with_its_own_probability_and_lands_on_the_others(a: float) -> None:
    vocab_size = 6
    p = simplex(vocab_size, vocab_size, seed=4)
    p[1] = F.one_hot(torch.tensor(1), vocab_size)  # certain that it is right: stays
    p[2, 2] = 0.0
    p[2] /= p[2].sum()
    expected = torch.empty_like(p)
    for x in range(vocab_size):
        leave = 1.0 - (1.0 - a) ** (1.0 - float(p[x, x]))
        for y in range(vocab_size):
            others = max(float(p[x].sum() - p[x, x]), 1e-300)
            expected[x, y] = 1.0 - leave if y == x else leave * p[x, y] / others
    step = transition(PUBLISHED, p, torch.arange(vocab_size), f64(a).expand(vocab_size))
    torch.testing.assert_close(step, expected, rtol=0, atol=1e-12)


def test_published_last_step_draws_from_the_whole_posterior() -> None:
    p = simplex(6, 6, seed=5)
    step = transition(PUBLISHED, p, torch.arange(6), f64(1.0).expand(6))
    assert torch.equal(step, p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_published_and_exact_agree_where_the_current_token_has_no_mass(dtype: torch.dtype) -> None:
    p = simplex(7, 6, seed=6)
    p[torch.arange(6), torch.arange(6)] = 0.0
    p = (p / p.sum(1, keepdim=True)).to(dtype)
    for a in torch.linspace(0.01, 1.0, 100, dtype=dtype):
        x_t = torch.arange(7)  # the last one is a mask id
        landing = PUBLISHED.land(p, x_t, a.expand(7))
        assert (landing[torch.arange(6), torch.arange(6)] == 0.0).all()
        close = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
        torch.testing.assert_close(landing, EXACT.land(p, x_t, a.expand(7)), rtol=0, atol=close)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_landing_weights_are_never_negative_in_float32(rule: StepRule) -> None:
    generator = torch.Generator().manual_seed(7)
    logits = 12.0 * torch.randn(20_000, 6, generator=generator)
    x_t = torch.randint(7, (20_000,), generator=generator)
    a = torch.rand(20_000, generator=generator).clamp_min(1e-6)
    landing = rule.land(logits.softmax(-1), x_t, a)
    assert (landing >= 0.0).all()
    torch.testing.assert_close(landing.sum(1), torch.ones(20_000), rtol=0, atol=1e-5)


# Euler.


@pytest.mark.parametrize("source", ["uniform", "mask"])
def test_euler_converges_at_first_order(source: str) -> None:
    # Before t = 1: the last step, with a = 1, would hide the error of those before it.
    p_1, end, steps = simplex(1, 6, seed=8)[0], 0.6, [64, 128, 256, 512]
    errors = []
    for count in steps:
        grid = even_grid(count) * end
        _, marginal = bayes(p_1, grid[0], source)
        for t, s in itertools.pairwise(grid):
            posterior, _ = bayes(p_1, t, source)
            marginal = marginal @ step_matrix(EULER, posterior, LINEAR, t, s - t)
        errors.append(float((marginal - bayes(p_1, f64(end)[0], source)[1]).abs().max()))
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_position_may_move_on_the_last_step_of_every_rule(
    rule: StepRule, schedule: Polynomial
) -> None:
    t = torch.stack([even_grid(steps)[-2] for steps in range(1, 200)])
    assert (rule.mover_probability(schedule, t, 1.0 - t) == 1.0).all()


def test_euler_moves_with_the_rate_frozen_at_the_start() -> None:
    a = EULER.mover_probability(LINEAR, f64(0.3), f64(0.4))
    torch.testing.assert_close(a, f64(1.0 - math.exp(-0.4 / 0.7)), rtol=1e-14, atol=0)


# Draws.


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_advance_draws_what_transition_says(rule: StepRule) -> None:
    vocab_size, rows = 5, 10_000
    states = vocab_size + 1  # state V is a mask id
    p = simplex(states, vocab_size, seed=9)
    p[1, 3] = p[2, 2] = 0.0
    p /= p.sum(1, keepdim=True)
    for a in (0.37, 1.0):
        generator = torch.Generator().manual_seed(10)
        u = torch.rand((2, states * rows), dtype=torch.float64, generator=generator)
        x_t = torch.arange(states)[:, None].expand(states, rows)
        movers = (u[0] < a).nonzero()[:, 0]
        x = advance(
            x_t,
            movers,
            lambda part, at=movers // rows: p[at[part]],
            f64(a).expand(len(movers)),
            u[1, movers],
            rule,
            lambda weights: weights,
            vocab_size=vocab_size,
        )
        expected = transition(rule, p, torch.arange(states), f64(a).expand(states))
        for state in range(states):
            counts = x[state].bincount(minlength=states).double()
            chance = torch.cat([expected[state], 1.0 - expected[state].sum()[None]])
            possible = chance > 1e-12
            assert counts[~possible].sum() == 0
            assert chi_square_z(counts[possible], rows * chance[possible]) < 4.5


def test_advance_asks_for_the_logits_of_exactly_the_movers_and_leaves_x_t_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step, "CPU_LOGITS", 5 * 7)
    monkeypatch.setattr(step, "CPU_WEIGHTS", 5 * 3)
    generator = torch.Generator().manual_seed(11)
    x_t = torch.randint(5, (3, 50), generator=generator)
    movers = torch.rand(3, 50, generator=generator) < 0.3
    before, rows = x_t.clone(), movers.flatten().nonzero()[:, 0]
    asked, drawn = [], []

    def logits(part: slice) -> Tensor:
        asked.append(rows[part])
        return (x_t.flatten()[rows[part]] + 1) % 5

    def sharpening(wanted: Tensor) -> Tensor:
        drawn.append(len(wanted))
        return F.one_hot(wanted, 5).double()

    u = torch.rand(len(rows), dtype=torch.float64, generator=generator)
    a = torch.full((len(rows),), 0.3)
    x = advance(x_t, rows, logits, a, u, EXACT, sharpening, vocab_size=5)
    assert torch.equal(torch.cat(asked), rows)
    assert max(len(some) for some in asked) == 7 and max(drawn) == 3
    assert torch.equal(x_t, before)
    assert torch.equal(x, torch.where(movers, (x_t + 1) % 5, x_t))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_how_many_rows_are_drawn_at_a_time_changes_nothing(
    rule: StepRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(12)
    x_t = torch.randint(130, (2, 40), generator=generator)
    logits = torch.randn((80, 130), generator=generator)
    rows = torch.arange(0, 80, 2)
    u = torch.rand(40, dtype=torch.float64, generator=generator)
    a = torch.rand(40, dtype=torch.float64, generator=generator)

    def step_on() -> Tensor:
        return advance(x_t, rows, lambda part: logits[rows[part]], a, u, rule, vocab_size=130)

    whole = step_on()
    monkeypatch.setattr(step, "CPU_LOGITS", 11 * 130)
    monkeypatch.setattr(step, "CPU_WEIGHTS", 4 * 130)
    assert torch.equal(step_on(), whole)


def test_advance_without_movers_is_the_same_state() -> None:
    x_t, nothing = torch.arange(6)[None], torch.zeros(0)
    for rule in RULES:
        x = advance(x_t, nothing.long(), lambda part: nothing, nothing, nothing, rule, vocab_size=6)
        assert torch.equal(x, x_t)


@pytest.mark.parametrize(("block", "chunks"), [(64, 250), (8, 2250)])
def test_a_token_of_weight_0_is_never_drawn_in_ten_million_draws(
    block: int, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One million draws with blocks as they are, nine with small ones: the sums are an eighth."""
    monkeypatch.setattr(step, "DRAW_BLOCK", block)
    vocab_size, rows = block + 6, 4000
    generator = torch.Generator().manual_seed(12)
    weights = torch.rand(rows, vocab_size, generator=generator)
    weights[torch.rand(rows, vocab_size, generator=generator) < 0.6] = 0.0
    weights[:, 0] = weights[:, -1] = 0.0
    weights[:, block - 4 : block + 3] = 0.0  # across a block's edge
    weights[: rows // 3, block:] = 0.0  # a whole block, the last
    weights[rows // 3 :, block + 3] += 0.001
    weights[-rows // 3 :, :block] = 0.0  # or the first
    weights[: rows // 3, 3] += 0.001
    weights *= 10.0 ** (-12 * torch.rand(rows, 1, generator=generator))
    weights = weights.double()  # the same sums, without as many conversions
    drawn_zero = 0
    for k in range(chunks):
        u = torch.rand(rows, dtype=torch.float64, generator=generator)
        u[0], u[1], u[2] = 0.0, BELOW_1, 2.0**-53
        if k == 0:
            u[: rows // 2], u[rows // 2 :] = 0.0, BELOW_1
        tokens = draw(weights, u)
        drawn_zero += int((weights[torch.arange(rows), tokens] == 0.0).sum())
    assert drawn_zero == 0


def test_draw_meets_the_edges_of_dyadic_weights_exactly() -> None:
    weights = torch.zeros(1, 130)
    weights[0, [3, 63, 64, 128]] = torch.tensor([0.25, 0.25, 0.25, 0.25])
    u = f64(0.0, math.nextafter(0.25, 0), 0.25, math.nextafter(0.5, 0), 0.5, 0.75, BELOW_1)
    assert draw(weights.expand(7, -1), u).tolist() == [3, 3, 63, 63, 64, 128, 128]


def test_rounding_within_a_faint_block_never_draws_a_token_of_weight_0() -> None:
    # Beside a weight of 1, the place within a block of 1e-12 has few digits left.
    rows = 4000
    generator = torch.Generator().manual_seed(21)
    weights = torch.zeros(rows, 130)
    weights[:, 3] = 1.0
    weights[:, 64:67] = torch.rand(rows, 3, generator=generator)
    weights[:, 64:67] *= 10.0 ** -(8 + 7 * torch.rand(rows, 1, generator=generator))
    for k in range(1, 9):
        tokens = draw(weights, torch.full((rows,), 1.0 - k * 2.0**-53, dtype=torch.float64))
        assert (weights[torch.arange(rows), tokens] > 0.0).all()


def test_draw_is_the_inverse_of_the_float64_cdf_and_monotone_in_u() -> None:
    weights = torch.rand(1, 1000, generator=torch.Generator().manual_seed(13)) ** 8
    u = torch.rand(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(14))
    u = u.sort().values
    tokens = draw(weights.expand(5000, -1), u)
    cdf = weights[0].double().cumsum(0)
    assert torch.equal(tokens, torch.searchsorted(cdf, u * cdf[-1], right=True))
    assert (tokens.diff() >= 0).all()


def test_draw_reaches_every_part_of_the_tail_of_a_peaked_50k_way_distribution() -> None:
    # Tail weights of 1e-9 vanish beside 1 in float32 sums.
    vocab_size, rows = 50_257, 400
    weights = 1e-9 * (0.5 + torch.rand(vocab_size, generator=torch.Generator().manual_seed(15)))
    weights[20_000] = 1.0
    cdf = weights.double().cumsum(0)
    tail = float(cdf[-1] - weights[20_000].double())
    assert 4e-5 < tail < 6e-5
    # Half of the draws below the peak, half above, evenly over the tail's mass.
    part = (torch.arange(rows // 2, dtype=torch.float64) + 0.5) / (rows // 2)
    below, above = cdf[19_999] / cdf[-1], (cdf[-1] - cdf[20_000]) / cdf[-1]
    u = torch.cat([part * below, 1.0 - part * above])
    tokens = draw(weights.expand(rows, -1), u)
    assert torch.equal(tokens, torch.searchsorted(cdf, u * cdf[-1], right=True))
    assert len(tokens.unique()) == rows and not (tokens == 20_000).any()
    at_peak = draw(weights.expand(2, -1), torch.stack([below + 1e-12, 1.0 - above - 1e-12]))
    assert at_peak.tolist() == [20_000, 20_000]


# Movers.


@pytest.mark.parametrize("movers", MOVERS.values(), ids=MOVERS)
@pytest.mark.parametrize("a", [0.037, 0.3, 0.99])
def test_movers_give_every_position_the_same_marginal_chance(movers: Movers, a: float) -> None:
    free, repeats = 7, 5000
    u = torch.rand(
        (repeats, free + 1), dtype=torch.float64, generator=torch.Generator().manual_seed(16)
    )
    everywhere = torch.ones(repeats, free, dtype=torch.bool)
    chosen = movers(a, u[:, :-1], everywhere, u[:, -1]).double()
    assert (chosen.mean(0) - a).abs().max() < 4.5 * math.sqrt(a * (1 - a) / repeats)


def test_systematic_movers_number_floor_or_ceil_of_a_f() -> None:
    generator = torch.Generator().manual_seed(17)
    free = torch.arange(64) < torch.tensor([0, 1, 2, 7, 64])[:, None]
    free = free[:, torch.randperm(64, generator=generator)]
    for a in (0.001, 0.3, 0.5, 0.97, 1.0):
        for offset in (0.0, 0.41, BELOW_1):
            u = torch.rand(free.shape, dtype=torch.float64, generator=generator)
            expected, count = a * free.sum(1), systematic_movers(a, u, free, f64(offset)).sum(1)
            assert (expected.floor() <= count).all() and (count <= expected.ceil()).all()


@pytest.mark.parametrize("movers", MOVERS.values(), ids=MOVERS)
def test_frozen_positions_never_move_and_do_not_change_who_does(movers: Movers) -> None:
    generator = torch.Generator().manual_seed(23)
    u = torch.rand((2, 30), dtype=torch.float64, generator=generator)
    free, offset = torch.rand(2, 30, generator=generator) < 0.6, f64(0.2, 0.9)
    chosen = movers(0.5, u, free, offset)
    assert not (chosen & ~free).any()
    for b in range(2):
        every = torch.ones(1, int(free[b].sum()), dtype=torch.bool)
        alone = movers(0.5, u[b][free[b]][None], every, offset[b : b + 1])
        assert torch.equal(chosen[b][free[b]], alone[0])


@pytest.mark.parametrize("movers", MOVERS.values(), ids=MOVERS)
def test_everybody_moves_where_a_is_1_and_nobody_where_it_is_0(movers: Movers) -> None:
    u, everywhere = f64(0.0, 0.5, BELOW_1)[None], torch.ones(1, 3, dtype=torch.bool)
    assert movers(1.0, u, everywhere, f64(BELOW_1)).all()
    assert not movers(0.0, u, everywhere, f64(BELOW_1)).any()


def test_independent_movers_are_independent() -> None:
    a, repeats = 0.3, 40_000
    u = torch.rand((repeats, 2), dtype=torch.float64, generator=torch.Generator().manual_seed(18))
    everywhere = torch.ones(repeats, 2, dtype=torch.bool)
    both = independent_movers(a, u, everywhere, u[:, 0]).all(1).double().mean()
    assert abs(both - a * a) < 4.5 * math.sqrt(a * a * (1 - a * a) / repeats)


# Temperature.


def test_temperature_divides_the_logits_and_0_takes_the_likeliest() -> None:
    logits = torch.tensor([[0.1, 2.0, -1.0, 1.9]])
    torch.testing.assert_close(sharpen(logits), logits.softmax(-1))
    torch.testing.assert_close(sharpen(logits, 0.5), (2 * logits).softmax(-1))
    assert sharpen(logits, 0.0).tolist() == [[0.0, 1.0, 0.0, 0.0]]


def test_bf16_logits_are_taken_to_float32_first() -> None:
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(19)).bfloat16()
    p = sharpen(logits, 0.7)
    assert p.dtype == torch.float32
    assert torch.equal(p, sharpen(logits.float(), 0.7))
    torch.testing.assert_close(p.sum(1), torch.ones(4))


def test_jump_probability_is_what_exact_and_published_movers_use() -> None:
    t, h = f64(0.25), f64(0.125)
    for rule in (EXACT, PUBLISHED):
        assert torch.equal(rule.mover_probability(LINEAR, t, h), jump_probability(LINEAR, t, h))
    assert float(jump_probability(LINEAR, t, h)) == pytest.approx(1 / 6, rel=1e-15)
