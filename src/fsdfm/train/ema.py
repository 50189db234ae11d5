"""Exponential moving average of a network's weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import nn

from fsdfm.train.parallel import Plain, here, is_sharded

Module = TypeVar("Module", bound=nn.Module)


START_SHARE = 0.1
"""Of an average, how much of it may be its start when a run ends."""


def within(decay: float, updates: int) -> float:
    """The decay, or the largest one that leaves START_SHARE of the start after so many updates.

        min(decay, START_SHARE ** (1 / updates))

    A student whose targets come from its own average then follows it sooner, too. That is the
    lesser evil: with the longer one a short run neither learns from itself nor is judged by what
    it learned.

    Args:
        decay: of an average without a warm-up, in [0, 1).
        updates: of the whole run, at least 1.
    """
    longest: float = START_SHARE ** (1.0 / updates)
    return min(decay, longest)


class Ema(Generic[Module]):
    """A second network whose weights follow the first one's slowly.

    With a warm-up the decay is min(decay, (1 + n) / (10 + n)) at update n, so that a short run is
    not dominated by random initial weights. Without it the average leaves its start slowly: a
    student whose targets come from its own average must not chase them.

    Args:
        model: the network to follow.
        decay: in [0, 1).
        warmup: whether the first updates count for more.
    """

    def __init__(self, model: Module, decay: float, warmup: bool = True) -> None:
        # What is never trained is shared, and not copied.
        shared = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.model = copy.deepcopy(model, shared).eval().requires_grad_(False)
        self._plain = Plain(self.model)
        self.decay, self.warmup = decay, warmup
        self.updates = 0

    @torch.no_grad()
    def update(self, model: Module) -> None:
        """Move towards the network's present weights."""
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        ours, theirs = zip(*((here(a), here(b)) for a, b in pairs if a is not b), strict=True)
        torch._foreach_lerp_(list(ours), list(theirs), weight=1.0 - decay)
        self.updates += 1

    @contextmanager
    def whole(self, device: torch.device, wanted: bool = True) -> Iterator[Module]:
        """The average as an ordinary network while the block runs: itself, if it is not sharded.

        Args:
            device: where a sharded one is gathered to; every process must ask.
            wanted: whether this process needs it.
        """
        if is_sharded(self.model):
            with self._plain.filled(self.model, device, wanted) as network:
                yield network
        else:
            yield self.model
