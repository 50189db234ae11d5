"""A loss by times and by step sizes: sums and counts of buckets, without waiting for a device.

Shapes: N rows of a loss, B sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fsdfm.flow.grid import SMALLEST_EXPONENT
from fsdfm.flow.host import send
from fsdfm.flow.path import Batch

TIMES = tuple(f"{k / 8:g}" for k in range(8))
"""Buckets of times by where they begin; each is an eighth."""
STEPS = ("1", *(f"1/{2**k}" for k in range(1, SMALLEST_EXPONENT + 1)))
"""Buckets of step sizes."""
SUM, COUNT = "sum", "count"


class Noted:
    """A loss of rows that remembers what it gave each of them.

    Args:
        loss: (logits, whatever) -> nats of each row (n,); rows come in order, some at a time.
    """

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        self.loss = loss
        self.nats: list[Tensor] = []

    def __call__(self, *given: Any) -> Tensor:
        nats = self.loss(*given)
        self.nats.append(nats.detach())
        return nats

    def by_time(self, name: str, batch: Batch, places: Tensor | None = None) -> dict[str, Tensor]:
        """Scalars for `means`: sums and counts by the times of the rows' sequences.

        Args:
            name: of the loss.
            batch: whose rows these are.
            places: of them, which of the B L positions; those that count if not given.
        """
        bucket = (batch.t * len(TIMES)).long().clamp(0, len(TIMES) - 1)
        return self._by(f"{name}_by_t", TIMES, bucket, batch, places)

    def by_step(self, name: str, batch: Batch) -> dict[str, Tensor]:
        """The same by step sizes 1, 1/2, ..."""
        bucket = (-batch.h.log2()).round().long().clamp(0, SMALLEST_EXPONENT)
        return self._by(f"{name}_by_h", STEPS, bucket, batch, None)

    def _by(
        self,
        name: str,
        labels: Sequence[str],
        bucket: Tensor,
        batch: Batch,
        places: Tensor | None,
    ) -> dict[str, Tensor]:
        device = batch.x_t.device
        places = batch.places if places is None else places
        rows = bucket[places // batch.x_t.shape[1]]
        counts = torch.bincount(rows, minlength=len(labels)).float()
        sums = torch.zeros(len(labels), device=device)
        if self.nats:
            sums = sums.index_add(0, send(rows, device), torch.cat(self.nats).float())
        columns = (SUM, sums), (COUNT, send(counts, device))
        # Scalars, of all buckets each time: so they are added up over passes and processes.
        return {
            f"{name}.{label}.{column}": value
            for column, values in columns
            for label, value in zip(labels, values.unbind(), strict=True)
        }


def is_bucket(name: str) -> bool:
    """Whether a scalar is one of a table's."""
    return name.endswith((f".{SUM}", f".{COUNT}"))


def means(scalars: Iterable[tuple[str, Tensor]]) -> dict[str, dict[str, float | None]]:
    """Tables of mean losses.

    Args:
        scalars: names of `Noted`, and their values over some passes, shape (passes,), on the CPU.

    Returns:
        Of each table the mean of each bucket; None where it had no row. Passes in which a bucket
        was not finite are left out.
    """
    found = dict(scalars)
    tables: dict[str, dict[str, float | None]] = {}
    for key, sums in found.items():
        name, _, rest = key.partition(".")
        label, _, column = rest.rpartition(".")  # a label may have a point: 0.125
        if column == SUM:
            counts = found[f"{name}.{label}.{COUNT}"]
            good = sums.isfinite()
            count = float(counts[good].sum())
            mean = float(sums[good].sum()) / count if count else None
            tables.setdefault(name, {})[label] = mean
    return tables
