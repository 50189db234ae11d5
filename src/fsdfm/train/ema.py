"""Exponential moving average of a network's weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


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
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.warmup = decay, warmup
        self.updates = 0

    @torch.no_grad()
    def update(self, model: Module) -> None:
        """Move towards the network's present weights."""
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(
            list(self.model.parameters()), list(model.parameters()), weight=1.0 - decay
        )
        self.updates += 1
