"""Several processes that train as one: start, wrap and reduce, and who writes.

Each process holds the whole network and a part of every pass. torchrun starts them and says, in the
environment, which one this is. Gradients are averaged by DistributedDataParallel.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fsdfm.core.errors import ConfigError, TrainingError

PATIENCE = timedelta(minutes=10)
"""How long a process waits for the others."""
_LOST = re.compile(r"gloo|nccl|connection|peer|socket|timed out|rank \d", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class World:
    """This process among those of a run."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

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

    def totals(self, numbers: Sequence[float]) -> list[float]:
        """Sums over processes; waits for all of them, not for their devices.

        Raises:
            TrainingError: another process ended.
        """
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(list(numbers), dtype=torch.float64)
        with lost_told():
            dist.all_reduce(found)
        return found.tolist()

    def counts(self, numbers: Sequence[int]) -> list[int]:
        """`totals` of whole numbers."""
        return [int(number) for number in self.totals(numbers)]

    def mean(self, values: Tensor) -> Tensor:
        """Means over processes, on the device.

        Raises:
            TrainingError: another process ended.
        """
        if self.size == 1:
            return values
        values = values.clone()
        with lost_told():
            dist.all_reduce(values)
        return values / self.size


ALONE = World()


@contextmanager
def started(device: torch.device) -> Iterator[World]:
    """Join the other processes of this run, if torchrun started several.

    Raises:
        ConfigError: fewer GPUs than processes on this machine.
        TrainingError: the others cannot be reached, or one of them ended.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    backend = "gloo"
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"There are {torch.cuda.device_count()} GPUs here, too few for process {local + 1}:"
                " start as many processes as there are GPUs."
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    with lost_told():
        dist.init_process_group(backend, timeout=PATIENCE)
        try:
            yield World(dist.get_rank(), size)
        finally:
            dist.destroy_process_group()


@contextmanager
def lost_told() -> Iterator[None]:
    """Tell in one line that another process is gone.

    Raises:
        TrainingError: it is.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or _LOST.search(str(error)):
            raise TrainingError(
                "Another process of this run ended or cannot be reached, so this one ends too: its "
                "own message says why. The last checkpoint is kept; run the same command again."
            ) from error
        raise


class Pass(nn.Module):
    """An objective on a network, as one module: what DistributedDataParallel can wrap."""

    def __init__(self, objective: Any, model: nn.Module) -> None:
        super().__init__()
        self.objective, self.model = objective, model

    def forward(self, ema: Any, x_1: Tensor, random: Any) -> dict[str, Tensor]:
        """See `Objective.loss`."""
        found: dict[str, Tensor] = self.objective.loss(self.model, ema, x_1, random)
        return found
