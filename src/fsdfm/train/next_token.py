"""What a causal language model minimises: the honest rival of a flow model of its size.

Shapes: B sequences, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fsdfm.flow.grid import SMALLEST_STEP
from fsdfm.flow.host import Randomness
from fsdfm.flow.loss import RowLoss, cross_entropy, mean_over_rows
from fsdfm.train.objective import Network

TIME = 1.0
"""What the network is told, with the smallest step: everything that it sees is data."""


@dataclass(frozen=True, slots=True)
class NextToken:
    """-ln p(x_1[i] given x_1[:i]), all positions; the network's attention is causal."""

    vocab_size: int

    def loss(
        self, model: Network, ema: Network, x_1: Tensor, generator: Randomness
    ) -> dict[str, Tensor]:
        """See `Objective`; nothing is drawn."""
        return {"loss": self.nats(model, x_1)}

    def nats(self, model: Network, x_1: Tensor) -> Tensor:
        """-ln p of a token of the data, (B, L), on average; scalar."""
        t = torch.full((len(x_1),), TIME, device=x_1.device)
        hidden = model.body(x_1, t, torch.full_like(t, SMALLEST_STEP)).flatten(0, 1)
        data = x_1.flatten()

        def loss(rows: slice) -> RowLoss:
            there = data[rows]
            return lambda logits, piece: cross_entropy(
                logits, there[piece], there[piece], logits[:, 0]
            )

        return mean_over_rows(model, hidden, loss, self.vocab_size)
