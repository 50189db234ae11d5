"""The sampling loop: a grid, a model, a step rule.

Shapes: B sequences, L positions, D hidden, V data tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fsdfm.flow.path import Source
from fsdfm.flow.schedule import Polynomial, Schedule
from fsdfm.flow.step import EXACT, Movers, StepRule, advance, independent_movers, sharpen


class FlowModel(Protocol):
    """What sampling needs of a network: a posterior in two halves."""

    def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """States (B, L), times (B,), step sizes (B,) -> hidden rows (B, L, D)."""
        ...

    def head(self, rows: Tensor) -> Tensor:
        """Hidden rows (N, D) -> logits (N, V), or more columns, of which the first V count."""
        ...


class Noise:
    """The random numbers of each sequence, from its own seed and nothing else.

    They are drawn on the CPU, so a sequence gets the same numbers alone, inside a batch, and on
    any device.

    Args:
        seeds: one for each sequence.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def start(self, source: Source, length: int) -> Tensor:
        """x_0, int64, shape (B, L)."""
        return torch.stack([source.draw((length,), g) for g in self.generators])

    def uniform(self, length: int) -> Tensor:
        """Uniform in [0, 1), float64, shape (B, length); float32 would clip rare tokens."""
        return torch.stack(
            [torch.rand(length, dtype=torch.float64, generator=g) for g in self.generators]
        )


@dataclass(frozen=True, slots=True)
class Drawing:
    """How tokens are drawn from the model's posterior."""

    rule: StepRule = EXACT
    movers: Movers = independent_movers
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Mass of the nucleus that is kept."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}.")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")


@dataclass(frozen=True, slots=True)
class State:
    """Where the sampler is after `step` of its grid's steps."""

    x: Tensor
    """int64, shape (B, L)."""
    step: int
    t: float
    calls: int
    """Model calls so far (NFE). A step on which no position may move needs none."""
    head_rows: int
    """Rows that the head was run on so far, of all sequences together."""


@torch.no_grad()
def sample(
    model: FlowModel,
    x_0: Tensor,
    grid: Tensor,
    noise: Noise,
    *,
    vocab_size: int,
    schedule: Schedule | None = None,
    drawing: Drawing | None = None,
    frozen: Tensor | None = None,
) -> Iterator[State]:
    """Walk x_0 along the grid; yields the start and then the state after every step.

    Args:
        model: the posterior.
        x_0: start, int64, shape (B, L), on the model's device; frozen positions hold their tokens.
        grid: times from 0 to 1, float64, shape (N + 1,); N is the budget.
        noise: the sequences' random numbers, after `noise.start`.
        vocab_size: V; logits beyond it (a mask id) are never drawn.
        schedule: kappa; linear if not given.
        drawing: step rule, movers, temperature, top-p; the exact rule if not given.
        frozen: positions that never move, bool, shape (B, L); none if not given.

    Yields:
        N + 1 states; the last one, at t = 1, is the result.
    """
    schedule, drawing = schedule or Polynomial(), drawing or Drawing()
    free = torch.ones(x_0.shape, dtype=torch.bool) if frozen is None else ~frozen.cpu()
    x, calls, head_rows = x_0, 0, 0
    yield State(x, 0, float(grid[0]), calls, head_rows)
    for step, (t, then) in enumerate(itertools.pairwise(grid), start=1):
        h = then - t
        a = drawing.rule.mover_probability(schedule, t, h)
        movers = _choose(drawing.movers, free, float(a), noise)
        u_land = noise.uniform(x.shape[1])
        if movers.any():
            hidden = model.body(x, _each(t, x), _each(h, x)).flatten(0, 1)

            def posterior(rows: Tensor, hidden: Tensor = hidden) -> Tensor:
                logits = model.head(hidden[rows])[:, :vocab_size]
                return sharpen(logits, drawing.temperature, drawing.top_p)

            x = advance(
                x, movers.to(x.device), posterior, _each(a, x), u_land.to(x.device), drawing.rule
            )
            calls, head_rows = calls + 1, head_rows + int(movers.sum())
        yield State(x, step, float(then), calls, head_rows)


def _choose(choose: Movers, free: Tensor, a: float, noise: Noise) -> Tensor:
    """Movers among the free positions, bool, shape (B, L); the noise of a position is its own."""
    u, offsets = noise.uniform(free.shape[1]), noise.uniform(1)[:, 0]
    movers = torch.zeros_like(free)
    for b, offset in enumerate(offsets):
        movers[b, free[b]] = choose(a, u[b, free[b]], float(offset))
    return movers


def _each(value: Tensor, x: Tensor) -> Tensor:
    """One number as float32 for each sequence, shape (B,)."""
    return value.to(x.device, torch.float32).expand(x.shape[0])
