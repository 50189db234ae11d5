"""Sequences of several times and lengths that are computed together.

Shapes: B sequences, (S, P) rows as they pass the blocks: of one length each sequence has its place,
S = B; else they lie behind each other, S = 1. D hidden, H heads of width d.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fsdfm.flow.host import send
from fsdfm.model.attention import attend
from fsdfm.model.rotary import Rotary

NormWeights = tuple[Tensor, Tensor]
"""Weight and bias of a norm, float32, each (D,), or (B, D) where sequences differ."""


@dataclass(frozen=True, slots=True)
class Pack:
    """Which of the rows that are computed together are whose."""

    count: int
    """B."""
    sizes: tuple[int, ...]
    """Rows of each sequence; one number where all have as many."""

    @property
    def edges(self) -> list[int]:
        """Where each begins, and the last ends, where they lie behind each other."""
        return [0, *itertools.accumulate(self.sizes)]

    @property
    def places(self) -> Iterator[tuple[int, int]]:
        """First and last-but-one row of each."""
        return itertools.pairwise(self.edges)

    def tables(self, rotary: Rotary) -> NormWeights:
        """cos and sin of every row's position in its sequence, (P, d)."""
        cos, sin = rotary.tables(max(self.sizes))
        if len(self.sizes) == 1:
            return cos, sin
        cos, sin = (torch.cat([table[:size] for size in self.sizes]) for table in (cos, sin))
        return cos, sin

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        """Each sequence to itself."""
        if len(self.sizes) == 1:
            return attend(q, k, v, causal=causal)
        parts = (tuple(each[:, :, a:b] for each in (q, k, v)) for a, b in self.places)
        return torch.cat([attend(*part, causal=causal) for part in parts], 1)

    def spread(self, gate: Tensor | None) -> Tensor | None:
        """A gate of each sequence, (B, D), as its rows are multiplied by; one of all as it is."""
        if gate is None or gate.ndim == 1:
            return gate
        if len(self.sizes) == 1:
            return gate[:, None]
        sizes = send(torch.tensor(self.sizes), gate.device)
        return gate.repeat_interleave(sizes, 0)[None]


@dataclass(frozen=True, slots=True)
class Modulation:
    """What t and h make of a block; a gate is (D,) or (B, D), float32, where there is any."""

    norm1: NormWeights
    gate1: Tensor | None
    norm2: NormWeights
    gate2: Tensor | None


Condition = tuple[list[Modulation], NormWeights]
"""Of every block, and the final norm."""


def side_by_side(each: Sequence[Modulation]) -> Modulation:
    """Those of several sequences as one."""
    norm1, norm2 = norms_of(m.norm1 for m in each), norms_of(m.norm2 for m in each)
    if each[0].gate1 is None:
        return Modulation(norm1, None, norm2, None)
    gate1, gate2 = (
        torch.stack(gates) for gates in zip(*((m.gate1, m.gate2) for m in each), strict=True)
    )
    return Modulation(norm1, gate1, norm2, gate2)


def norms_of(each: Iterable[NormWeights]) -> NormWeights:
    """Norms of several sequences as one."""
    weight, bias = (torch.stack(parts) for parts in zip(*each, strict=True))
    return weight, bias
