"""What a run minimises: the only difference between pretraining and distillation.

Shapes: B sequences, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fsdfm.flow.grid import SMALLEST_EXPONENT
from fsdfm.flow.loss import (
    LATEST_TIME,
    Divergence,
    PositionLoss,
    RowLoss,
    TrainableModel,
    cross_entropy,
    generalized_kl,
    kl,
    mean_over_rows,
    open_positions,
    path_loss,
)
from fsdfm.flow.path import Source, mixture_state
from fsdfm.flow.sampler import FlowModel
from fsdfm.flow.schedule import Schedule
from fsdfm.flow.step import PUBLISHED, StepRule
from fsdfm.flow.target import Jumper, TargetRule, rk4_target


class Network(FlowModel, TrainableModel, Protocol):
    """A network that can be sampled and trained."""


class Objective(Protocol):
    """One training objective."""

    def loss(
        self, model: Network, ema: Network, x_1: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Scalars by name; `loss` is the one that is minimised.

        Args:
            model: the network in training.
            ema: its moving average; no gradient flows into it.
            x_1: data, int64, shape (B, L).
            generator: the only source of randomness, on the device of x_1.
        """
        ...


def stratified(count: int, generator: torch.Generator) -> Tensor:
    """One uniform number in each of `count` equal parts of [0, 1), in random order, float64."""
    device = generator.device
    order = torch.randperm(count, generator=generator, device=device)
    jitter = torch.rand(count, dtype=torch.float64, generator=generator, device=device)
    return (order + jitter) / count


@dataclass(frozen=True, slots=True)
class Pretrain:
    """Path loss at times uniform over [0, 1), stratified over the batch: the DFM teacher."""

    source: Source
    schedule: Schedule
    position_loss: PositionLoss = generalized_kl
    frozen_share: float = 0.0
    """Of the rows, those that have frozen positions: as prompts and gaps will be given."""

    def loss(
        self, model: Network, ema: Network, x_1: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """See `Objective`."""
        t, x_t, rows = self.state(x_1, generator)
        loss = path_loss(
            model,
            x_t,
            x_1,
            t,
            torch.full_like(t, 2.0**-SMALLEST_EXPONENT),
            self.source.vocab_size,
            self.schedule,
            self.position_loss,
            rows=rows,
        )
        return {"loss": loss}

    def state(
        self, x_1: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the network is shown of data (B, L): t (B,), x_t (B, L), and the rows that count."""
        t = stratified(x_1.shape[0], generator).clamp_max(LATEST_TIME)
        x_0 = self.source.draw(tuple(x_1.shape), generator)
        x_t = mixture_state(x_0, x_1, t, self.schedule, generator)
        frozen = None
        if self.frozen_share > 0.0:
            frozen = frozen_at_random(x_1.shape[0], x_1.shape[1], self.frozen_share, generator)
            x_t = torch.where(frozen, x_1, x_t)
        return t, x_t, open_positions(x_t, self.source, frozen)


def frozen_at_random(batch: int, length: int, share: float, generator: torch.Generator) -> Tensor:
    """Positions that are given, bool, (B, L): a prefix, a suffix, both, or a middle part.

    Args:
        batch, length: B and L.
        share: chance that a row has any; the other rows have none.
        generator: source of randomness.

    Returns:
        In a row that has any, two cuts at random split it in three; which of the parts are given
        is one of four patterns, each as likely. At least one position stays open.
    """
    device = generator.device
    cuts = (torch.rand(batch, 2, generator=generator, device=device) * length).floor()
    first, second = cuts.amin(1, keepdim=True), cuts.amax(1, keepdim=True)
    pattern = torch.randint(4, (batch, 1), generator=generator, device=device)
    chosen = torch.rand(batch, 1, generator=generator, device=device) < share
    place = torch.arange(length, device=device)
    before, after = place < first, place > second
    inside = ~before & ~after
    kinds = (before, after, before | after, inside & (second - first < length - 1))
    frozen = torch.stack(kinds).gather(0, pattern.expand(batch, length)[None])[0]
    return frozen & chosen


def published_weights() -> Tensor:
    """Proportional to 1 / h: half of the rows see h = 1/1024. Shape (11,), h = 1 first."""
    weights = 2.0 ** torch.arange(SMALLEST_EXPONENT + 1, dtype=torch.float64)
    return weights / weights.sum()


def even_weights(smallest_share: float = 0.25) -> Tensor:
    """A share on the smallest h, the rest even over the others. Shape (11,), h = 1 first."""
    weights = torch.full(
        (SMALLEST_EXPONENT + 1,), (1.0 - smallest_share) / SMALLEST_EXPONENT, dtype=torch.float64
    )
    weights[-1] = smallest_share
    return weights


STEP_WEIGHTS = {"published": published_weights, "even": even_weights}


@dataclass(frozen=True, slots=True)
class Distill:
    """A step-aware student: path loss at the smallest h, KL to a multi-step target at the others.

    Source: FS-DFM, arXiv 2509.20624; the semigroup target and the even weights are ours.
    """

    source: Source
    schedule: Schedule
    target: TargetRule = rk4_target
    rule: StepRule = PUBLISHED
    """The jump inside the target."""
    weights: Tensor = field(default_factory=published_weights)
    """Chance of h = 1, 1/2, ..., 1/1024, shape (11,)."""
    position_loss: PositionLoss = generalized_kl
    """Path loss of one position, for the rows at the smallest h."""
    divergence: Divergence = kl
    """Between target and student, for the other rows."""

    def loss(
        self, model: Network, ema: Network, x_1: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """See `Objective`."""
        batch = x_1.shape[0]
        t, h = self._times(batch, generator)
        x_0 = self.source.draw(tuple(x_1.shape), generator)
        x_t = mixture_state(x_0, x_1, t, self.schedule, generator)
        small = h <= 2.0**-SMALLEST_EXPONENT
        parts: dict[str, Tensor] = {}
        share: dict[str, int] = {}
        if small.any():
            parts["path_loss"] = path_loss(
                model,
                x_t[small],
                x_1[small],
                t[small],
                h[small],
                self.source.vocab_size,
                self.schedule,
                self.position_loss,
                rows=open_positions(x_t[small], self.source),
            )
            share["path_loss"] = int(small.sum())
        if not small.all():
            parts["kl"] = self._consistency(
                model, ema, x_t[~small], t[~small], h[~small], generator
            )
            share["kl"] = batch - share.get("path_loss", 0)
        loss = torch.stack([parts[name] * share[name] for name in parts]).sum() / batch
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}}

    def _times(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """t and h, float64, shape (B,): multiples of the smallest h with t + h <= 1."""
        edges = self.weights.to(generator.device).cumsum(0)
        exponent = torch.searchsorted(edges, stratified(batch, generator), right=True)
        cells = 2**SMALLEST_EXPONENT
        span = cells >> exponent.clamp_max(SMALLEST_EXPONENT)
        u = torch.rand(batch, dtype=torch.float64, generator=generator, device=generator.device)
        start = (u * (cells - span + 1)).floor()
        return start / cells, span.double() / cells

    def _consistency(
        self,
        model: Network,
        ema: Network,
        x_t: Tensor,
        t: Tensor,
        h: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """KL(target || student) at steps h, the target from the moving average at h / 2."""
        vocab_size = self.source.vocab_size
        with torch.no_grad():
            jumper = Jumper(ema, self.schedule, self.rule, self.source, generator)
            target = self.target(jumper, x_t, t, h)
        hidden = model.body(x_t, t.float(), h.float()).flatten(0, 1)
        counted = open_positions(x_t, self.source)
        if counted is not None:
            hidden, target = hidden.index_select(0, counted), target.select(counted)

        def loss(rows: slice) -> RowLoss:
            with torch.no_grad():
                logits = target.logits(ema, rows, vocab_size)
            return lambda student, piece: self.divergence(target.mix(logits, rows, piece), student)

        return mean_over_rows(model, hidden, loss, vocab_size)


@dataclass(frozen=True, slots=True)
class Joint:
    """A joint head: path loss in which some of the data beside a position is known already.

    Drawing the movers of a step from the joint posterior of x_1 given x_t, instead of each on its
    own, leaves the law of the path exact at any number of steps. What is known follows the groups
    that `sample` draws: the first r of every K positions, or a part of them; in a good quarter of
    the rows nothing is, which keeps the plain posterior. The body stays the teacher's, so an
    update costs half of a whole one; the output layer is tuned with the head.
    """

    source: Source
    schedule: Schedule
    position_loss: PositionLoss = cross_entropy
    zero_share: float = 0.25
    """Of the rows at t = 0, where every budget starts; the others are uniform over [0, 1)."""

    def loss(
        self, model: Any, ema: Network, x_1: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """See `Objective`; the network has a joint head."""
        batch, length = x_1.shape
        u = stratified(batch, generator)
        t = ((u - self.zero_share) / (1.0 - self.zero_share)).clamp(0.0, LATEST_TIME)
        x_0 = self.source.draw(tuple(x_1.shape), generator)
        x_t = mixture_state(x_0, x_1, t, self.schedule, generator)
        # The posterior is that of any step; a network that is told h learns so.
        span = torch.rand(batch, dtype=torch.float64, generator=generator, device=t.device)
        h = 2.0 ** -(span * (SMALLEST_EXPONENT + 1)).floor()
        known = known_at_random(batch, length, generator)
        if self.source.absorbing:
            known = known | (x_t != self.source.vocab_size)
        at = (~known).flatten().nonzero()[:, 0]
        with torch.no_grad():  # the body is the teacher's: only what the head adds is learned
            hidden = model.body(x_t, t.float(), h.float()).flatten(0, 1)[at]
        rows = model.told(hidden, at, x_1, known)
        here, data = x_t.flatten()[at], x_1.flatten()[at]
        g = self.schedule.rate(t).float().repeat_interleave(length)[at]

        def loss(part: slice) -> RowLoss:
            a, b, c = here[part], data[part], g[part]
            return lambda logits, piece: self.position_loss(logits, a[piece], b[piece], c[piece])

        return {"loss": mean_over_rows(model, rows, loss, self.source.vocab_size)}


def known_at_random(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """What the groups drawn so far might be, bool, (B, L); nothing in over a quarter of rows."""
    device = generator.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    draws = 2 ** (1 + (uniform(batch, 1) * 5).long())
    drawn = (uniform(batch, 1) * draws).long()
    share = torch.where(uniform(batch, 1) < 0.5, 1.0, uniform(batch, 1))
    share = torch.where(uniform(batch, 1) < 0.2, 0.0, share)
    place = torch.arange(length, device=device)
    return (place % draws < drawn) & (uniform(batch, length) < share)
