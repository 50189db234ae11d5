"""What is made of the model's rows before a token is drawn, each sequence its own way.

Shapes: B sequences, L positions, N rows (some of the B L positions), V data tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fsdfm.flow.host import send

MOST = 2.0**24
"""Whole numbers up to it are exact in float32; no vocabulary has as many tokens."""


@dataclass(frozen=True, slots=True)
class Bans:
    """Tokens that positions of a sequence may not take."""

    sets: Tensor
    """bool, shape (K, V): tokens that are out, no row all of them."""
    at: Tensor
    """Which of the sets holds at each position, int64, shape (L,); -1 is none."""
    pairs: tuple[tuple[int, int], ...] = ()
    """Positions and tokens that do not go together, besides."""

    def within(self, first: int, last: int) -> Bans:
        """Those of positions from `first` up to `last`."""
        pairs = ((at - first, token) for at, token in self.pairs if first <= at < last)
        return Bans(self.sets, self.at[first:last], tuple(pairs))


@dataclass(frozen=True, slots=True)
class Controls:
    """How the tokens of a sequence are drawn from the model's rows."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Mass of the likeliest tokens that are kept."""
    top_k: int = 0
    """Number of the likeliest tokens that are kept; 0 is all."""
    min_p: float = 0.0
    """Least probability that is kept, as a share of the likeliest token's."""
    repetition_penalty: float = 1.0
    """Divides the odds of tokens that the sequence has."""
    bans: Bans | None = None


class Shaping:
    """The controls of several sequences, each applied to its own rows and to no other.

    Args:
        controls: one for each sequence.
        device: of the rows.
    """

    def __init__(self, controls: Sequence[Controls], device: torch.device) -> None:
        def column(name: str) -> Tensor:
            # Made on the CPU: a tensor that is made on the device from numbers is waited for.
            return send(torch.tensor([float(getattr(c, name)) for c in controls]), device)

        self.controls = controls
        self.temperature, self.top_p = column("temperature"), column("top_p")
        self.top_k, self.min_p = column("top_k").clamp_max(MOST).long(), column("min_p")
        self.penalty = column("repetition_penalty").log()
        # Asked here, and not of the tensors, so that nothing waits for the device.
        self.penal = any(c.repetition_penalty != 1.0 for c in controls)
        self.greedy = any(c.temperature == 0.0 for c in controls)
        self.cutting = any(c.top_k > 0 or c.top_p < 1.0 or c.min_p > 0.0 for c in controls)
        self.banning = [i for i, c in enumerate(controls) if c.bans is not None]

    def posterior(self, logits: Tensor, rows: Tensor, x: Tensor, settled: Tensor) -> Tensor:
        """What is drawn from.

        Args:
            logits: of the rows, (N, V), any float dtype.
            rows: which of the B L positions they are, int64, shape (N,).
            x: state, int64, shape (B, L).
            settled: which positions hold a token that counts as repeated, bool, shape (B, L).

        Returns:
            p, float32, shape (N, V), rows summing to 1: penalty and bans first, then temperature,
            then top-k, top-p and min-p, each of what the ones before have left.
        """
        sequence, position = rows // x.shape[1], rows % x.shape[1]
        logits = logits.float()
        if self.penal:
            there = present(x, settled, logits.shape[1])[sequence]
            logits = logits - there * self.penalty[sequence, None]
        if self.banning:
            logits = self._banned(logits, sequence, position)
        temperature = self.temperature[sequence]
        greedy = temperature == 0.0
        p = (logits / torch.where(greedy, 1.0, temperature)[:, None]).softmax(-1)
        if self.greedy:
            best = F.one_hot(logits.argmax(-1), logits.shape[1]).float()
            p = torch.where(greedy[:, None], best, p)
        if self.cutting:
            top_k, top_p, min_p = self.top_k[sequence], self.top_p[sequence], self.min_p[sequence]
            wanted = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
            # Rows that keep everything are left alone: to sort and divide would round them.
            p[wanted] = cut(p[wanted], top_k[wanted], top_p[wanted], min_p[wanted])
        return p

    def _banned(self, logits: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
        logits = logits.clone()
        for i in self.banning:
            bans = self.controls[i].bans
            assert bans is not None
            mine = (sequence == i).nonzero()[:, 0]
            which = bans.at.to(mine.device)[position[mine]]
            some = which >= 0
            out = bans.sets.to(mine.device)[which[some]]
            logits[mine[some]] = logits[mine[some]].masked_fill(out, -math.inf)
            for place, token in bans.pairs:
                logits[mine[position[mine] == place], token] = -math.inf
        return logits


def present(x: Tensor, settled: Tensor, vocab_size: int) -> Tensor:
    """Which tokens each sequence has where it is settled, bool, shape (B, V)."""
    tokens = torch.where(settled & (x < vocab_size), x, vocab_size)
    there = torch.zeros((len(x), vocab_size + 1), dtype=torch.bool, device=x.device)
    return there.scatter_(1, tokens, True)[:, :vocab_size]


def cut(p: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The likeliest tokens of each row, by number, then mass, then share of the best.

    Args:
        p: (N, V), rows summing to 1.
        top_k: int64, shape (N,); 0 keeps any number.
        top_p: in (0, 1], shape (N,).
        min_p: in [0, 1], shape (N,).

    Returns:
        (N, V), rows summing to 1, the likeliest token always kept.
    """
    ordered, order = p.sort(dim=-1, descending=True, stable=True)  # among equals as argmax
    rank = torch.arange(p.shape[1], device=p.device)
    outside = (top_k[:, None] > 0) & (rank >= top_k[:, None])
    left = ordered.masked_fill(outside, 0.0)
    left = left / left.sum(-1, keepdim=True)
    # Mass before this token already suffices; all of it, rounded, may not even be 1.
    outside |= (top_p[:, None] < 1.0) & (left.cumsum(-1) - left >= top_p[:, None])
    outside |= ordered < min_p[:, None] * ordered[:, :1]
    outside[:, 0] = False
    kept = p.masked_fill(outside.scatter(-1, order, outside), 0.0)
    return kept / kept.sum(-1, keepdim=True)
