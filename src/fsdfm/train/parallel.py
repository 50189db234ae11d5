"""Several processes that train as one: start, wrap and reduce.

Each process holds the whole network and a part of every pass. torchrun starts them and says, in the
environment, which one this is. Gradients are averaged by DistributedDataParallel.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fsdfm.core.errors import ConfigError
from fsdfm.core.workers import Workers, alone

PATIENCE = timedelta(minutes=10)
"""How long a process waits for the others: all do the same, at the same time."""


@dataclass(frozen=True, slots=True)
class World(Workers):
    """This process among those that train together; the first one writes and speaks."""

    def rows(self, count: int) -> range:
        """The samples of a pass that fall to this process, of as many in each."""
        return range(self.rank * count, (self.rank + 1) * count)

    def share(self, batch_size: int) -> int:
        """Samples of a pass for each process.

        Raises:
            ConfigError: they cannot be dealt evenly.
        """
        if batch_size % self.size:
            raise ConfigError(
                f"batch_size={batch_size} cannot be dealt evenly to {self.size} processes: choose "
                f"a multiple of {self.size}.",
                "batch_size",
            )
        return batch_size // self.size

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, its gradients averaged over processes in every backward pass."""
        if self.size == 1:
            return module
        # An objective may train a part of the network: what it leaves alone has no gradient.
        return DistributedDataParallel(module, find_unused_parameters=True)

    def mean(self, values: Tensor) -> Tensor:
        """Means over processes, on the device."""
        return self.sum(values) / self.size


ALONE = World()


def started(device: torch.device) -> AbstractContextManager[World]:
    """Join the other processes of this run, if torchrun started several.

    Args:
        device: of this process (`own_device`).

    Raises:
        ConfigError: fewer GPUs than processes on this machine.
        WorkerError: the others cannot be reached, or one of them ended.
    """
    if alone() or device.type != "cuda":
        return World.joined(patience=PATIENCE)
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise ConfigError(
            f"There are {count} GPUs here, too few for process {local + 1}: start as many "
            "processes as there are GPUs."
        )
    torch.cuda.set_device(device)
    return World.joined("cpu:gloo,cuda:nccl", PATIENCE)


@contextmanager
def unshared(module: nn.Module) -> Iterator[None]:
    """Gradients of backward passes in it stay this process's, until one outside it."""
    if isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    else:
        yield


class Pass(nn.Module):
    """An objective on a network, as one module: what DistributedDataParallel can wrap."""

    def __init__(self, objective: Any, model: nn.Module) -> None:
        super().__init__()
        self.objective, self.model = objective, model

    def forward(self, ema: Any, x_1: Tensor, random: Any) -> dict[str, Tensor]:
        """See `Objective.loss`."""
        found: dict[str, Tensor] = self.objective.loss(self.model, ema, x_1, random)
        return found
