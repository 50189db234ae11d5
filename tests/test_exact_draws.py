"""With exact conditionals, drawing in groups has the joint law: sampled, and counted out.

A law over L tokens of two kinds is a table of 2 ** L chances, so every conditional is known.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fsdfm.flow.grid import Late
from fsdfm.flow.path import Source, make_source
from fsdfm.flow.posterior import SEAMS, Call, Grouped, Sequences
from fsdfm.flow.sampler import Drawing, Noise, sample
from fsdfm.flow.step import draw

L = 4
TEXTS = torch.tensor(list(itertools.product((0, 1), repeat=L)))
"""All texts, (2 ** L, L); the number of a text is its place here."""
ANY = torch.tensor([9.0, 1, 2, 6, 1, 4, 1, 3, 2, 1, 7, 1, 1, 5, 2, 8], dtype=torch.float64)
ANY /= ANY.sum()
"""A law in which every position depends on every other."""
PAIR = torch.tensor([[0.4, 0.1], [0.05, 0.45]], dtype=torch.float64)
PAIRS = (PAIR[TEXTS[:, 0], TEXTS[:, 1]] * PAIR[TEXTS[:, 2], TEXTS[:, 3]]).clone()
"""Two pairs that know nothing of each other."""
COUNT = 6_000


class Oracle:
    """The exact p(x_1[i] given x_t and what is known) of a law: a `FlowModel`.

    A hidden row is its sequence's state and its time.
    """

    def __init__(self, law: Tensor, source: Source) -> None:
        self.law, self.source = law, source

    def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """States and times, (B, L, L + 1)."""
        rows = torch.cat((x_t.double(), t.double()[:, None]), 1)
        return rows[:, None].expand(-1, x_t.shape[1], -1)

    def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
        """ln p(x_1[i]), (N, 2): x counts only where it is known."""
        x_t, t = rows[:, :L], rows[:, L:, None]
        same = (x_t[:, None] == TEXTS).double()  # (N, 2 ** L, L)
        other = 1.0 - t if self.source.absorbing else (1.0 - t) / 2.0
        seen = torch.where((x_t == 2)[:, None], 1.0 - t, t * same + other * (x_t[:, None] < 2))
        if not self.source.absorbing:
            seen = t * same + other
        sequence = at // x.shape[1]
        agrees = (x[sequence][:, None] == TEXTS) | ~known[sequence][:, None]
        weight = self.law * torch.where(known[sequence][:, None], 1.0, seen).prod(2)
        weight = weight * agrees.all(2)
        ones = TEXTS.T[at % L].double()  # (N, 2 ** L): what each text has there
        p = torch.stack(((weight * (1.0 - ones)).sum(1), (weight * ones).sum(1)), 1)
        return (p / p.sum(1, keepdim=True)).log()

    def head(self, rows: Tensor) -> Tensor:
        """The rows are logits already."""
        return rows


def posterior(law: Tensor, x_t: Tensor, t: float) -> Tensor:
    """p(x_1 given x_t) of the uniform source, (2 ** L,)."""
    weight = law * (t * (x_t == TEXTS).double() + (1.0 - t) / 2.0).prod(1)
    return weight / weight.sum()


def differs(x: Tensor, law: Tensor) -> float:
    """Chi-square of texts against a law, in standard deviations from its mean."""
    number = (x * (2 ** torch.arange(L - 1, -1, -1))).sum(1)
    counts, wanted = torch.bincount(number, minlength=len(law)).double(), len(x) * law
    assert not counts[wanted == 0.0].any()
    cells = wanted > 0.0
    free = int(cells.sum()) - 1
    square = ((counts - wanted)[cells] ** 2 / wanted[cells]).sum()
    return float((square - free) / (2 * free) ** 0.5)


def called(law: Tensor, x_t: Tensor, t: float, groups: int, seams: str) -> Tensor:
    """What many sequences in one state draw in a call in which all positions move."""
    source, noise = make_source("uniform", 2), Noise([7])
    oracle, x = Oracle(law, source), x_t.expand(COUNT, L)
    call = Call.of(
        Sequences(oracle),
        x,
        (t, 1.0 - t),
        torch.ones(COUNT, L, dtype=torch.bool),
        torch.zeros(COUNT, L, dtype=torch.bool),
        (noise.uniform(COUNT * L)[0], noise.uniform(COUNT)[0]),
        lambda rows, _, at, u: draw(rows.exp(), u),
    )
    return call.placed(Grouped(oracle, groups, seams).tokens(call))


@pytest.mark.parametrize("seams", SEAMS)
@pytest.mark.parametrize(
    ("law", "groups"), [(PAIRS, 2), (PAIRS, 3), (PAIRS, 4), (PAIRS, 8), (ANY, 4), (ANY, 8)]
)
def test_a_call_has_the_joint_posterior_of_its_state(law: Tensor, groups: int, seams: str) -> None:
    """So it keeps every position's p(x_1 given x_t), too."""
    x_t, t = torch.tensor([0, 1, 1, 0]), 0.4
    x, wanted = called(law, x_t, t, groups, seams), posterior(law, x_t, t)
    assert abs(differs(x, wanted)) < 4.5
    marginal = wanted @ TEXTS.double()
    error = (marginal * (1.0 - marginal) / COUNT).sqrt()
    assert ((x.double().mean(0) - marginal).abs() < 4.5 * error).all()


def test_one_group_has_the_product_of_the_marginals() -> None:
    x_t, t = torch.tensor([0, 1, 1, 0]), 0.4
    x, joint = called(ANY, x_t, t, 1, "fixed"), posterior(ANY, x_t, t)
    ones = joint @ TEXTS.double()
    product = torch.where(TEXTS == 1, ones, 1.0 - ones).prod(1)
    assert abs(differs(x, product)) < 4.5
    assert differs(x, joint) > 30.0


@pytest.mark.parametrize("source", ["uniform", "mask"])
@pytest.mark.parametrize("seams", SEAMS)
@pytest.mark.parametrize(("steps", "power"), [(1, 1.0), (2, 1.0), (5, 8.0)])
def test_any_number_of_calls_has_the_law(steps: int, power: float, seams: str, source: str) -> None:
    begin = make_source(source, 2)
    oracle, noise = Oracle(ANY, begin), Noise(range(COUNT))
    drawing = Drawing(posterior=Grouped(oracle, 4, seams))
    x_0, grid = noise.start(begin, L), Late(power)(steps)
    *_, last = sample(Sequences(oracle), x_0, grid, noise, begin, drawing=drawing)
    assert abs(differs(last.x, ANY)) < 4.5


@pytest.mark.parametrize("seams", SEAMS)
def test_what_is_frozen_is_conditioned_on(seams: str) -> None:
    begin, noise = make_source("uniform", 2), Noise(range(COUNT))
    oracle, x_0 = Oracle(ANY, begin), noise.start(begin, L)
    frozen = torch.tensor([False, True, False, True]).expand(COUNT, L)
    x_0 = torch.where(frozen, torch.tensor([0, 1, 0, 0]), x_0)
    drawing = Drawing(posterior=Grouped(oracle, 4, seams))
    grid = Late(1.0)(3)
    *_, last = sample(Sequences(oracle), x_0, grid, noise, begin, drawing=drawing, frozen=frozen)
    given = ANY * ((TEXTS[:, 1] == 1) & (TEXTS[:, 3] == 0))
    assert abs(differs(last.x, given / given.sum())) < 4.5


def test_random_seams_give_a_sequence_the_same_alone_and_in_a_batch() -> None:
    begin = make_source("uniform", 2)
    oracle = Oracle(ANY, begin)
    drawing = Drawing(posterior=Grouped(oracle, 3, "random"))

    def texts(seeds: list[int]) -> Tensor:
        noise = Noise(seeds)
        x_0 = noise.start(begin, L)
        *_, last = sample(Sequences(oracle), x_0, Late(2.0)(3), noise, begin, drawing=drawing)
        return last.x

    together = texts(list(range(50)))
    assert torch.equal(together, torch.cat([texts([seed]) for seed in range(50)]))


def test_at_random_seams_every_position_is_the_first_of_a_block_as_often() -> None:
    firsts = torch.zeros(L)

    class Noted(Oracle):
        def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
            blind = ~known[at // L].any(1)
            firsts.add_(torch.bincount(at[blind] % L, minlength=L))
            return super().told(rows, at, x, known)

    begin, noise = make_source("uniform", 2), Noise(range(4000))
    oracle = Noted(ANY, begin)
    drawing = Drawing(posterior=Grouped(oracle, 4, "random"))
    list(sample(Sequences(oracle), noise.start(begin, L), Late()(1), noise, begin, drawing=drawing))
    share = firsts / 4000
    assert ((share - 0.25).abs() < 4.5 * (0.25 * 0.75 / 4000) ** 0.5).all()
