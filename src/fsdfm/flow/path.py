"""Sources of x_0 and the mixture path from x_0 to data.

Shapes: B sequences, L positions, V data tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

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

        With the mask source that is the law of the path, since a position that is not masked is
        data. A network that is built so need not learn to copy.
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
    absorbing: bool = False

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """x_0 = V everywhere; the generator is not advanced."""
        return torch.full(shape, self.vocab_size, dtype=torch.int64, device=generator.device)


SOURCES = ("uniform", "mask")


def make_source(name: str, vocab_size: int, *, absorbing: bool = False) -> Source:
    """The source called `uniform` or `mask`.

    Args:
        name: one of SOURCES.
        vocab_size: V.
        absorbing: for the mask source, see `Source.absorbing`.

    Raises:
        ValueError: another name, or a uniform source that is to absorb.
    """
    if name not in SOURCES:
        raise ValueError(f"The source must be one of {', '.join(SOURCES)}, got {name}.")
    if name == "mask":
        return MaskSource(vocab_size, absorbing)
    if absorbing:
        raise ValueError("Only the mask source absorbs: in a uniform one nothing tells data apart.")
    return UniformSource(vocab_size)


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
    u = torch.rand(x_1.shape, dtype=torch.float64, generator=generator, device=x_1.device)
    return torch.where(u < schedule.kappa(t.double())[:, None], x_1, x_0)
