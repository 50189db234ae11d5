"""The joint head: positions of one call that see what the others have drawn.

Shapes: N rows, B sequences, L positions, D hidden width, R neighbours on each side.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fsdfm.model.config import ModelConfig


class JointHead(nn.Module):
    """Tells a hidden row which tokens have been drawn beside it, within one and the same call.

    p(x_1[i] given x_t) knows nothing of what the other positions of a step draw, so positions drawn
    together contradict each other. This small MLP moves the row before the head reads it,
    which makes it p(x_1[i] given x_t and the neighbours drawn so far): a step can draw its movers
    in a few groups, each seeing the ones before, for one pass of the body. It starts at zero.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, count = config.hidden_size, 2 * config.neighbours
        self.tokens = nn.Linear(count * width, 2 * width)
        self.row = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(2 * width, width)

    def forward(self, rows: Tensor, around: Tensor, known: Tensor) -> Tensor:
        """Rows (N, D), embeddings of their neighbours (N, 2 R, D), known (N, 2 R) -> (N, D)."""
        inner = self.tokens(known_around(around, known)) + self.row(rows)
        told: Tensor = rows + self.out(F.gelu(inner, approximate="tanh"))
        return told


def known_around(around: Tensor, known: Tensor) -> Tensor:
    """What a joint head reads: embeddings (N, 2 R, D) normed, or zero where unknown, (N, 2 R D)."""
    return (F.layer_norm(around.float(), around.shape[-1:]) * known[..., None]).flatten(1)


def neighbourhood(x: Tensor, known: Tensor, rows: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """What is known around some positions.

    Args:
        x: token ids, int64, shape (B, L).
        known: which of them have been drawn, bool, shape (B, L).
        rows: some of the B L positions, int64, shape (N,).
        radius: R.

    Returns:
        Tokens i - R ... i - 1, i + 1 ... i + R, int64, and whether each is known, both (N, 2 R).
        Past the ends of a sequence nothing is.
    """
    length = x.shape[1]
    left = torch.arange(-radius, 0, device=x.device)
    place = rows[:, None] % length + torch.cat((left, -left.flip(0)))
    inside = (place >= 0) & (place < length)
    index = rows[:, None] // length * length + place.clamp(0, length - 1)
    return x.flatten()[index], known.flatten()[index] & inside
