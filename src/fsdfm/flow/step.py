"""One step of the sampler: who may move, and where a mover lands.

Every rule has the same two parts. A position is a *mover* with probability a, known before the
model's head is run; a mover's next token is then drawn from `land`. So

    P(next = y | x_t) = (1 - a) 1[y = x_t] + a land(p, x_t, a)(y),

and the head, the softmax and the draw are needed on movers alone.

Shapes: N rows (movers), F positions that are free to move, V data tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fsdfm.flow.schedule import Schedule, jump_probability

DRAW_BLOCK = 64


@dataclass(frozen=True, slots=True)
class StepRule:
    """How a state jumps from t to t + h with the posterior p held fixed."""

    name: str
    mover_probability: Callable[[Schedule, Tensor, Tensor], Tensor]
    """a(schedule, t, h): chance that a position may move; exactly 1 when t + h = 1."""
    land: Callable[[Tensor, Tensor, Tensor], Tensor]
    """land(p, x_t, a): next-token weights of movers; p (N, V), x_t (N,), a (N,) -> (N, V)."""


def _land_on_posterior(p: Tensor, x_t: Tensor, a: Tensor) -> Tensor:
    return p


def _euler_probability(schedule: Schedule, t: Tensor, h: Tensor) -> Tensor:
    """1 - exp(-h g(t)), but 1 on the last step, where the rate is frozen an instant before 1."""
    return torch.where(t + h >= 1.0, 1.0, -torch.expm1(-h * schedule.rate(t)))


def _land_published(p: Tensor, x_t: Tensor, a: Tensor) -> Tensor:
    """A mover leaves with probability pi / a, pi = 1 - (1 - a) ** (1 - p(x_t)), and never for x_t.

    So it stays with probability 1 - pi / a = (1 - a) ((1 - a) ** -p(x_t) - 1) / a.
    Where a = 1 (the last step) it lands on the whole of p instead.
    """
    at = x_t[:, None]
    known = at < p.shape[1]  # a mask id has p(x_t) = 0: nothing to exclude
    column = at.clamp_max(p.shape[1] - 1)
    stay_mass = torch.where(known, p.gather(1, column), 0.0)
    others = torch.where(known, p.scatter(1, column, 0.0), p)
    mass = others.sum(1, keepdim=True)
    # expm1 and log1p keep the digits of a small a; and p(x_t) = 0 gives exactly 0, never less.
    hazard = -torch.log1p(-a[:, None])
    stays = ((1.0 - a[:, None]) * torch.expm1(hazard * stay_mass) / a[:, None]).clamp_max(1.0)
    stays = torch.where(mass > 0.0, stays, 1.0)
    landing = torch.where(mass > 0.0, others * ((1.0 - stays) / mass), 0.0)
    landing = landing.scatter_add(1, column, stays)
    return torch.where(a[:, None] >= 1.0, p, landing)


EXACT = StepRule("exact", jump_probability, _land_on_posterior)
"""The solution of the token-wise chain with p held fixed: movers are drawn from p."""
PUBLISHED = StepRule("published", jump_probability, _land_published)
"""The update of FS-DFM, arXiv 2509.20624."""
EULER = StepRule("euler", _euler_probability, _land_on_posterior)
"""The baseline of the papers: as exact, with the rate frozen at the start of the step."""

STEP_RULES: dict[str, StepRule] = {rule.name: rule for rule in (EXACT, PUBLISHED, EULER)}


def transition(rule: StepRule, p: Tensor, x_t: Tensor, a: Tensor) -> Tensor:
    """The whole next-token distribution of one step; what `draw` on movers amounts to.

    Args:
        rule: the step rule.
        p: posterior, shape (N, V).
        x_t: current tokens, shape (N,); a mask id is V.
        a: mover probability, shape (N,).

    Returns:
        (N, V), rows summing to 1; to a, where x_t is a mask id, which stays with the rest.
    """
    vocab_size = p.shape[1]
    stay = F.one_hot(x_t, vocab_size + 1)[:, :vocab_size].to(p.dtype)
    return (1.0 - a[:, None]) * stay + a[:, None] * rule.land(p, x_t, a)


# Movers: a function of (free, a, u) -> which of F free positions may move.
Movers = Callable[[float, Tensor, float], Tensor]


def independent_movers(a: float, u: Tensor, offset: float) -> Tensor:
    """Each position on its own: u < a.

    Args:
        a: mover probability.
        u: one uniform number in [0, 1) for each free position, float64, shape (F,).
        offset: unused; systematic movers need it.

    Returns:
        bool, shape (F,).
    """
    return u < a


def systematic_movers(a: float, u: Tensor, offset: float) -> Tensor:
    """Exactly floor(a F) or ceil(a F) positions, each with marginal probability a.

    The positions with the smallest u move; the fraction of a F is rounded by one more uniform
    number, so that the expected count, and by symmetry each marginal, is exact.

    Args:
        a: mover probability.
        u: one uniform number in [0, 1) for each free position, float64, shape (F,).
        offset: one uniform number in [0, 1) that rounds a F.

    Returns:
        bool, shape (F,).

    Source: compare systematic hazard sampling, arXiv 2601.02799.
    """
    whole, fraction = divmod(a * len(u), 1.0)
    count = int(whole) + (offset < fraction)
    moves = torch.zeros(len(u), dtype=torch.bool, device=u.device)
    moves[u.argsort()[:count]] = True
    return moves


MOVERS: dict[str, Movers] = {
    "independent": independent_movers,
    "systematic": systematic_movers,
}


def sharpen(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """The posterior that is drawn from: softmax(logits / temperature), cut to its top_p nucleus.

    Args:
        logits: (N, V), any float dtype; taken to float32 first.
        temperature: positive; 0 puts all mass on the likeliest token.
        top_p: in (0, 1]; the smallest set of likeliest tokens with at least this mass is kept.

    Returns:
        p, float32, shape (N, V), rows summing to 1.
    """
    logits = logits.float()
    if temperature == 0.0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    p = (logits / temperature).softmax(-1)
    if top_p >= 1.0:
        return p
    ordered, order = p.sort(-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p  # mass before this token already suffices
    kept = p.masked_fill(outside.scatter(-1, order, outside), 0.0)
    return kept / kept.sum(-1, keepdim=True)


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """One token per row by inverse CDF, in two levels: a block of tokens, then one within it.

    Sums are float64: in float32 the tail of a peaked distribution over a large vocabulary is
    rounded away, which lowers the effective temperature. A token of weight 0 is never drawn.

    Args:
        weights: non-negative, not all zero in any row, shape (N, V); need not be normalised.
        u: uniform in [0, 1), float64, shape (N,).

    Returns:
        Token ids, int64, shape (N,).
    """
    blocks = F.pad(weights, (0, -weights.shape[1] % DRAW_BLOCK))
    blocks = blocks.view(len(weights), blocks.shape[1] // DRAW_BLOCK, DRAW_BLOCK)
    block, rest = _invert(blocks.sum(-1, dtype=torch.float64), u)
    rows = torch.arange(len(u), device=u.device)
    token, _ = _invert(blocks[rows, block].double(), rest)
    return block * DRAW_BLOCK + token


def _invert(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """First index whose cumulative weight exceeds u of the total, and u rescaled within it."""
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    target = u * total
    # u < 1 still rounds to target = total in rare cases; an equal sum is not "exceeded".
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    index = (cumulative <= target[:, None]).sum(-1)
    weight = weights.gather(1, index[:, None])[:, 0]
    before = cumulative.gather(1, index[:, None])[:, 0] - weight
    rest = ((target - before) / weight).clamp(0.0, 1.0)
    return index, rest


def advance(
    x_t: Tensor,
    movers: Tensor,
    posterior: Callable[[Tensor], Tensor],
    a: Tensor,
    u: Tensor,
    rule: StepRule = EXACT,
    chunk: int = 256,
) -> Tensor:
    """The state after one step. The posterior is asked for on exactly the movers.

    Args:
        x_t: current state, int64, shape (B, L).
        movers: which positions may move, bool, shape (B, L).
        posterior: rows (N,), indices into the flattened (B L) positions -> p, shape (N, V).
        a: mover probability of each sequence, shape (B,).
        u: uniform in [0, 1), float64, shape (B, L); one number decides where a mover lands.
        rule: the step rule.
        chunk: rows for which p exists at a time.

    Returns:
        The next state, int64, shape (B, L); x_t is left as it was.
    """
    length = x_t.shape[1]
    x, u_flat = x_t.flatten().clone(), u.flatten()
    for rows in torch.split(movers.flatten().nonzero()[:, 0], chunk):
        p = posterior(rows)
        weights = rule.land(p, x[rows], a[rows // length].to(p.dtype))
        x[rows] = draw(weights, u_flat[rows])
    return x.view_as(x_t)
