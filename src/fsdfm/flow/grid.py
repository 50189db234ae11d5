"""The times at which the model is called."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SMALLEST_EXPONENT = 10
"""Training shows the step sizes 2 ** 0 ... 2 ** -10; times are multiples of the smallest."""
SMALLEST_STEP = 2.0**-SMALLEST_EXPONENT
"""The smallest step size that a network is told; a grid may have smaller ones."""


def even_grid(steps: int) -> Tensor:
    """0, 1/N, ..., 1 for a budget of N calls.

    Args:
        steps: the budget N, at least 1; it need not be a power of two.

    Returns:
        float64, shape (N + 1,), exactly 0 and 1 at its ends.

    Raises:
        ValueError: steps < 1.
    """
    if steps < 1:
        raise ValueError(f"A grid needs at least one step, got steps={steps}.")
    return torch.arange(steps + 1, dtype=torch.float64) / steps


def late_grid(steps: int, power: float = 2.0) -> Tensor:
    """1 - (1 - k / N) ** power: long steps first, short ones towards the end.

    Near t = 0 a state says little, and a long step loses little; near 1 positions that move
    together depend on each other.

    Args:
        steps: the budget N, at least 1.
        power: 1 is the even grid.

    Returns:
        float64, shape (N + 1,), exactly 0 and 1 at its ends.

    Raises:
        ValueError: steps < 1.
    """
    return checked_grid(1.0 - (1.0 - even_grid(steps)) ** power)


def checked_grid(times: Sequence[float] | Tensor) -> Tensor:
    """Any increasing times from 0 to 1 as a grid.

    Raises:
        ValueError: fewer than two times, not strictly increasing, or ends other than 0 and 1.
    """
    grid = torch.as_tensor(times, dtype=torch.float64)
    if grid.ndim != 1 or len(grid) < 2 or grid[0] != 0.0 or grid[-1] != 1.0:
        raise ValueError("A grid is a list of times that starts at 0 and ends at 1.")
    if not bool((grid[1:] > grid[:-1]).all()):
        raise ValueError("The times of a grid must increase strictly.")
    return grid


def latest_grid(steps: int) -> Tensor:
    """The late grid of power 8: one long step, then steps near t = 1 that redraw most positions.

    For models with a joint head: the first step writes whole phrases, the others correct them.
    Beyond 32 steps the power is less, so that no step is shorter than 2 ** -40.
    """
    return late_grid(steps, power=min(8.0, 40.0 / math.log2(max(2, steps))))


GRIDS: dict[str, Callable[[int], Tensor]] = {
    "even": even_grid,
    "late": late_grid,
    "latest": latest_grid,
}
