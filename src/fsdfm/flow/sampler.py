"""The sampling loop: choose the movers, ask the posterior for their tokens, place them.

Shapes: B sequences, L positions, N movers of one call, D hidden, V data tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fsdfm.core.errors import ConfigError
from fsdfm.flow.path import Source
from fsdfm.flow.posterior import INDEPENDENT, Call, Posterior, Sampled
from fsdfm.flow.schedule import Polynomial, Schedule
from fsdfm.flow.step import EXACT, Movers, StepRule, independent_movers, landed, sharpen


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
    """How tokens are drawn from the model's posterior.

    Raises:
        ConfigError: a number out of range, or a rule and a posterior that cannot go together.
    """

    rule: StepRule = EXACT
    movers: Movers = independent_movers
    posterior: Posterior = INDEPENDENT
    """Whether the movers of a call see each other; `Grouped` for a network with a joint head."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token. Texts have more controls (`controls.py`)."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            raise ConfigError(f"temperature must be >= 0, got {self.temperature}.", "temperature")
        self.posterior.check(self.rule)

    def tokens(
        self,
        head: Callable[[Tensor], Tensor],
        a: float,
        vocab_size: int,
        hidden: Tensor,
        x: Tensor,
        rows: Tensor,
        u: Tensor,
    ) -> Tensor:
        """Where movers land.

        Args:
            head: hidden rows -> logits of V columns or more.
            a: mover probability.
            vocab_size: V.
            hidden: what the movers are drawn from, (N, D), where the network is.
            x: tokens as they stand, int64, shape (B L,).
            rows: the movers among them, int64, shape (N,).
            u: uniform in [0, 1), shape (N,), float64 where the device has it.

        Returns:
            int64, shape (N,).
        """
        return landed(
            x[rows],
            lambda block: head(hidden[block])[:, :vocab_size].to(x.device),
            u.new_full((len(u),), a),
            u,
            self.rule,
            lambda block: sharpen(block, self.temperature),
            vocab_size=vocab_size,
        )


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
    source: Source,
    *,
    schedule: Schedule | None = None,
    drawing: Drawing | None = None,
    frozen: Tensor | None = None,
) -> Iterator[State]:
    """Walk x_0 along the grid; yields the start and then the state after every step.

    Args:
        model: the network; `Sequences(network)` for one that has a body only.
        x_0: start, int64, shape (B, L), on a device with float64; frozen positions hold their
            tokens.
        grid: times from 0 to 1, float64, shape (N + 1,); N is the budget.
        noise: the sequences' random numbers, after `noise.start`.
        source: where the path starts. Logits beyond its V tokens (a mask id) are never drawn; where
            it absorbs, only positions that hold the mask id move.
        schedule: kappa; linear if not given.
        drawing: step rule, movers, posterior, temperature; the exact rule if not given.
        frozen: positions that never move, bool, shape (B, L); none if not given.

    Yields:
        N + 1 states; the last one, at t = 1, is the result.
    """
    schedule, drawing = schedule or Polynomial(), drawing or Drawing()
    free = torch.ones(x_0.shape, dtype=torch.bool) if frozen is None else ~frozen.cpu()
    free = free & (x_0 == source.vocab_size).cpu() if source.absorbing else free
    x, calls, head_rows = x_0, 0, 0
    yield State(x, 0, float(grid[0]), calls, head_rows)
    for step, (t, then) in enumerate(itertools.pairwise(grid.tolist()), start=1):
        times = torch.tensor((t, then - t), dtype=torch.float64)
        a = float(drawing.rule.mover_probability(schedule, *times))
        u, offset = noise.uniform(x.shape[1]), noise.uniform(1)[:, 0]
        movers = drawing.movers(a, u, free, offset)
        u_land = noise.uniform(x.shape[1])[movers]
        if len(u_land):
            draw = partial(drawing.tokens, model.head, a, source.vocab_size)
            call = Call.of(model, x, (t, then - t), movers, ~free, (u_land, offset), draw)
            x = call.placed(drawing.posterior.tokens(call))
            calls, head_rows = calls + 1, head_rows + len(u_land)
            free = free & ~movers if source.absorbing else free
        yield State(x, step, then, calls, head_rows)
