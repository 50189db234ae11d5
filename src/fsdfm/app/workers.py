"""One process, or several that torchrun started: who does what."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch

PATIENCE = timedelta(days=7)
"""How long a process waits for the others; torchrun ends them all when one fails."""


@dataclass(frozen=True, slots=True)
class Workers:
    """This process among `size` that share a file system."""

    rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls) -> Workers:
        """Join the processes that torchrun started; alone without it."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=PATIENCE)
        return cls(torch.distributed.get_rank(), size)

    @property
    def first(self) -> bool:
        """Whether this is the one that reports."""
        return self.rank == 0

    def mine(self, number: int) -> bool:
        """Whether piece of work `number` is this process's."""
        return number % self.size == self.rank

    def device(self, name: str | None) -> str | None:
        """The device asked for, else this process's own GPU where there are several."""
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if name is None and self.size > 1 and count:
            return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % count}"
        return name

    def wait(self) -> None:
        """Until all have come this far."""
        if self.size > 1:
            torch.distributed.barrier()

    def leave(self) -> None:
        """Part from the others."""
        if self.size > 1:
            torch.distributed.destroy_process_group()
