"""The posterior p(x_1 given x_t): what a network is asked, and how the movers of a call are drawn.

Shapes: B sequences, L positions, N movers of one call, D hidden, V data tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fsdfm.core.errors import ConfigError
from fsdfm.flow.grid import SMALLEST_STEP
from fsdfm.flow.host import send
from fsdfm.flow.step import StepRule


class JointHead(Protocol):
    """Tells hidden rows what is known beside them; without a joint head it tells them nothing."""

    def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
        """Rows (N, D) at positions (N,), tokens (B, L), which are known (B, L) -> (N, D)."""
        ...


class FlowModel(JointHead, Protocol):
    """A network: every position's hidden row, what rows are told, and the head on some of them."""

    def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """States (B, L), times (B,), step sizes (B,) -> hidden rows (B, L, D)."""
        ...

    def head(self, rows: Tensor) -> Tensor:
        """Hidden rows (N, D) -> logits (N, V), or more columns, of which the first V count."""
        ...


class Sampled(JointHead, Protocol):
    """What sampling needs of a network: all sequences share a time, and few rows are wanted."""

    def hidden(self, x: Tensor, t: float, h: float, rows: Tensor) -> Tensor:
        """States (B, L), time, step size, some of the B L positions, ascending -> rows (N, D)."""
        ...

    def head(self, rows: Tensor) -> Tensor:
        """Hidden rows (N, D) -> logits (N, V), or more columns, of which the first V count."""
        ...


@dataclass(frozen=True, slots=True)
class Sequences:
    """Any `FlowModel` as the sampler calls it: its body runs on the sequences that have movers.

    With many steps most short sequences stand still in a given one: 1,024 steps move one of 12
    positions about 80 times.

    Args:
        model: the network.
        device: where it is; states may lie elsewhere.
    """

    model: FlowModel
    device: torch.device | str = "cpu"

    def hidden(self, x: Tensor, t: float, h: float, rows: Tensor) -> Tensor:
        """See `Sampled`."""
        rows = rows.to(self.device)
        wanted, place = torch.unique_consecutive(rows // x.shape[1], return_inverse=True)
        times, steps = (
            torch.full((len(wanted),), v, dtype=torch.float32, device=self.device)
            for v in (t, max(h, SMALLEST_STEP))
        )
        return self.model.body(x.to(self.device)[wanted], times, steps)[place, rows % x.shape[1]]

    def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
        """See `JointHead`."""
        return self.model.told(rows, *(each.to(self.device) for each in (at, x, known)))

    def head(self, rows: Tensor) -> Tensor:
        """See `Sampled`."""
        return self.model.head(rows)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the network: who moves, and what each mover is drawn from."""

    x: Tensor
    """State, int64, shape (B, L)."""
    places: Tensor
    """The movers among the B L positions, ascending, int64, shape (N,), on the CPU."""
    rows: Tensor
    """The same beside the state."""
    hidden: Tensor
    """Their hidden rows, (N, D), where the network is."""
    known: Tensor
    """What is known before any of them is drawn, bool, shape (B, L), beside the state."""
    u: Tensor
    """Uniform in [0, 1), shape (N,), beside the state: one number decides where a mover lands."""
    offset: Tensor
    """Uniform in [0, 1), shape (B,), on the CPU: where a sequence's groups begin in this call."""
    draw: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(hidden rows (n, D), tokens as they stand (B L,), which of them are drawn (n,), u (n,)) ->
    their next tokens, int64, (n,)."""

    @classmethod
    def of(
        cls,
        model: Sampled,
        x: Tensor,
        times: tuple[float, float],
        movers: Tensor,
        known: Tensor,
        chance: tuple[Tensor, Tensor],
        draw: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    ) -> Call:
        """The call at a state.

        Args:
            model: the network.
            x: state, int64, shape (B, L).
            times: t and h.
            movers: who moves, bool, shape (B, L), on the CPU, as `known` and `u`.
            chance: u and offset.
            known, draw: see the fields.
        """
        # Counted and picked on the CPU, so that nothing here waits for the device.
        places = movers.flatten().nonzero()[:, 0]
        u, offset = chance
        rows, known, u = (send(each, x.device) for each in (places, known, u))
        return cls(x, places, rows, model.hidden(x, *times, rows), known, u, offset, draw)

    def placed(self, tokens: Tensor) -> Tensor:
        """The next state, in which the movers have these tokens."""
        return self.x.flatten().index_copy(0, self.rows, tokens).view_as(self.x)


class Posterior(Protocol):
    """How the movers of one call are drawn: alone, or seeing each other."""

    def check(self, rule: StepRule) -> None:
        """Raises ConfigError if it cannot go with a step rule."""
        ...

    def tokens(self, call: Call) -> Tensor:
        """The movers' next tokens, int64, shape (N,)."""
        ...


@dataclass(frozen=True, slots=True)
class Independent:
    """Each mover on its own: for networks without a joint head."""

    def check(self, rule: StepRule) -> None:
        """Goes with every rule."""

    def tokens(self, call: Call) -> Tensor:
        """See `Posterior`."""
        return call.draw(call.hidden, call.x.flatten(), call.rows, call.u)


INDEPENDENT = Independent()

SEAMS = ("fixed", "random")
"""At the multiples of the number of groups, or shifted in every call, each sequence on its own."""


@dataclass(frozen=True, slots=True)
class Grouped:
    """In groups, from left to right, each told by a joint head what the ones before have drawn.

    With exact conditionals the law of a call is the joint posterior's wherever no two positions of
    a group depend on each other once the groups before are drawn; with as many groups as positions
    it always is. One group passes through the joint head too: its training always does.
    """

    head: JointHead
    groups: int = 1
    """Every `groups`-th position is drawn together, at least 1."""
    seams: str = "fixed"
    """Where blocks of `groups` positions begin, one of SEAMS. The first of a block knows least; at
    random seams no position is always the first."""

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ConfigError(f"draws must be at least 1, got {self.groups}.", "draws")
        if self.seams not in SEAMS:
            raise ConfigError(f"seams must be {' or '.join(SEAMS)}, got {self.seams!r}.", "seams")

    def check(self, rule: StepRule) -> None:
        """Several groups need a rule whose every mover lands on a fresh draw from p.

        Else a mover that stays where it was is told to its neighbours as drawn.
        """
        if self.groups > 1 and not rule.redraws:
            raise ConfigError(
                f"step={rule.name} cannot go with draws={self.groups}: positions that it leaves as "
                f"they are would be told to their neighbours as drawn. Take draws=1, or step=exact "
                f"or step=euler.",
                "step",
                "draws",
            )

    def tokens(self, call: Call) -> Tensor:
        """See `Posterior`."""
        x, known, length = call.x.flatten(), call.known.flatten(), call.x.shape[1]
        position = call.places % length
        if self.seams == "random":
            shift = (call.offset * self.groups).long()
            position = position + shift[call.places // length]
        for picked in split(position, self.groups):
            part = send(picked, x.device)
            at, few = call.rows[part], call.hidden[part.to(call.hidden.device)]
            told = self.head.told(few, at, x.view_as(call.x), known.view_as(call.x))
            x = x.index_copy(0, at, call.draw(told, x, at, call.u[part]))
            known = known.index_fill(0, at, True)
        return x[call.rows]


def split(position: Tensor, groups: int) -> Iterator[Tensor]:
    """Which movers are drawn together: every `groups`-th position, from left to right.

    Args:
        position: of each mover in its sequence, or shifted, int64, shape (N,), on the CPU.
        groups: how many.

    Yields:
        Indices into the movers, of each group that has any.
    """
    group = position % groups
    for k in sorted(set(group.tolist())):  # however many there may be
        yield (group == k).nonzero()[:, 0]
