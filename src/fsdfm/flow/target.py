"""What a big step should land on, from several small ones: the targets of distillation.

A target is a mixture of posteriors, each the head applied to some final hidden rows. A mean of
logits is a single component, since the head is linear: the mean of hidden rows.

Shapes: B sequences, L positions, D hidden, V data tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fsdfm.flow.host import Randomness, send, uniform
from fsdfm.flow.path import Source
from fsdfm.flow.posterior import FlowModel
from fsdfm.flow.schedule import Schedule
from fsdfm.flow.step import StepRule, advance, sharpen


@dataclass(frozen=True, slots=True)
class Target:
    """sum_k weights_k softmax(head(hiddens_k))."""

    hiddens: tuple[Tensor, ...]
    """Final hidden rows of each component, (B L, D)."""
    weights: tuple[Tensor, ...]
    """Weight of each component at each position, (B L,); they sum to 1."""

    def logits(self, model: FlowModel, rows: slice, vocab_size: int) -> list[Tensor]:
        """Each component's logits at some of the B L positions, (n, V), in the head's format."""
        return [model.head(hidden[rows])[:, :vocab_size] for hidden in self.hiddens]

    def select(self, rows: Tensor) -> Target:
        """The target at some of the B L positions, int64, (N,)."""
        hiddens, weights = (
            tuple(x.index_select(0, rows) for x in parts) for parts in (self.hiddens, self.weights)
        )
        return Target(hiddens, weights)

    def mix(self, logits: list[Tensor], rows: slice, piece: slice) -> Tensor:
        """The target, float32, at a piece of the rows that `logits` were made for."""
        parts = [sharpen(component[piece]) for component in logits]
        if len(parts) == 1:
            return parts[0]
        weighted = zip(parts, self.weights, strict=True)
        return sum((p.mul_(w[rows][piece, None]) for p, w in weighted), torch.zeros(()))


@dataclass(slots=True)
class Jumper:
    """The sampler's own step, as targets take it: independent movers, temperature 1.

    Times, steps and random numbers are on the CPU, where who moves is decided; states and hidden
    rows are where the network is. Nothing here waits for them. A mover is drawn in float32, which
    all devices have: of 50,000 tokens it misplaces less than 1e-4 of the mass, and the law of a
    target's middle state need not be nearer.
    """

    model: FlowModel
    schedule: Schedule
    rule: StepRule
    source: Source
    generator: Randomness
    open: Tensor | None = None
    """Positions that may still move, bool, shape (B, L), on the CPU; None: all of them, for good.
    A mover is not open any more, as it is data (see `Source.absorbing`)."""

    def __post_init__(self) -> None:
        assert (self.open is not None) == self.source.absorbing

    def hidden(self, x: Tensor, t: Tensor, h: Tensor, before: Tensor | None = None) -> Tensor:
        """Final hidden rows, (B, L, D), float32: means of bfloat16 rows would lose digits.

        Args:
            x, t, h: states (B, L), times (B,), step sizes (B,).
            before: rows of the state that x was jumped to from. With an absorbing source a position
                that has been revealed keeps its row: it moves no more, and of such positions the
                network has learned nothing.
        """
        times, steps = (send(each.float(), x.device) for each in (t, h))
        rows = self.model.body(x, times, steps)
        if self.open is None:
            known = torch.zeros_like(x, dtype=torch.bool)
        else:
            known = send(~self.open, x.device)
        at = torch.arange(x.numel(), device=x.device)
        rows = self.model.told(rows.flatten(0, 1), at, x, known).float().view(*x.shape, -1)
        if before is None or not self.source.absorbing:
            return rows
        return torch.where((x == self.source.vocab_size)[..., None], rows, before)

    def jump(self, x: Tensor, hidden: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """The state after a step of size h from (x, t), whose hidden rows are given; (B, L)."""
        a = self.rule.mover_probability(self.schedule, t, h)
        u = uniform(self.generator, len(x), 2, x.shape[1], dtype=torch.float64).unbind(1)
        movers = u[0] < a[:, None]
        if self.open is not None:
            movers = movers & self.open
            self.open = self.open & ~movers
        places = movers.flatten().nonzero()[:, 0]
        rows, chances, u_rows = (
            send(each, x.device)
            for each in (places, a[places // x.shape[1]].float(), u[1][movers].float())
        )
        few = hidden.flatten(0, 1).index_select(0, rows)
        return advance(
            x,
            rows,
            lambda part: self.model.head(few[part])[:, : self.source.vocab_size],
            chances,
            u_rows,
            self.rule,
            vocab_size=self.source.vocab_size,
        )


TargetRule = Callable[[Jumper, Tensor, Tensor, Tensor], Target]
"""(jumper, x_t (B, L), t (B,), h (B,)), t and h float64 on the CPU -> the target of a step h."""


def rk4_target(jumper: Jumper, x_t: Tensor, t: Tensor, h: Tensor) -> Target:
    """softmax((l_1 + 2 l_2 + 2 l_3 + l_4) / 6) over three half jumps.

    As published, the third state has jumped three half steps while its clock says two.

    Source: FS-DFM, arXiv 2509.20624.
    """
    half, middle = h / 2, t + h / 2
    l_1 = jumper.hidden(x_t, t, half)
    x_1 = jumper.jump(x_t, l_1, t, half)
    l_2 = jumper.hidden(x_1, middle, half, l_1)
    x_2 = jumper.jump(x_1, l_2, middle, half)
    l_3 = jumper.hidden(x_2, middle, half, l_2)
    x_3 = jumper.jump(x_2, l_3, middle, half)
    l_4 = jumper.hidden(x_3, t + h, half, l_3)
    return _single((l_1 + 2 * l_2 + 2 * l_3 + l_4) / 6)


def rk2_target(jumper: Jumper, x_t: Tensor, t: Tensor, h: Tensor) -> Target:
    """softmax((l_1 + l_2) / 2), l_2 after one half jump.

    Source: FS-DFM, arXiv 2509.20624, there called Heun.
    """
    half, middle = h / 2, t + h / 2
    l_1 = jumper.hidden(x_t, t, half)
    l_2 = jumper.hidden(jumper.jump(x_t, l_1, t, half), middle, half, l_1)
    return _single((l_1 + l_2) / 2)


def semigroup_target(jumper: Jumper, x_t: Tensor, t: Tensor, h: Tensor) -> Target:
    """Two half steps of the exact rule, composed in closed form.

        w p(x, t; h/2) + (1 - w) p(y, u; h/2),   y = Jump(x, t, h/2), u = t + h/2, s = t + h,
        w = (1 - kappa_s) (kappa_u - kappa_t) / ((1 - kappa_u) (kappa_s - kappa_t))

    Linear in probability, so one draw of y is unbiased. It presumes the exact rule. With an
    absorbing source the second term is p(x, t; h/2) where y is revealed, and the weights are right
    as they are: (1 - a_t) (1 - w) = (1 - a_t) a_u / (a_t + (1 - a_t) a_u).
    """
    half, middle = h / 2, t + h / 2
    l_1 = jumper.hidden(x_t, t, half)
    l_2 = jumper.hidden(jumper.jump(x_t, l_1, t, half), middle, half, l_1)
    k_t, k_u, k_s = (jumper.schedule.kappa(time) for time in (t, middle, t + h))
    w = ((1 - k_s) * (k_u - k_t) / ((1 - k_u) * (k_s - k_t))).float()
    w = send(w.repeat_interleave(x_t.shape[1]), x_t.device)
    return Target((l_1.flatten(0, 1), l_2.flatten(0, 1)), (w, 1.0 - w))


def _single(hidden: Tensor) -> Target:
    rows = hidden.flatten(0, 1)
    return Target((rows,), (torch.ones(rows.shape[0], device=rows.device),))


TARGETS: dict[str, TargetRule] = {
    "rk4": rk4_target,
    "rk2": rk2_target,
    "semigroup": semigroup_target,
}
