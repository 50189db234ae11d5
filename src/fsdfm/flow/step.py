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
"""Tokens whose weights are summed before a draw looks at them one by one."""
CPU_LOGITS, OTHER_LOGITS = 2**23, 2**28
"""Logits that exist at a time on a CPU, and on any other device."""
CPU_WEIGHTS, OTHER_WEIGHTS = 2**19, 2**26
"""Weights that are drawn from at a time: on a CPU their several copies stay in its cache."""


@dataclass(frozen=True, slots=True)
class StepRule:
    """How a state jumps from t to t + h with the posterior p held fixed."""

    name: str
    mover_probability: Callable[[Schedule, Tensor, Tensor], Tensor]
    """a(schedule, t, h): chance that a position may move; exactly 1 when t + h = 1."""
    land: Callable[[Tensor, Tensor, Tensor], Tensor]
    """land(p, x_t, a): next-token weights of movers; p (N, V), x_t (N,), a (N,) -> (N, V)."""
    redraws: bool = True
    """Whether every mover lands on a fresh draw from p: none may stay for being where it was."""


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
PUBLISHED = StepRule("published", jump_probability, _land_published, redraws=False)
"""The update of FS-DFM, arXiv 2509.20624."""
EULER = StepRule("euler", _euler_probability, _land_on_posterior)
"""The baseline of the papers: as exact, with the rate frozen at the start of the step."""

STEP_RULES: dict[str, StepRule] = {"exact": EXACT, "published": PUBLISHED, "euler": EULER}
"""By their own names, which are written out so that help can read them without torch."""


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


Movers = Callable[[float, Tensor, Tensor, Tensor], Tensor]
"""(a, u (B, L), free (B, L), offset (B,)) -> which positions may move, bool, (B, L)."""


def independent_movers(a: float, u: Tensor, free: Tensor, offset: Tensor) -> Tensor:
    """Each free position on its own: u < a.

    Args:
        a: mover probability.
        u: uniform in [0, 1), float64, shape (B, L).
        free: positions that are not frozen, bool, shape (B, L).
        offset: unused; systematic movers need it.

    Returns:
        bool, shape (B, L).
    """
    return free & (u < a)


def systematic_movers(a: float, u: Tensor, free: Tensor, offset: Tensor) -> Tensor:
    """Exactly floor(a F) or ceil(a F) of a sequence's F free positions, each with probability a.

    The positions with the smallest u move; the fraction of a F is rounded by one more uniform
    number, so that the expected count, and by symmetry each marginal, is exact.

    Args:
        a: mover probability.
        u: uniform in [0, 1), float64, shape (B, L).
        free: positions that are not frozen, bool, shape (B, L).
        offset: uniform in [0, 1), one for each sequence, rounds a F; shape (B,).

    Returns:
        bool, shape (B, L).

    Source: compare systematic hazard sampling, arXiv 2601.02799.
    """
    expected = a * free.sum(1, dtype=torch.float64)
    count = expected.floor() + (offset < expected.frac())
    order = u.masked_fill(~free, 2.0).argsort(1)
    first = torch.arange(u.shape[1], device=u.device) < count[:, None]
    return torch.zeros_like(free).scatter(1, order, first)


MOVERS: dict[str, Movers] = {
    "independent": independent_movers,
    "systematic": systematic_movers,
}


def sharpen(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The posterior at a temperature, softmax(logits / temperature).

    Args:
        logits: (N, V), any float dtype; taken to float32 first.
        temperature: positive; 0 puts all mass on the likeliest token.

    Returns:
        p, float32, shape (N, V), rows summing to 1.
    """
    logits = logits.float()
    if temperature == 0.0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return (logits / temperature).softmax(-1)


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """One token per row by inverse CDF, in two levels: a block of tokens, then one within it.

    Sums are in the format of u. For texts that is float64: in float32 the tail of a peaked
    distribution over a large vocabulary is rounded away, which lowers the effective temperature.
    A token of weight 0 is never drawn in either.

    Args:
        weights: non-negative, not all zero in any row, shape (N, V); need not be normalised.
        u: uniform in [0, 1), float64 or float32, shape (N,); 1 counts as just below.

    Returns:
        Token ids, int64, shape (N,).
    """
    whole = weights.shape[1] // DRAW_BLOCK * DRAW_BLOCK
    blocks = weights[:, :whole].reshape(len(weights), whole // DRAW_BLOCK, DRAW_BLOCK)
    blocks = blocks.sum(-1, dtype=u.dtype)
    tail = weights[:, whole:].sum(-1, keepdim=True, dtype=u.dtype)
    block, rest = _invert(torch.cat((blocks, tail), -1), u)
    # The columns of the block that was drawn; those past the end get no weight.
    column = block[:, None] * DRAW_BLOCK + torch.arange(DRAW_BLOCK, device=u.device)
    inside = column < weights.shape[1]
    within = weights.gather(1, column.clamp_max(weights.shape[1] - 1)).to(u.dtype)
    token, _ = _invert(torch.where(inside, within, 0.0), rest)
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
    rows: Tensor,
    logits: Callable[[slice], Tensor],
    a: Tensor,
    u: Tensor,
    rule: StepRule = EXACT,
    sharpening: Callable[[Tensor], Tensor] = sharpen,
    *,
    vocab_size: int,
) -> Tensor:
    """The state after one step in which `rows` move, each on its own.

    Args:
        x_t: current state, int64, shape (B, L).
        rows: the movers, indices into the B L positions, int64, shape (N,).
        logits, a, u, rule, sharpening, vocab_size: see `landed`.

    Returns:
        The next state, int64, shape (B, L); x_t is left as it was.
    """
    x = x_t.flatten()
    tokens = landed(x[rows], logits, a, u, rule, sharpening, vocab_size=vocab_size)
    return x.index_copy(0, rows, tokens).view_as(x_t)


def landed(
    at: Tensor,
    logits: Callable[[slice], Tensor],
    a: Tensor,
    u: Tensor,
    rule: StepRule = EXACT,
    sharpening: Callable[[Tensor], Tensor] = sharpen,
    *,
    vocab_size: int,
) -> Tensor:
    """Where movers land. Logits are asked for on exactly them, few at a time.

    Args:
        at: the movers' tokens, int64, shape (N,).
        logits: some of the movers, as a slice of them -> (n, V).
        a: mover probability of each mover, shape (N,).
        u: uniform in [0, 1), shape (N,), in the format to draw in; one number decides where a
            mover lands.
        rule: the step rule.
        sharpening: logits (n, V) -> the posterior to draw from, float32.
        vocab_size: V.

    Returns:
        Their next tokens, int64, shape (N,).
    """
    tokens, cpu = at.clone(), at.device.type == "cpu"
    chunk = max(1, (CPU_LOGITS if cpu else OTHER_LOGITS) // vocab_size)
    some = max(1, (CPU_WEIGHTS if cpu else OTHER_WEIGHTS) // vocab_size)
    for start in range(0, len(at), chunk):
        block = logits(slice(start, start + chunk))
        for first in range(0, len(block), some):
            part = slice(start + first, start + min(first + some, len(block)))
            p = sharpening(block[first : first + some])
            tokens[part] = draw(rule.land(p, at[part], a[part].to(p.dtype)), u[part])
    return tokens
