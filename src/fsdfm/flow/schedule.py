"""kappa_t, how much of the data is visible at time t, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Schedule(Protocol):
    """kappa: increasing, kappa(0) = 0, kappa(1) = 1."""

    def kappa(self, t: Tensor) -> Tensor:
        """Chance that a position already shows its data token at time t."""
        ...

    def rate(self, t: Tensor) -> Tensor:
        """g(t) = kappa'(t) / (1 - kappa(t)), the rate of jumping; infinite at t = 1."""
        ...


@dataclass(frozen=True, slots=True)
class Polynomial:
    """kappa_t = t ** n."""

    n: float = 1.0
    """Exponent, at least 1 (below 1 the rate is infinite at t = 0)."""

    def __post_init__(self) -> None:
        if not self.n >= 1.0:
            raise ValueError(f"Polynomial needs n >= 1, got n={self.n}.")

    def kappa(self, t: Tensor) -> Tensor:
        """t ** n."""
        return t**self.n

    def rate(self, t: Tensor) -> Tensor:
        """n t ** (n - 1) / (1 - t ** n)."""
        return self.n * t ** (self.n - 1.0) / (1.0 - t**self.n)


def jump_probability(schedule: Schedule, t: Tensor, h: Tensor) -> Tensor:
    """Chance that a token still at x_0 at time t has moved to x_1 by t + h.

        a(t, h) = (kappa_{t+h} - kappa_t) / (1 - kappa_t)

    Args:
        schedule: kappa.
        t: current time in [0, 1), any shape; float64 where exactness matters.
        h: step size in (0, 1 - t], same shape.

    Returns:
        a in (0, 1], same shape; exactly 1 when t + h = 1.

    Source: FS-DFM, arXiv 2509.20624, cumulative scalar.
    """
    now, then = schedule.kappa(t), schedule.kappa(t + h)
    return (then - now) / (1.0 - now)
