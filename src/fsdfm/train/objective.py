"""What a run minimises: the only difference between pretraining and distillation.

Shapes: B sequences, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fsdfm.flow.grid import SMALLEST_EXPONENT, SMALLEST_STEP
from fsdfm.flow.host import Draws, Randomness, send, stratified, totals, uniform
from fsdfm.flow.loss import (
    LATEST_TIME,
    Divergence,
    PositionLoss,
    RowLoss,
    TrainableModel,
    cross_entropy,
    generalized_kl,
    hidden_rows,
    kl,
    mean_over_positions,
    mean_over_rows,
    path_loss,
    told_rows,
)
from fsdfm.flow.path import Batch, Source, on_the_path
from fsdfm.flow.posterior import FlowModel
from fsdfm.flow.schedule import Schedule
from fsdfm.flow.step import PUBLISHED, StepRule
from fsdfm.flow.target import Jumper, TargetRule, rk4_target
from fsdfm.train.buckets import Noted


class Network(FlowModel, TrainableModel, Protocol):
    """A network that can be sampled and trained."""


class Objective(Protocol):
    """One training objective."""

    def loss(
        self, model: Network, ema: Network, x_1: Tensor, generator: Randomness
    ) -> dict[str, Tensor]:
        """Scalars by name; `loss`, the first, is the one that is minimised.

        Besides, sums and counts of its parts by times and step sizes (`train.buckets`).

        Args:
            model: the network in training.
            ema: its moving average; no gradient flows into it.
            x_1: data, int64, shape (B, L), on the device of the network.
            generator: the only source of randomness, on the CPU wherever x_1 is. What is drawn is
                sent; nothing waits for the device. Where several processes share a pass, the mean
                of their losses is the loss of the whole pass.
        """
        ...


def shared(random: Randomness, count: int, of: int) -> float:
    """What a mean over `count` of this process's positions counts in the mean over processes.

        processes x count / (count of all processes)

    Args:
        random: that the pass is drawn from.
        count: of this process; every process must ask.
        of: samples of this process, which are as many in each.
    """
    everywhere, samples = totals(random, count, of)
    return samples / of * count / max(1, everywhere)


@dataclass(frozen=True, slots=True)
class Pretrain:
    """Path loss at times uniform over [0, 1), stratified over the batch: the DFM teacher."""

    source: Source
    schedule: Schedule
    position_loss: PositionLoss = generalized_kl
    frozen_share: float = 0.0
    """Of the rows, those that have frozen positions: as prompts and gaps will be given."""

    def loss(
        self, model: Network, ema: Network, x_1: Tensor, generator: Randomness
    ) -> dict[str, Tensor]:
        """See `Objective`."""
        batch = self.batch(x_1, generator)
        noted = Noted(self.position_loss)
        loss = path_loss(model, batch, self.source.vocab_size, self.schedule, noted)
        loss = loss * shared(generator, len(batch.places), len(x_1))
        return {"loss": loss, **noted.by_time("loss", batch)}

    def batch(self, x_1: Tensor, generator: Randomness) -> Batch:
        """What the network is shown of data (B, L), and the positions that count."""
        t = stratified(x_1.shape[0], generator).clamp_max(LATEST_TIME)
        h = torch.full_like(t, SMALLEST_STEP)
        batch = on_the_path(x_1, t, h, self.source, self.schedule, generator)
        if self.frozen_share == 0.0:
            return batch
        count, length = x_1.shape
        return batch.given(frozen_at_random(count, length, self.frozen_share, generator))


def frozen_at_random(batch: int, length: int, share: float, generator: Randomness) -> Tensor:
    """Positions that are given, bool, (B, L): a prefix, a suffix, both, or a middle part.

    Args:
        batch, length: B and L.
        share: chance that a row has any; the other rows have none.
        generator: source of randomness.

    Returns:
        In a row that has any, two cuts at random split it in three; which of the parts are given
        is one of four patterns, each as likely. At least one position stays open.
    """
    cuts = (uniform(generator, batch, 2) * length).floor()
    first, second = cuts.amin(1, keepdim=True), cuts.amax(1, keepdim=True)
    pattern = (uniform(generator, batch, 1) * 4).long()
    chosen = uniform(generator, batch, 1) < share
    place = torch.arange(length, device=cuts.device)
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


PARTS = ("path_loss", "kl")
"""What a distillation loss is made of: rows at the smallest h, and the others."""
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
        self, model: Network, ema: Network, x_1: Tensor, generator: Randomness
    ) -> dict[str, Tensor]:
        """See `Objective`."""
        batch = on_the_path(
            x_1, *self._times(len(x_1), generator), self.source, self.schedule, generator
        )
        small = batch.h <= SMALLEST_STEP
        rows = [each.nonzero()[:, 0] for each in (small, ~small)]
        batch = batch.select(torch.cat(rows))
        student = told_rows(model, batch)  # the only pass with a gradient
        order, first = torch.arange(len(x_1)), len(rows[0])
        some = [batch.select(each) for each in (order[:first], order[first:])]
        count = len(some[0].places)
        hidden = student[:count], student[count:]
        path, drift = Noted(self.position_loss), Noted(self.divergence)
        parts: dict[str, Tensor] = {}
        scales = [shared(generator, len(each.places), len(x_1)) for each in some]
        everywhere = totals(generator, *map(len, rows))
        if everywhere[0]:
            part = self._path_loss(model, some[0], hidden[0], path)
            parts["path_loss"] = part * scales[0]
        if everywhere[1]:
            asked, chosen = some[1], rows[1]
            if not len(chosen):
                # Others have such rows. Processes that share an average go the same ways through
                # it: this one with any row, of which nothing is learned.
                chosen = torch.zeros(1, dtype=torch.int64)
                asked = batch.select(chosen)
            few = generator.select(chosen) if isinstance(generator, Draws) else generator
            part = self._consistency(model, ema, asked, hidden[1], few, drift)
            parts["kl"] = part * scales[1]
        shares = dict(zip(PARTS, (n / sum(everywhere) for n in everywhere), strict=True))
        loss = torch.stack([part * shares[name] for name, part in parts.items()]).sum()
        tables = path.by_time("path_loss", some[0])
        for table in (drift.by_time, drift.by_step):
            tables |= table("kl", some[1])
        return {"loss": loss, **{name: part.detach() for name, part in parts.items()}} | tables

    def _times(self, batch: int, generator: Randomness) -> tuple[Tensor, Tensor]:
        """t and h, float64, shape (B,): multiples of the smallest h with t + h <= 1."""
        edges = self.weights.cumsum(0)
        exponent = torch.searchsorted(edges, stratified(batch, generator), right=True)
        cells = 2**SMALLEST_EXPONENT
        span = cells >> exponent.clamp_max(SMALLEST_EXPONENT)
        u = uniform(generator, batch, dtype=torch.float64)
        start = (u * (cells - span + 1)).floor()
        return start / cells, span.double() / cells

    def _path_loss(self, model: Network, batch: Batch, hidden: Tensor, noted: Noted) -> Tensor:
        """On data, at the smallest step; the student's hidden rows of the batch are given."""
        g, vocab_size = self.schedule.rate(batch.t), self.source.vocab_size
        return mean_over_positions(model, hidden, batch, batch.places, g, vocab_size, noted)

    def _consistency(
        self,
        model: Network,
        ema: Network,
        batch: Batch,
        hidden: Tensor,
        generator: Randomness,
        noted: Noted,
    ) -> Tensor:
        """KL(target || student) at steps h, the target from the moving average at h / 2."""
        vocab_size = self.source.vocab_size
        with torch.no_grad():
            jumper = Jumper(ema, self.schedule, self.rule, self.source, generator, batch.counted)
            target = self.target(jumper, batch.x_t, batch.t, batch.h)
        if batch.counted is not None:
            target = target.select(send(batch.places, hidden.device))

        def loss(part: slice) -> RowLoss:
            with torch.no_grad():
                logits = target.logits(ema, part, vocab_size)
            return lambda student, piece: noted(target.mix(logits, part, piece), student)

        return mean_over_rows(model, hidden, loss, vocab_size)


@dataclass(frozen=True, slots=True)
class Joint:
    """A joint head: path loss in which some of the data beside a position is known already.

    Drawing the movers of a step from the joint posterior of x_1 given x_t, instead of each on its
    own, leaves the law of the path exact at any number of steps. What is known follows the groups
    that `sample` draws: the first r of every K positions, or a part of them; in a good quarter of
    the rows nothing is, which keeps the plain posterior; and in some a prompt or what lies around a
    gap is known as well, as it is where texts are continued or filled. The body stays the
    teacher's, so an update costs half of a whole one; the output layer is tuned with the head.
    """

    source: Source
    schedule: Schedule
    position_loss: PositionLoss = cross_entropy
    zero_share: float = 0.25
    """Of the rows at t = 0, where every budget starts; the others are uniform over [0, 1)."""
    frozen_share: float = 0.25
    """Of the rows, those with a prompt or the rims of a gap, which are known from the start."""
    seams: str = "random"
    """As in sampling (`Grouped.seams`)."""

    def loss(
        self, model: Any, ema: Network, x_1: Tensor, generator: Randomness
    ) -> dict[str, Tensor]:
        """See `Objective`; the network has a joint head."""
        count, length = x_1.shape
        u = stratified(count, generator)
        t = ((u - self.zero_share) / (1.0 - self.zero_share)).clamp(0.0, LATEST_TIME)
        batch = on_the_path(x_1, t, t, self.source, self.schedule, generator)
        # The posterior is that of any step; a network that is told h learns so.
        span = uniform(generator, count, dtype=torch.float64)
        h = 2.0 ** -(span * (SMALLEST_EXPONENT + 1)).floor()
        known = known_at_random(count, length, generator, self.seams)
        frozen = frozen_at_random(count, length, self.frozen_share, generator)
        batch = replace(batch, h=h).given(frozen)
        known = known | batch.known
        places = (~known).flatten().nonzero()[:, 0]
        at = send(places, x_1.device)
        with torch.no_grad():  # the body is the teacher's: only what the head adds is learned
            hidden = hidden_rows(model, batch).index_select(0, at)
        rows = model.told(hidden, at, x_1, send(known, x_1.device))
        g, vocab_size = self.schedule.rate(batch.t), self.source.vocab_size
        noted = Noted(self.position_loss)
        loss = mean_over_positions(model, rows, batch, places, g, vocab_size, noted)
        loss = loss * shared(generator, len(places), count)
        return {"loss": loss, **noted.by_time("loss", batch, places)}


def known_at_random(
    batch: int, length: int, generator: Randomness, seams: str = "random"
) -> Tensor:
    """What the groups drawn so far might be, bool, (B, L); nothing in over a quarter of rows."""
    draws = 2 ** (1 + (uniform(generator, batch, 1) * 5).long())
    drawn = (uniform(generator, batch, 1) * draws).long()
    some = uniform(generator, batch, 1)
    share = torch.where(uniform(generator, batch, 1) < 0.5, 1.0, some)
    share = torch.where(uniform(generator, batch, 1) < 0.2, 0.0, share)
    place = torch.arange(length, device=share.device)
    if seams == "random":
        place = place + (uniform(generator, batch, 1) * draws).long()
    return (place % draws < drawn) & (uniform(generator, batch, length) < share)
