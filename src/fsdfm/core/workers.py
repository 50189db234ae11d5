"""One process, or several that torchrun started: who does what."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch

from fsdfm.core.errors import ConfigError

PATIENCE = timedelta(days=30)
"""How long a process waits for the others; torchrun ends them all when one fails."""


@dataclass(frozen=True, slots=True)
class Workers:
    """This process among `size` that share a file system."""

    rank: int = 0
    size: int = 1

    @classmethod
    @contextmanager
    def joined(cls) -> Iterator[Workers]:
        """Join the processes that torchrun started, and part from them; alone without it.

        Raises:
            ConfigError: WORLD_SIZE is set, but not by torchrun.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1":
            yield cls()
            return
        ours = not torch.distributed.is_initialized()
        if ours:
            try:
                torch.distributed.init_process_group("gloo", timeout=PATIENCE)
            except ValueError as error:
                raise ConfigError(
                    f"WORLD_SIZE is set, but the processes cannot meet ({error}): start them with "
                    "torchrun, or unset it."
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
        """Sums over all of them."""
        if self.size == 1:
            return list(counts)
        sums = torch.tensor(counts)
        torch.distributed.all_reduce(sums)
        return [int(x) for x in sums]


def own_device(name: str | None) -> str | None:
    """The device asked for; this process's own GPU where torchrun started several processes."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name in (None, "cuda") and os.environ.get("WORLD_SIZE", "1") != "1" and count:
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % count}"
    return name
