"""Truths of time: schedules, grids, sources and the path between source and data."""

from __future__ import annotations

import math

import pytest
import torch

from fsdfm.core.errors import ConfigError
from fsdfm.flow.grid import GRIDS, Late, checked_grid, even_grid
from fsdfm.flow.path import MaskSource, UniformSource, make_source, mixture_state
from fsdfm.flow.schedule import Polynomial, jump_probability

EXPONENTS = [1.0, 2.0, 3.5]


@pytest.mark.parametrize("n", EXPONENTS)
def test_last_jump_is_certain_on_every_even_grid_up_to_2000(n: float) -> None:
    schedule = Polynomial(n)
    t = torch.stack([even_grid(steps)[-2] for steps in range(1, 2001)])
    assert (jump_probability(schedule, t, 1.0 - t) == 1.0).all()


@pytest.mark.parametrize("n", EXPONENTS)
def test_last_jump_is_certain_from_any_time(n: float) -> None:
    t = torch.rand(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert (jump_probability(Polynomial(n), t, 1.0 - t) == 1.0).all()


@pytest.mark.parametrize("n", EXPONENTS)
def test_hazards_of_successive_steps_compose(n: float) -> None:
    times = torch.rand((3, 1000), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    t, s, u = times.mul(0.99).sort(0).values
    stay = [1.0 - jump_probability(Polynomial(n), a, b - a) for a, b in ((t, s), (s, u), (t, u))]
    torch.testing.assert_close(stay[0] * stay[1], stay[2], rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("n", EXPONENTS)
def test_rate_is_the_slope_of_minus_log_of_what_is_hidden(n: float) -> None:
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(-(1.0 - Polynomial(n).kappa(t)).log().sum(), t)
    torch.testing.assert_close(Polynomial(n).rate(t.detach()), slope, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("n", EXPONENTS)
def test_kappa_rises_from_exactly_0_to_exactly_1(n: float) -> None:
    kappa = Polynomial(n).kappa(even_grid(1000))
    assert kappa[0] == 0.0 and kappa[-1] == 1.0 and (kappa.diff() > 0.0).all()


@pytest.mark.parametrize("n", [0.99, 0.0, -1.0, math.nan])
def test_exponent_below_1_is_refused(n: float) -> None:
    with pytest.raises(ValueError, match="n >= 1"):
        Polynomial(n)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 49, 1000, 1024, 1999])
def test_even_grid_has_n_equal_steps_from_exactly_0_to_exactly_1(steps: int) -> None:
    grid = even_grid(steps)
    assert grid.dtype == torch.float64 and len(grid) == steps + 1
    assert grid[0] == 0.0 and grid[-1] == 1.0
    torch.testing.assert_close(
        grid.diff(), torch.full((steps,), 1.0 / steps, dtype=torch.float64), rtol=0, atol=2e-16
    )
    assert torch.equal(checked_grid(grid), grid)


def test_even_grid_of_no_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="steps=0"):
        even_grid(0)


@pytest.mark.parametrize(
    "times",
    [
        [],
        [0.0],
        [0.0, 0.5],
        [0.1, 1.0],
        [0.0, 0.5, 0.5, 1.0],
        [0.0, 0.7, 0.3, 1.0],
        [0.0, math.nan, 1.0],
        [[0.0, 1.0]],
    ],
)
def test_times_that_are_no_grid_are_refused(times: list[float]) -> None:
    with pytest.raises(ValueError, match="grid"):
        checked_grid(times)


def test_given_times_become_a_float64_grid() -> None:
    assert checked_grid([0, 0.1, 1]).tolist() == [0.0, 0.1, 1.0]


def test_uniform_source_draws_every_token_equally_often() -> None:
    draws = UniformSource(7).draw((70_000,), torch.Generator().manual_seed(3))
    assert draws.dtype == torch.int64
    counts = draws.bincount().double()
    assert len(counts) == 7
    assert (counts - 10_000).abs().max() < 4.5 * math.sqrt(70_000 * 1 / 7 * 6 / 7)


def test_mask_source_is_the_extra_id_and_leaves_the_generator_alone() -> None:
    generator = torch.Generator().manual_seed(4)
    before = generator.get_state()
    assert (MaskSource(7).draw((2, 3), generator) == 7).all()
    assert torch.equal(generator.get_state(), before)


def test_sources_are_made_by_name_and_other_names_refused() -> None:
    assert make_source("uniform", 5) == UniformSource(5)
    assert make_source("mask", 5) == MaskSource(5)
    with pytest.raises(ValueError, match="uniform, mask, got masked"):
        make_source("masked", 5)


def test_mixture_shows_the_data_with_probability_kappa_of_each_sequence() -> None:
    length, schedule = 40_000, Polynomial(2.0)
    t = torch.tensor([0.0, 0.3, 0.8, 1.0])
    x_0, x_1 = torch.zeros(4, length, dtype=torch.int64), torch.ones(4, length, dtype=torch.int64)
    x_t = mixture_state(x_0, x_1, t, schedule, torch.Generator().manual_seed(5))
    shown, kappa = x_t.double().mean(1), t.double() ** 2
    assert shown[0] == 0.0 and shown[3] == 1.0
    assert ((shown - kappa).abs() <= 4.5 * (kappa * (1 - kappa) / length).sqrt()).all()
    # Positions are independent: neighbours agree as often as two separate draws.
    both = (x_t[1, 1:] * x_t[1, :-1]).double().mean()
    assert abs(both - 0.09**2) < 4.5 * math.sqrt(3 * 0.09**2 / length)


def test_a_late_grid_has_its_small_steps_last_and_power_one_is_even() -> None:
    assert Late(2.0)(4).tolist() == [0.0, 7 / 16, 3 / 4, 15 / 16, 1.0]
    torch.testing.assert_close(Late(1.0)(5), even_grid(5), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_ends_with_a_certain_jump_at_any_budget(name: str) -> None:
    for steps in (*range(1, 200), 1024, 2000):
        grid = GRIDS[name](steps)
        assert len(grid) == steps + 1 and grid[0] == 0.0 and grid[-1] == 1.0
        t = grid[-2:-1]
        assert jump_probability(Polynomial(), t, grid[-1:] - t) == 1.0


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5, 8.0])
@pytest.mark.parametrize("steps", [2, 32, 33, 40, 64, 99, 300, 1024])
def test_a_late_grid_keeps_its_power_at_any_budget(power: float, steps: int) -> None:
    grid = Late(power)(steps)
    left = (1.0 - torch.arange(steps + 1, dtype=torch.float64) / steps) ** power
    fine = left > steps * 2.0**-51  # the others lie as near to each other as float64 can tell
    assert fine.sum() >= 0.97 * steps
    torch.testing.assert_close((1.0 - grid)[fine], left[fine], rtol=1e-3, atol=2.0**-53)
    assert (grid[1:] > grid[:-1]).all()
    t, h = grid[:-1], grid.diff()
    a = jump_probability(Polynomial(), t, h)
    assert ((a > 0.0) & (a <= 1.0)).all() and a[-1] == 1.0


def test_names_of_grids_are_powers_of_one_family() -> None:
    assert {name: grid.power for name, grid in GRIDS.items() if isinstance(grid, Late)} == {
        "even": 1.0,
        "late": 2.0,
        "latest": 8.0,
    }
    for power in (0.9, math.inf, math.nan):
        with pytest.raises(ConfigError, match=r"finite power >= 1, got power="):
            Late(power)
