"""Sources of x_0 and the mixture path from x_0 to data.

Shapes: B sequences, L positions, V data tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from fsdfm.flow.host import Draws, Randomness, send, uniform
from fsdfm.flow.schedule import Schedule


class Source(Protocol):
    """Where a sequence starts."""

    @property
    def vocab_size(self) -> int:
        """V, the number of data tokens."""
        ...

    @property
    def absorbing(self) -> bool:
        """Whether a position that has left the source stays: only the others move and are learned.

        So it is with the mask source, where a position that is not masked is data. The network
        need not learn to copy.
        """
        ...

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """x_0, int64, of the given shape, on the generator's device."""
        ...


@dataclass(frozen=True, slots=True)
class UniformSource:
    """Every position starts at a token drawn evenly from the V data tokens."""

    vocab_size: int
    absorbing: bool = field(default=False, init=False)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """x_0 uniform over 0 .. V - 1."""
        return torch.randint(self.vocab_size, shape, generator=generator, device=generator.device)


@dataclass(frozen=True, slots=True)
class MaskSource:
    """Every position starts at one extra id, V, which is never data."""

    vocab_size: int
    absorbing: bool = field(default=True, init=False)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """x_0 = V everywhere; the generator is not advanced."""
        return torch.full(shape, self.vocab_size, dtype=torch.int64, device=generator.device)


SOURCES = ("uniform", "mask")


def make_source(name: str, vocab_size: int) -> Source:
    """The source called `uniform` or `mask`.

    Args:
        name: one of SOURCES.
        vocab_size: V.

    Raises:
        ValueError: another name.
    """
    if name not in SOURCES:
        raise ValueError(f"The source must be one of {', '.join(SOURCES)}, got {name}.")
    return MaskSource(vocab_size) if name == "mask" else UniformSource(vocab_size)


def drawn(source: Source, shape: tuple[int, int], random: Randomness) -> Tensor:
    """x_0 of some sequences, int64, shape (B, L)."""
    if isinstance(random, Draws):
        return torch.stack([source.draw(shape[1:], g) for g in random.generators])
    return source.draw(shape, random)


def shown(t: Tensor, length: int, schedule: Schedule, generator: Randomness) -> Tensor:
    """Which positions show data at time t: each on its own, with probability kappa_t.

    Args:
        t: time of each sequence, shape (B,), beside the generator.
        length: L.
        schedule: kappa.
        generator: source of randomness, on the CPU in training.

    Returns:
        bool, shape (B, L).
    """
    u = uniform(generator, len(t), length, dtype=torch.float64)
    return u < schedule.kappa(t.double())[:, None]


def mixture_state(
    x_0: Tensor, x_1: Tensor, t: Tensor, schedule: Schedule, generator: torch.Generator
) -> Tensor:
    """x_t: each position on its own is x_1 with probability kappa_t, else x_0.

    Args:
        x_0, x_1: source and data, int64, shape (B, L).
        t: time of each sequence, shape (B,).
        schedule: kappa.
        generator: source of randomness, on the device of x_1.

    Returns:
        x_t, int64, shape (B, L).

    Source: Discrete Flow Matching, arXiv 2407.15595.
    """
    return torch.where(shown(t, x_1.shape[1], schedule, generator), x_1, x_0)


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences on the path: states where the network is, and what the host knows about them."""

    x_t: Tensor
    """State, int64, shape (B, L), on the network's device."""
    x_1: Tensor
    """Data, int64, shape (B, L), beside it."""
    t: Tensor
    """Times, float64, shape (B,), on the CPU."""
    h: Tensor
    """Step sizes shown to the network, float64, shape (B,), on the CPU."""
    counted: Tensor | None = None
    """Positions that may move and are learned, bool, shape (B, L), on the CPU; None: all of them.
    The others are known: given, or with an absorbing source data already."""

    @property
    def places(self) -> Tensor:
        """Which of the B L positions are counted, ascending, int64, shape (N,), on the CPU."""
        if self.counted is None:
            return torch.arange(self.x_t.numel())
        return self.counted.flatten().nonzero()[:, 0]

    @property
    def known(self) -> Tensor:
        """Positions that are not counted, bool, shape (B, L), on the CPU."""
        if self.counted is None:
            return torch.zeros(self.x_t.shape, dtype=torch.bool)
        return ~self.counted

    def select(self, rows: Tensor) -> Batch:
        """Some of the sequences, int64, shape (n,), on the CPU."""
        there, counted = send(rows, self.x_t.device), self.counted
        return Batch(
            self.x_t.index_select(0, there),
            self.x_1.index_select(0, there),
            self.t[rows],
            self.h[rows],
            None if counted is None else counted[rows],
        )

    def given(self, frozen: Tensor) -> Batch:
        """The same with some positions given: they show data and do not count; bool, (B, L)."""
        x_t = torch.where(send(frozen, self.x_t.device), self.x_1, self.x_t)
        return replace(self, x_t=x_t, counted=~(self.known | frozen))


def on_the_path(
    x_1: Tensor,
    t: Tensor,
    h: Tensor,
    source: Source,
    schedule: Schedule,
    generator: Randomness,
) -> Batch:
    """Sequences at their times on the way from the source to data.

    Args:
        x_1: data, int64, shape (B, L), on the network's device.
        t, h: times and step sizes, float64, shape (B,), on the CPU.
        source: where x_0 comes from.
        schedule: kappa.
        generator: source of randomness, on the CPU.
    """
    x_0 = drawn(source, (x_1.shape[0], x_1.shape[1]), generator)
    return mixed(x_0, x_1, shown(t, x_1.shape[1], schedule, generator), t, h, source)


def mixed(x_0: Tensor, x_1: Tensor, data: Tensor, t: Tensor, h: Tensor, source: Source) -> Batch:
    """Sequences that show data where `data`, bool, (B, L), says so, and x_0 elsewhere.

    Args:
        x_0: int64, shape (B, L), on the CPU as `data`.
        x_1, t, h, source: see `on_the_path`.
    """
    x_t = torch.where(send(data, x_1.device), x_1, send(x_0, x_1.device))
    return Batch(x_t, x_1, t, h, ~data if source.absorbing else None)
