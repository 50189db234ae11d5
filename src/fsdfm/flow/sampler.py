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
    """A posterior in two halves: every row's hidden state, and the head on some of them."""

    def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """States (B, L), times (B,), step sizes (B,) -> hidden rows (B, L, D)."""
        ...

    def head(self, rows: Tensor) -> Tensor:
        """Hidden rows (N, D) -> logits (N, V), or more columns, of which the first V count."""
        ...


class Sampled(Protocol):
    """What sampling needs of a network: all sequences share a time, and few rows are wanted."""

    def hidden(self, x: Tensor, t: float, h: float, rows: Tensor) -> Tensor:
        """States (B, L), time, step size, some of the B L positions, ascending -> rows (N, D)."""
        ...

    def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
        """Rows (N, D) at positions (N,), the state (B, L), what has been drawn (B, L) -> (N, D)."""
        ...

    def head(self, rows: Tensor) -> Tensor:
        """Hidden rows (N, D) -> logits (N, V), or more columns, of which the first V count."""
        ...


@dataclass(frozen=True, slots=True)
class WholeSequences:
    """Any `FlowModel` as the sampler calls it: its body runs on the sequences that have movers.

    With many steps most short sequences stand still in a given one: 1,024 steps move one of 12
    positions about 80 times.
    """

    model: FlowModel

    def hidden(self, x: Tensor, t: float, h: float, rows: Tensor) -> Tensor:
        """See `Sampled`."""
        wanted, place = torch.unique_consecutive(rows // x.shape[1], return_inverse=True)
        times, steps = (
            torch.full((len(wanted),), v, dtype=torch.float32, device=x.device) for v in (t, h)
        )
        return self.model.body(x[wanted], times, steps)[place, rows % x.shape[1]]

    def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
        """See `Sampled`; a model without a joint head tells its rows nothing."""
        told = getattr(self.model, "told", None)
        return rows if told is None else told(rows, at, x, known)

    def head(self, rows: Tensor) -> Tensor:
        """See `Sampled`."""
        return self.model.head(rows)


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
    draws: int = 1
    """Groups in which the movers of one call are drawn, each knowing the ones before (with a joint
    head; without one they are drawn as one)."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}.")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")
        if self.draws < 1:
            raise ValueError(f"draws must be at least 1, got {self.draws}.")


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
    model: Sampled,
    x_0: Tensor,
    grid: Tensor,
    noise: Noise,
    *,
    vocab_size: int,
    schedule: Schedule | None = None,
    drawing: Drawing | None = None,
    frozen: Tensor | None = None,
    absorbing: bool = False,
) -> Iterator[State]:
    """Walk x_0 along the grid; yields the start and then the state after every step.

    Args:
        model: the posterior; `WholeSequences(network)` for one that has a body and a head only.
        x_0: start, int64, shape (B, L), on the model's device; frozen positions hold their tokens.
        grid: times from 0 to 1, float64, shape (N + 1,); N is the budget.
        noise: the sequences' random numbers, after `noise.start`.
        vocab_size: V; logits beyond it (a mask id) are never drawn.
        schedule: kappa; linear if not given.
        drawing: step rule, movers, temperature, top-p; the exact rule if not given.
        frozen: positions that never move, bool, shape (B, L); none if not given.
        absorbing: whether only positions that hold the mask id, V, move (`Source.absorbing`).

    Yields:
        N + 1 states; the last one, at t = 1, is the result.
    """
    schedule, drawing = schedule or Polynomial(), drawing or Drawing()
    free = torch.ones(x_0.shape, dtype=torch.bool) if frozen is None else ~frozen.cpu()
    if absorbing:
        free = free & (x_0 == vocab_size).cpu()
    x, calls, head_rows = x_0, 0, 0
    yield State(x, 0, float(grid[0]), calls, head_rows)
    for step, (t, then) in enumerate(itertools.pairwise(grid.tolist()), start=1):
        h = then - t
        times = torch.tensor((t, h), dtype=torch.float64)
        a = float(drawing.rule.mover_probability(schedule, *times))
        u, offset = noise.uniform(x.shape[1]), noise.uniform(1)[:, 0]
        movers = drawing.movers(a, u, free, offset).flatten()
        u_land = noise.uniform(x.shape[1]).flatten()[movers]
        if len(u_land):
            # Counted, picked and grouped on the CPU, so that nothing here waits for the device.
            places = movers.nonzero()[:, 0]
            rows = _send(places, x.device)
            hidden = model.hidden(x, t, h, rows)
            u_rows = _send(u_land, x.device)
            known = ~_send(free, x.device)
            for picked in groups(places % x.shape[1], drawing.draws):
                part = None if picked is None else _send(picked, x.device)
                at = rows if part is None else rows[part]
                few = hidden if part is None else hidden[part.to(hidden.device)]
                if part is not None:
                    few = model.told(few, at, x, known)
                    known = known.flatten().index_fill(0, at, True).view_as(known)

                def logits(block: slice, few: Tensor = few) -> Tensor:
                    return model.head(few[block])[:, :vocab_size].to(x_0.device)

                x = advance(
                    x,
                    at,
                    logits,
                    torch.full((len(at),), a, dtype=torch.float64, device=x.device),
                    u_rows if part is None else u_rows[part],
                    drawing.rule,
                    lambda block: sharpen(block, drawing.temperature, drawing.top_p),
                    vocab_size=vocab_size,
                )
            calls, head_rows = calls + 1, head_rows + len(rows)
            if absorbing:
                free = free & ~movers.view_as(free)
        yield State(x, step, then, calls, head_rows)


def groups(position: Tensor, draws: int) -> Iterator[Tensor | None]:
    """Which movers are drawn together: every `draws`-th position, from left to right.

    Args:
        position: of each mover in its sequence, int64, shape (N,).
        draws: number of groups.

    Yields:
        Indices into the movers, of each group that has any; None, once, if all are drawn as one.
    """
    if draws == 1:
        yield None
        return
    for k in range(draws):
        part = (position % draws == k).nonzero()[:, 0]
        if len(part):
            yield part


def _send(x: Tensor, device: torch.device) -> Tensor:
    """To the device; from pinned memory a CUDA stream takes it without being waited for."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
