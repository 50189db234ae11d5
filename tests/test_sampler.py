"""Truths of sampling: who is asked, how often, what never moves, what comes out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fsdfm.flow.grid import SMALLEST_STEP, checked_grid, even_grid
from fsdfm.flow.path import MaskSource, Source, UniformSource, make_source
from fsdfm.flow.posterior import Sequences
from fsdfm.flow.sampler import Drawing, Noise, State, sample
from fsdfm.flow.schedule import Polynomial
from fsdfm.flow.step import EULER, EXACT, MOVERS, STEP_RULES, systematic_movers

RULES = list(STEP_RULES.values())
CHOICES = list(itertools.product(STEP_RULES, MOVERS))


class NextToken:
    """Wants the token after the one that is there, so that every mover is seen to move."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.clocks: list[tuple[Tensor, Tensor]] = []
        self.asked: list[list[int]] = []

    def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        self.clocks.append((t, h))
        self.asked.append([])
        return torch.stack([x_t, torch.arange(x_t.numel()).view_as(x_t)], -1)

    def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
        return rows

    def head(self, rows: Tensor) -> Tensor:
        self.asked[-1] += rows[:, 1].tolist()
        wanted = (rows[:, 0] + 1) % self.vocab_size
        return torch.where(F.one_hot(wanted, self.vocab_size) == 1, 0.0, -torch.inf)


class Fixed:
    """The same logits everywhere."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.calls = self.rows = 0

    def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        self.calls += 1
        return torch.zeros(*x_t.shape, 1)

    def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
        return rows

    def head(self, rows: Tensor) -> Tensor:
        self.rows += len(rows)
        return self.logits.expand(len(rows), -1)


class OneToken:
    """The true posterior of independent tokens distributed as p_1, by Bayes."""

    def __init__(self, p_1: Tensor, source: Source) -> None:
        self.p_1, self.source = p_1, source

    def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        vocab_size, kappa = len(self.p_1), t.double()[:, None, None]
        shown = F.one_hot(x_t, vocab_size + 1)[..., :vocab_size]
        if isinstance(self.source, MaskSource):
            return torch.where((x_t == vocab_size)[..., None], self.p_1, shown.double())
        return (kappa * shown + (1 - kappa) / vocab_size) * self.p_1

    def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
        return rows

    def head(self, rows: Tensor) -> Tensor:
        return rows.log()


def run(
    model: NextToken | Fixed | OneToken,
    source: Source,
    grid: Tensor,
    *,
    seeds: range | list[int],
    length: int,
    drawing: Drawing | None = None,
    frozen: Tensor | None = None,
    schedule: Polynomial | None = None,
) -> list[State]:
    noise = Noise(seeds)
    x_0 = noise.start(source, length)
    walk = sample(
        Sequences(model),
        x_0,
        grid,
        noise,
        source,
        drawing=drawing,
        frozen=frozen,
        schedule=schedule,
    )
    return list(walk)


def drawing_of(rule: str, movers: str) -> Drawing:
    return Drawing(rule=STEP_RULES[rule], movers=MOVERS[movers])


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 1000])
def test_a_budget_of_n_takes_exactly_n_calls(steps: int) -> None:
    # Systematic movers: a F >= 2 on every step, so that somebody always moves.
    model = NextToken(5)
    states = run(
        model,
        UniformSource(5),
        even_grid(steps),
        seeds=[1],
        length=2000,
        drawing=Drawing(movers=systematic_movers),
    )
    assert [state.calls for state in states] == list(range(steps + 1))
    assert len(model.clocks) == steps


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_no_call_is_made_where_nobody_moves_and_calls_are_counted_all_the_same(steps: int) -> None:
    model = NextToken(5)
    states = run(model, UniformSource(5), even_grid(steps), seeds=[2, 3], length=4)
    changed = sum(
        not torch.equal(before.x, after.x) for before, after in itertools.pairwise(states)
    )
    assert states[-1].calls == len(model.clocks) == changed
    assert all(model.asked)
    assert changed < steps or steps < 1000


def test_no_call_is_made_where_everything_is_frozen_or_the_rate_is_0() -> None:
    model = NextToken(5)
    frozen = torch.ones(2, 9, dtype=torch.bool)
    states = run(model, UniformSource(5), even_grid(4), seeds=[1, 2], length=9, frozen=frozen)
    assert states[-1].calls == len(model.clocks) == 0
    assert torch.equal(states[-1].x, states[0].x)
    # Euler with kappa = t ** 2: the rate is 0 at the start.
    states = run(
        model,
        UniformSource(5),
        even_grid(4),
        seeds=[1],
        length=1000,
        drawing=Drawing(rule=EULER),
        schedule=Polynomial(2.0),
    )
    assert [state.calls for state in states] == [0, 0, 1, 2, 3]


@pytest.mark.parametrize(("rule", "movers"), CHOICES)
@pytest.mark.parametrize("source", ["uniform", "mask"])
def test_the_head_runs_on_exactly_the_movers(rule: str, movers: str, source: str) -> None:
    model = NextToken(5)
    states = run(
        model,
        make_source(source, 5),
        even_grid(7),
        seeds=[4, 5, 6],
        length=400,
        drawing=drawing_of(rule, movers),
    )
    assert states[-1].calls == 7
    rows = 0
    for (before, after), asked in zip(itertools.pairwise(states), model.asked, strict=True):
        assert (before.x != after.x).flatten().nonzero()[:, 0].tolist() == asked
        rows += len(asked)
        assert after.head_rows == rows


def test_the_head_runs_on_harmonic_number_of_n_rows_a_position() -> None:
    # (1 + 1/2 + ... + 1/8) L rows instead of 8 L; systematic movers round once a step.
    model, length = Fixed(torch.zeros(5)), 840
    drawing = Drawing(movers=systematic_movers)
    states = run(model, UniformSource(5), even_grid(8), seeds=[7], length=length, drawing=drawing)
    rows = sum(length / k for k in range(1, 9))
    assert abs(states[-1].head_rows - rows) <= 8
    assert model.rows == states[-1].head_rows


@pytest.mark.parametrize(("rule", "movers"), CHOICES)
def test_frozen_positions_never_move_and_all_others_can(rule: str, movers: str) -> None:
    generator = torch.Generator().manual_seed(8)
    frozen = torch.rand(6, 50, generator=generator) < 0.4
    frozen[:, :5] = True  # a prompt
    frozen[0], frozen[1] = False, True  # nobody and everybody in one batch
    prompt = torch.randint(7, (6, 50), generator=generator)
    for source in (UniformSource(7), MaskSource(7)):
        noise = Noise(range(6))
        x_0 = torch.where(frozen, prompt, noise.start(source, 50))
        model = NextToken(7)
        walk = sample(
            Sequences(model),
            x_0,
            even_grid(3),
            noise,
            source,
            drawing=drawing_of(rule, movers),
            frozen=frozen,
        )
        moved = torch.zeros_like(frozen)
        for before, after in itertools.pairwise(walk):
            assert torch.equal(after.x[frozen], prompt[frozen])
            moved |= before.x != after.x
        assert torch.equal(moved, ~frozen)  # on the last step, everybody


@pytest.mark.parametrize(("rule", "movers"), CHOICES)
@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_the_mask_id_is_never_in_the_output_nor_drawn_on_the_way(
    rule: str, movers: str, steps: int
) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 50.0])  # the mask column, by far the likeliest
    states = run(
        Fixed(logits),
        MaskSource(3),
        even_grid(steps),
        seeds=range(4),
        length=60,
        drawing=drawing_of(rule, movers),
    )
    assert (states[0].x == 3).all()
    assert (states[-1].x < 3).all()
    for before, after in itertools.pairwise(states):
        assert (before.x == 3)[after.x == 3].all()


@pytest.mark.parametrize(("rule", "movers"), CHOICES)
@pytest.mark.parametrize("source", ["uniform", "mask"])
def test_a_sequence_is_the_same_alone_and_in_any_batch(rule: str, movers: str, source: str) -> None:
    vocab_size, length, seeds = 70, 30, [11, 5, 11, 400]
    model = Fixed(torch.randn(vocab_size, generator=torch.Generator().manual_seed(9)))
    made = {"grid": even_grid(7), "length": length, "drawing": drawing_of(rule, movers)}
    batch = run(model, make_source(source, vocab_size), seeds=seeds, **made)
    frozen = torch.zeros(2, length, dtype=torch.bool)
    frozen[0] = True  # a neighbour that never moves
    beside = run(model, make_source(source, vocab_size), seeds=[1, 5], frozen=frozen, **made)
    for k, seed in enumerate(seeds):
        alone = run(model, make_source(source, vocab_size), seeds=[seed], **made)
        for one, many in zip(alone, batch, strict=True):
            assert torch.equal(one.x[0], many.x[k])
    assert torch.equal(beside[-1].x[1], batch[-1].x[1])
    assert torch.equal(batch[-1].x[0], batch[-1].x[2])
    assert not torch.equal(batch[-1].x[0], batch[-1].x[1])


@pytest.mark.parametrize("grid", [even_grid(7), checked_grid([0.0, 0.05, 0.3, 0.9999, 1.0])])
def test_the_model_is_told_the_times_and_steps_of_the_grid(grid: Tensor) -> None:
    model = NextToken(5)
    states = run(model, UniformSource(5), grid, seeds=[1, 2], length=500)
    assert [state.t for state in states] == grid.tolist()
    assert len(model.clocks) == len(grid) - 1
    for (t, h), now, step in zip(model.clocks, grid, grid.diff(), strict=False):
        assert t.dtype == h.dtype == torch.float32
        assert torch.equal(t, now.float().expand(2))
        assert torch.equal(h, step.float().clamp(min=SMALLEST_STEP).expand(2))


def test_the_walk_yields_x_0_and_then_a_state_a_step_and_leaves_x_0_alone() -> None:
    noise = Noise([1])
    x_0 = noise.start(UniformSource(5), 20)
    before = x_0.clone()
    walk = sample(Sequences(NextToken(5)), x_0, even_grid(6), noise, UniformSource(5))
    first = next(walk)
    assert torch.equal(first.x, before)
    assert (first.step, first.t, first.calls, first.head_rows) == (0, 0.0, 0, 0)
    assert [state.step for state in walk] == [1, 2, 3, 4, 5, 6]
    assert torch.equal(x_0, before)


@pytest.mark.parametrize(("rule", "movers"), CHOICES)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_posterior_of_one_token_gives_that_token_everywhere(
    rule: str, movers: str, steps: int
) -> None:
    logits = torch.full((9,), -torch.inf)
    logits[4] = 0.0
    for source in (UniformSource(9), MaskSource(9)):
        states = run(
            Fixed(logits),
            source,
            even_grid(steps),
            seeds=[1, 2],
            length=40,
            drawing=drawing_of(rule, movers),
        )
        assert (states[-1].x == 4).all()


def test_temperature_0_gives_the_likeliest_token_everywhere() -> None:
    logits = torch.tensor([0.0, 0.3, 0.2])
    drawing = Drawing(temperature=0.0)
    states = run(
        Fixed(logits), UniformSource(3), even_grid(3), seeds=[1], length=99, drawing=drawing
    )
    assert (states[-1].x == 1).all()


def test_the_temperature_reaches_the_draw() -> None:
    p, length = torch.tensor([0.2, 0.4, 0.1, 0.3]), 20_000
    drawing = Drawing(temperature=0.5)  # squares: 4, 16, 1, 9 of 30
    states = run(
        Fixed(p.log()), UniformSource(4), even_grid(1), seeds=[1], length=length, drawing=drawing
    )
    shares = states[-1].x[0].bincount(minlength=4) / length
    squares = torch.tensor([4.0, 16.0, 1.0, 9.0]) / 30
    assert ((shares - squares).abs() < 4.5 * (squares * (1 - squares) / length).sqrt()).all()


@pytest.mark.parametrize("bad", [{"temperature": -0.1}, {"temperature": math.nan}])
def test_impossible_drawings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Drawing(**bad)


@pytest.mark.parametrize("source", ["uniform", "mask"])
@pytest.mark.parametrize("movers", MOVERS)
@pytest.mark.parametrize("grid", [even_grid(1), checked_grid([0.0, 0.07, 0.5, 0.62, 1.0])])
def test_the_exact_rule_samples_one_token_data_at_every_time(
    source: str, movers: str, grid: Tensor
) -> None:
    p_1, length = torch.tensor([0.55, 0.25, 0.15, 0.05], dtype=torch.float64), 40_000
    origin = make_source(source, 4)
    drawing = Drawing(rule=EXACT, movers=MOVERS[movers])
    states = run(OneToken(p_1, origin), origin, grid, seeds=[10], length=length, drawing=drawing)
    for state in states:
        start = torch.full((5,), 0.25, dtype=torch.float64)
        start[4] = 0.0
        if source == "mask":
            start = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
        truth = state.t * torch.cat([p_1, torch.zeros(1)]) + (1 - state.t) * start
        shares = state.x[0].bincount(minlength=5).double() / length
        assert ((shares - truth).abs() <= 4.5 * (truth * (1 - truth) / length).sqrt()).all()


@pytest.mark.parametrize("movers", MOVERS)
def test_free_positions_beside_frozen_ones_move_with_probability_a(movers: str) -> None:
    batch, length, a = 3000, 9, 0.3
    frozen = torch.zeros(batch, length, dtype=torch.bool)
    frozen[:, [0, 4]] = True
    states = run(
        NextToken(5),
        UniformSource(5),
        checked_grid([0.0, a, 1.0]),
        seeds=range(batch),
        length=length,
        drawing=Drawing(movers=MOVERS[movers]),
        frozen=frozen,
    )
    moved = states[1].x != states[0].x
    shares = moved[:, ~frozen[0]].double().mean(0)
    assert (shares - a).abs().max() < 4.5 * math.sqrt(a * (1 - a) / batch)
    if movers == "systematic":  # 7 free positions: a F = 2.1
        assert set(moved.sum(1).tolist()) == {2, 3}


def test_noise_of_a_seed_is_its_own_and_float64() -> None:
    both, one = Noise([3, 4]), Noise([4])
    assert torch.equal(both.start(UniformSource(9), 5)[1], one.start(UniformSource(9), 5)[0])
    u = both.uniform(1000)
    assert torch.equal(u[1], one.uniform(1000)[0])
    assert u.dtype == torch.float64 and ((u >= 0.0) & (u < 1.0)).all()
    assert (u != u.float().double()).any()
