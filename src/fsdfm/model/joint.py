"""The joint head: positions of one call that see what the others have drawn.

Shapes: N rows, B sequences, L positions, D hidden width, R neighbours on each side.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fsdfm.model.config import ModelConfig

FARTHEST = 16
"""Known neighbours farther away than this are told apart by their tokens alone."""


class JointHead(nn.Module):
    """Tells a hidden row which tokens have been drawn beside it, within one and the same call.

    p(x_1[i] given x_t) knows nothing of what the other positions of a step draw, so positions drawn
    together contradict each other. This small MLP moves the row before the head reads it,
    which makes it p(x_1[i] given x_t and the neighbours drawn so far): a step can draw its movers
    in a few groups, each seeing the ones before, for one pass of the body. It starts at zero.

    What it sees, `config.sees`:

    * window: the known tokens among the R places on each side.
    * nearest: the R nearest known tokens on each side, however far, and how far; and the state in
      the R places on each side and in its own, where nothing is known. A hidden row tells well what
      the state says about its position, less well what that means beside a known neighbour.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, self.radius = config.hidden_size, config.neighbours
        count = 2 * self.radius
        self.near: nn.Embedding | None = None
        if config.sees == "nearest":
            self.near = nn.Embedding(FARTHEST + 1, 2 * width)
            count += count + 1
        self.tokens = nn.Linear(count * width, 2 * width)
        self.row = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(2 * width, width)

    def forward(self, rows: Tensor, seen: Tensor) -> Tensor:
        """Rows (N, D) and what they see -> (N, D)."""
        inner = self.tokens(seen) + self.row(rows)
        told: Tensor = rows + self.out(F.gelu(inner, approximate="tanh"))
        return told

    def seen(self, embed: nn.Embedding, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
        """What rows see: normed embeddings, zero where there is nothing.

        Args:
            embed: the tokens' embedding.
            at: some of the B L positions, int64, shape (N,).
            x: token ids, int64, shape (B, L).
            known: which of them are known, bool, shape (B, L).

        Returns:
            (N, 2 R D), or (N, (4 R + 1) D), float32.
        """

        def looked_up(tokens: Tensor) -> Tensor:
            # Without a gradient: the embedding is the body's.
            rows = embed(tokens).detach().float()
            return F.layer_norm(rows, rows.shape[-1:])

        if self.near is None:
            tokens, there = neighbourhood(x, known, at, self.radius)
            return (looked_up(tokens) * there[..., None]).flatten(1)
        tokens, distance = nearest(x, known, at, self.radius)
        gain, shift = self.near(distance.clamp_max(FARTHEST)).chunk(2, -1)
        near = (looked_up(tokens) * (1.0 + gain) + shift) * (distance > 0)[..., None]
        tokens, there = neighbourhood(x, ~known, at, self.radius)
        state = looked_up(tokens) * there[..., None]
        own = looked_up(x.flatten()[at])
        return torch.cat((near.flatten(1), state.flatten(1), own), 1)


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


def nearest(x: Tensor, known: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The known tokens that are nearest to some positions, in the order of the text.

    Args:
        x: token ids, int64, shape (B, L).
        known: which of them have been drawn, bool, shape (B, L).
        rows: some of the B L positions, int64, shape (N,).
        count: R, on each side.

    Returns:
        Tokens and how far away they are, both int64, (N, 2 R); 0 away where there is none.
    """
    total = x.numel()
    # Known places in front, then as many fillers as it takes: nothing waits for a count of them.
    index = torch.arange(total, device=x.device)
    places = torch.where(known.flatten(), index, total).sort().values
    k = torch.arange(count, device=x.device)
    before = torch.searchsorted(places, rows)[:, None] - 1 - k.flip(0)
    after = torch.searchsorted(places, rows, right=True)[:, None] + k
    rank = torch.cat((before, after), 1)
    found, own = places[rank.clamp(0, total - 1)], rows[:, None]
    there = (rank >= 0) & (rank < total) & (found < total)
    there &= found // x.shape[1] == own // x.shape[1]
    found = torch.where(there, found, own)
    return x.flatten()[found], (found - own).abs()
