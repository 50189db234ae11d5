"""The times at which the model is called."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fsdfm.core.errors import ConfigError

SMALLEST_EXPONENT = 10
"""Training shows the step sizes 2 ** 0 ... 2 ** -10; times are multiples of the smallest."""
SMALLEST_STEP = 2.0**-SMALLEST_EXPONENT
"""The smallest step size that a network is told; a grid may have smaller ones."""
SHORTEST_STEP = 2.0**-52
"""Between times near 1, in float64."""


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


@dataclass(frozen=True, slots=True)
class Late:
    """1 - (1 - k / N) ** power: long steps first, short ones towards the end.

    Near t = 0 a state says little, and a long step loses little; near 1 positions that move
    together depend on each other. With power 8 the first step goes nearly all of the way and the
    others redraw most positions, which suits a joint head: the first writes whole phrases, the
    others correct them.

    Towards 1 float64 can tell no times apart that are nearer than 2 ** -53, which is where N is
    above 90 for power 8: what is left, 1 - t, is at least N - k times 2 ** -52. So the power holds
    at any N but for the last few calls (16 of 1,024).
    """

    power: float = 2.0
    """At least 1, which is the even grid."""

    def __post_init__(self) -> None:
        if not 1.0 <= self.power < math.inf:
            raise ConfigError(f"A late grid needs a finite power >= 1, got power={self.power}.")

    def __call__(self, steps: int) -> Tensor:
        """Times of N calls.

        Args:
            steps: the budget N, at least 1.

        Returns:
            float64, shape (N + 1,), exactly 0 and 1 at its ends.

        Raises:
            ValueError: steps < 1.
        """
        even = even_grid(steps)
        if self.power == 1.0:
            return even
        least = torch.arange(steps, -1, -1, dtype=torch.float64) * SHORTEST_STEP
        return checked_grid(1.0 - torch.maximum((1.0 - even) ** self.power, least))


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


GRIDS: dict[str, Callable[[int], Tensor]] = {
    "even": Late(1.0),
    "late": Late(2.0),
    "latest": Late(8.0),
}
"""The powers that have a name."""
