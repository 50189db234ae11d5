"""One process, or several that torchrun started: who does what."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import torch
from torch import Tensor

from fsdfm.core.errors import ConfigError, WorkerError

PATIENCE = timedelta(days=30)
"""How long a process waits for the others; torchrun ends them all when one fails."""
_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|by peer|timed out", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Workers:
    """This process among `size` that share a file system."""

    rank: int = 0
    size: int = 1

    @classmethod
    @contextmanager
    def joined(cls, backend: str = "gloo", patience: timedelta = PATIENCE) -> Iterator[Self]:
        """Join the processes that torchrun started, and part from them; alone without it.

        Args:
            backend: of torch.distributed.
            patience: how long a process waits for the others.

        Raises:
            ConfigError: WORLD_SIZE is set, but not by torchrun.
            WorkerError: another process ended, or cannot be reached.
        """
        if alone():
            yield cls()
            return
        with lost_told():
            ours = not torch.distributed.is_initialized()
            if ours:
                try:
                    store, rank, size = _meeting(patience)
                    torch.distributed.init_process_group(
                        backend, timeout=patience, store=store, rank=rank, world_size=size
                    )
                except ValueError as error:
                    raise ConfigError(
                        f"WORLD_SIZE is set, but the processes cannot meet ({error}): start them "
                        "with torchrun, or unset it."
                    ) from None
            try:
                yield cls(torch.distributed.get_rank(), torch.distributed.get_world_size())
            finally:
                if ours:
                    torch.distributed.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the one that reports."""
        return self.rank == 0

    def mine(self, number: int) -> bool:
        """Whether piece of work `number` is this process's."""
        return number % self.size == self.rank

    def wait(self) -> None:
        """Until all have come this far."""
        if self.size > 1:
            torch.distributed.barrier()

    def totals(self, *counts: int) -> list[int]:
        """Sums over all of them; waits for them, not for their devices."""
        return [int(x) for x in self.sum(torch.tensor(counts))]

    def sum(self, values: Tensor) -> Tensor:
        """Sums over all of them, where the values are."""
        if self.size > 1:
            values = values.clone()
            torch.distributed.all_reduce(values)
        return values


def _meeting(patience: timedelta) -> tuple[Any, int, int]:
    """Where processes meet, which of them this is, and how many they are.

    When torchrun starts them again its store still has the addresses of those that are gone (torch
    2.13): each start meets at a place of its own. Of several nodes each counts its own starts, so
    there the place stays.

    Raises:
        ValueError: the environment does not say.
    """
    from torch.distributed.rendezvous import rendezvous  # here: not every torch has it

    store, rank, size = next(rendezvous("env://", timeout=patience))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = torch.distributed.PrefixStore(f"start {start}", store)  # type: ignore[attr-defined]
    return store, rank, size


def alone() -> bool:
    """Whether torchrun started nothing, and nobody several processes."""
    return os.environ.get("WORLD_SIZE", "1") == "1" and "TORCHELASTIC_RUN_ID" not in os.environ


def own_device(name: str | None) -> str | None:
    """The device asked for; this process's own GPU where torchrun started several processes."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name in (None, "cuda") and not alone() and count:
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % count}"
    return name


@contextmanager
def lost_told() -> Iterator[None]:
    """Tell in one line that another process is gone.

    Raises:
        WorkerError: it is.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.distributed.DistError) or _LOST.search(str(error)):
            raise WorkerError(
                "Another process of this run ended or cannot be reached, so this one ends too: its "
                "own message says why. What was saved is kept; run the same command again."
            ) from error
        raise
