"""Truths of distillation targets: clocks, means, and two half steps as one."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fsdfm.flow.path import MaskSource, Source, UniformSource
from fsdfm.flow.schedule import Polynomial
from fsdfm.flow.step import EXACT, PUBLISHED, STEP_RULES, transition
from fsdfm.flow.target import (
    TARGETS,
    Jumper,
    Target,
    TargetRule,
    rk2_target,
    rk4_target,
    semigroup_target,
)

VOCAB = 4


class Table:
    """Logits that depend on the token (a mask id too) and, smoothly, on t; the head is linear."""

    def __init__(self, seed: int = 0, *, moving: bool = True, columns: int = VOCAB) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.still, self.slope = torch.randn(2, VOCAB + 1, 6, generator=generator)
        self.weight = torch.randn(6, columns, generator=generator)
        self.moving = moving
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        self.calls.append((x_t, t, h))
        if not self.moving:
            return self.still[0].expand(*x_t.shape, 6)
        return self.still[x_t] + t[:, None, None] * self.slope[x_t]

    def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
        return rows

    def head(self, rows: Tensor) -> Tensor:
        return rows @ self.weight

    def posterior(self, t: float) -> Tensor:
        """p(. given x) for every data token x, float64, (V, V)."""
        hidden = self.still[:VOCAB] + t * self.slope[:VOCAB]
        return self.head(hidden).double().softmax(-1)


def probabilities(made: Target, model: Table, rows: slice) -> Tensor:
    """The target at some rows, mixed in two pieces."""
    logits, half = made.logits(model, rows, VOCAB), (rows.stop - rows.start) // 2
    pieces = slice(0, half), slice(half, rows.stop - rows.start)
    return torch.cat([made.mix(logits, rows, piece) for piece in pieces])


def jumper(model: Table, schedule: Polynomial | None = None, seed: int = 1) -> Jumper:
    generator = torch.Generator().manual_seed(seed)
    return Jumper(model, schedule or Polynomial(), EXACT, UniformSource(VOCAB), generator)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("rule", STEP_RULES)
def test_every_target_of_a_constant_posterior_is_that_posterior(
    target: TargetRule, rule: str
) -> None:
    model = Table(moving=False, columns=VOCAB + 1)  # the mask column is left out
    x_t = torch.randint(VOCAB + 1, (3, 8), generator=torch.Generator().manual_seed(2))
    walker = Jumper(
        model,
        Polynomial(),
        STEP_RULES[rule],
        MaskSource(VOCAB),
        torch.Generator().manual_seed(3),
        x_t == VOCAB,
    )
    made = target(walker, x_t, f64(0.0, 0.25, 0.5), f64(1.0, 0.25, 0.5))
    truth = model.head(model.still[0])[:VOCAB].softmax(-1)
    p = probabilities(made, model, slice(0, 24))
    assert p.dtype == torch.float32
    torch.testing.assert_close(p, truth.expand(24, -1), rtol=0, atol=1e-6)
    torch.testing.assert_close(probabilities(made, model, slice(5, 9)), p[5:9])


@pytest.mark.parametrize(
    ("target", "clocks"),
    [
        (rk4_target, [0.0, 0.5, 0.5, 1.0]),
        (rk2_target, [0.0, 0.5]),
        (semigroup_target, [0.0, 0.5]),
    ],
)
def test_targets_ask_the_model_at_their_clocks_with_half_the_step(
    target: TargetRule, clocks: list[float]
) -> None:
    model, t, h = Table(), f64(0.0, 0.25, 0.75), f64(1.0, 0.125, 0.25)
    target(jumper(model), torch.zeros(3, 5, dtype=torch.int64), t, h)
    assert len(model.calls) == len(clocks)
    for (_, clock, step), part in zip(model.calls, clocks, strict=True):
        assert torch.equal(clock, (t + part * h).float())
        assert torch.equal(step, (h / 2).float())


@pytest.mark.parametrize(("target", "weights"), [(rk4_target, [1, 2, 2, 1]), (rk2_target, [1, 1])])
def test_runge_kutta_targets_are_the_softmax_of_the_mean_of_logits(
    target: TargetRule, weights: list[int]
) -> None:
    model, t, h = Table(), f64(0.25, 0.5), f64(0.5, 0.5)
    x_t = torch.randint(VOCAB, (2, 50), generator=torch.Generator().manual_seed(4))
    made = target(jumper(model), x_t, t, h)
    states = list(model.calls)
    logits = torch.stack([model.head(model.body(*call)).flatten(0, 1) for call in states])
    share = torch.tensor(weights) / sum(weights)
    expected = (share[:, None, None] * logits).sum(0).softmax(-1)
    p = probabilities(made, model, slice(0, 100))
    torch.testing.assert_close(p, expected, rtol=0, atol=1e-6)
    assert torch.equal(states[0][0], x_t)
    for before, after in itertools.pairwise(states):
        assert not torch.equal(before[0], after[0])


def test_the_third_runge_kutta_state_has_jumped_three_half_steps() -> None:
    # From masks, what is hidden is what never moved: (1 - a_1) (1 - a_2) ** 2.
    model, length = Table(), 40_000
    x_t = torch.full((1, length), VOCAB)
    rk4_target(jumper(model), x_t, f64(0.2), f64(0.4))
    a_1, a_2 = 0.2 / 0.8, 0.2 / 0.6
    hidden = [1.0, 1 - a_1, (1 - a_1) * (1 - a_2), (1 - a_1) * (1 - a_2) ** 2]
    for (x, _, _), share in zip(model.calls, hidden, strict=True):
        error = 4.5 * math.sqrt(share * (1 - share) / length)
        assert abs(float((x == VOCAB).double().mean()) - share) <= error


SCHEDULES = [Polynomial(1.0), Polynomial(2.0), Polynomial(3.5)]
STEPS = [(0.0, 0.5), (0.0, 1.0), (0.25, 0.5), (0.5, 0.125), (0.75, 0.25)]


def composed_landing(model: Table, schedule: Polynomial, t: float, h: float) -> Tensor:
    """Where a mover of a whole step lands if it takes two exact half steps, by state, (V, V)."""
    half, all_tokens = f64(h / 2).expand(VOCAB), torch.arange(VOCAB)
    first, second = (
        transition(
            EXACT,
            model.posterior(time),
            all_tokens,
            EXACT.mover_probability(schedule, f64(time).expand(VOCAB), half),
        )
        for time in (t, t + h / 2)
    )
    a = EXACT.mover_probability(schedule, f64(t), f64(h))
    return (first @ second - (1 - a) * torch.eye(VOCAB)) / a


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("t", "h"), STEPS)
def test_semigroup_weights_compose_two_exact_half_steps(
    schedule: Polynomial, t: float, h: float
) -> None:
    model = Table()
    made = semigroup_target(jumper(model, schedule), torch.arange(VOCAB)[None], f64(t), f64(h))
    w, rest = (weight.double()[:, None] for weight in made.weights)
    torch.testing.assert_close(w + rest, torch.ones(VOCAB, 1, dtype=torch.float64))
    # E_y p(y), y one exact half step from x
    half = f64(h / 2).expand(VOCAB)
    a = EXACT.mover_probability(schedule, f64(t).expand(VOCAB), half)
    y = transition(EXACT, model.posterior(t), torch.arange(VOCAB), a)
    mixture = w * model.posterior(t) + rest * (y @ model.posterior(t + h / 2))
    # w is float32.
    torch.testing.assert_close(mixture, composed_landing(model, schedule, t, h), rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_semigroup_ignores_the_first_half_of_a_last_step(schedule: Polynomial) -> None:
    t = 1.0 - 0.5 ** torch.arange(11, dtype=torch.float64)
    x_t = torch.zeros(11, 2, dtype=torch.int64)
    made = semigroup_target(jumper(Table(), schedule), x_t, t, 1.0 - t)
    assert (made.weights[0] == 0.0).all() and (made.weights[1] == 1.0).all()


def test_semigroup_weight_differs_by_sequence_and_is_right_by_hand() -> None:
    # kappa = t: w = (1 - s) h' / ((1 - u) h) = (1 - s) / (2 (1 - u))
    x_t = torch.zeros(2, 3, dtype=torch.int64)
    made = semigroup_target(jumper(Table()), x_t, f64(0.25, 0.0), f64(0.5, 0.5))
    expected = torch.tensor([0.25 / 1.0] * 3 + [0.5 / 1.5] * 3)
    torch.testing.assert_close(made.weights[0], expected)


@pytest.mark.parametrize("target", [rk4_target, rk2_target])
def test_means_of_bfloat16_rows_lose_nothing(target: TargetRule) -> None:
    class Rough(Table):
        """The same bfloat16 rows at every call, as autocast gives them."""

        def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
            return super().body(x_t, torch.zeros_like(t), h).bfloat16()

    model = Rough(moving=False)
    x_t = torch.randint(VOCAB, (2, 50), generator=torch.Generator().manual_seed(4))
    made = target(jumper(model), x_t, f64(0.25, 0.5), f64(0.5, 0.5))
    same = model.body(x_t, f64(0.0, 0.0), f64(0.5, 0.5)).float().flatten(0, 1)
    torch.testing.assert_close(made.hiddens[0], same, rtol=2**-20, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES[:2])
def test_semigroup_target_is_unbiased_from_one_draw_of_the_middle_state(
    schedule: Polynomial,
) -> None:
    model, repeats, t, h = Table(), 40_000, 0.25, 0.5
    x_t = torch.arange(VOCAB).repeat(repeats)[None]
    made = semigroup_target(jumper(model, schedule), x_t, f64(t), f64(h))
    p = probabilities(made, model, slice(0, repeats * VOCAB)).view(repeats, VOCAB, VOCAB)
    error = 4.5 * p.double().std(0) / math.sqrt(repeats) + 1e-6
    truth = composed_landing(model, schedule, t, h)
    assert ((p.double().mean(0) - truth).abs() < error).all()
    # The test can tell: the posterior at the start alone is far away.
    assert ((model.posterior(t) - truth).abs() > 10 * error).any()


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_target_is_made_where_no_position_jumps(target: TargetRule) -> None:
    # One position, tiny steps: nearly always nobody moves.
    model, x_t = Table(), torch.zeros(1, 1, dtype=torch.int64)
    for seed in range(20):
        made = target(jumper(model, seed=seed), x_t, f64(0.0), f64(2.0**-9))
        p = probabilities(made, model, slice(0, 1))
        torch.testing.assert_close(p.sum(1), torch.ones(1))


def test_jumps_of_a_target_follow_its_own_rule() -> None:
    model, length = Table(), 40_000
    t, h = f64(0.25), f64(0.25)
    x_t = torch.zeros(1, length, dtype=torch.int64)
    for rule in (EXACT, PUBLISHED):
        walker = Jumper(
            model, Polynomial(), rule, UniformSource(VOCAB), torch.Generator().manual_seed(5)
        )
        x = walker.jump(x_t, walker.hidden(x_t, t, h), t, h)
        a = rule.mover_probability(Polynomial(), t, h)
        truth = transition(rule, model.posterior(0.25)[:1], x_t[0, :1], a)[0]
        shares = x[0].bincount(minlength=VOCAB).double() / length
        assert ((shares - truth).abs() < 4.5 * (truth * (1 - truth) / length).sqrt()).all()


BIAS = torch.tensor([0.9, -0.4, 0.0, 0.3, -1.2, 0.6])


class Folded(Table):
    """Has in its body what `Telling` has in its joint head."""

    def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        return super().body(x_t, t, h) + BIAS


class Telling(Table):
    """Its joint head moves every row, whatever is known; it notes what was."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[Tensor, Tensor, Tensor]] = []

    def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
        self.heard.append((at, x, known))
        return rows + BIAS


@pytest.mark.parametrize("source", [UniformSource(VOCAB), MaskSource(VOCAB)], ids=repr)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_target_and_its_jumps_pass_through_a_joint_head_that_knows_what_is_revealed(
    target: TargetRule, source: Source
) -> None:
    symbols = VOCAB + source.absorbing
    x_t = torch.randint(symbols, (2, 60), generator=torch.Generator().manual_seed(4))

    def made(model: Table) -> Target:
        generator = torch.Generator().manual_seed(1)
        opened = x_t == VOCAB if source.absorbing else None
        walker = Jumper(model, Polynomial(), EXACT, source, generator, opened)
        return target(walker, x_t, f64(0.25, 0.5), f64(0.5, 0.5))

    telling = Telling()
    found, folded, plain = made(telling), made(Folded()), made(Table())
    for mine, same, other in zip(found.hiddens, folded.hiddens, plain.hiddens, strict=True):
        torch.testing.assert_close(mine, same, rtol=0, atol=1e-6)
        assert (mine - other).abs().amin() < (mine - other).abs().amax()
    assert len(telling.heard) == len(telling.calls) > 1
    for at, x, known in telling.heard:
        assert torch.equal(at, torch.arange(120))
        assert torch.equal(known, x != VOCAB if source.absorbing else torch.zeros_like(known))
