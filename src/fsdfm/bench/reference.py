"""The published sampler and recipes, as anyone would write them from the formulas.

What the project's own speed is measured against: every tensor is whole, every row is computed, and
nothing here is shared with the code it is compared with but the network's layers and the schedule.

Shapes: B sequences, L positions, V data tokens.

Source: FS-DFM, arXiv 2509.20624, and Discrete Flow Matching, arXiv 2407.15595.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Literal
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from fsdfm.flow.grid import SMALLEST_EXPONENT
from fsdfm.flow.path import Source
from fsdfm.flow.schedule import Polynomial, Schedule
from fsdfm.model import transformer
from fsdfm.model.transformer import Transformer

Rule = Literal["exact", "published", "euler"]

BETAS, WEIGHT_DECAY, CLIP_NORM, EMA_DECAY = (0.9, 0.95), 0.03, 1.0, 0.9995
LATEST_TIME = 1.0 - 1e-3
"""Of pretraining: the rate is singular at 1."""


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in dtype; float32 turns autocast off."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def reference_sample(
    model: Transformer,
    x_0: Tensor,
    steps: int,
    rule: Rule,
    generator: torch.Generator,
    *,
    schedule: Schedule | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Walk x_0 over an even grid.

    Args:
        model: the posterior.
        x_0: start, int64, shape (B, L).
        steps: the budget N.
        rule: how a state jumps.
        generator: the only source of randomness, on the device of x_0.
        schedule: kappa; linear if not given.
        dtype: of the network's matrix products; all else is float32.

    Returns:
        Tokens, int64, shape (B, L).
    """
    schedule, x, batch = schedule or Polynomial(), x_0, x_0.shape[0]
    times = torch.arange(steps + 1, dtype=torch.float64, device=x.device) / steps
    for t, then in itertools.pairwise(times):
        with autocast(x.device, dtype):
            logits = whole_logits(model, x, t.expand(batch), (then - t).expand(batch))
        x = jump(rule, logits, x, t.expand(batch), then.expand(batch), schedule, generator)
    return x


def whole_logits(model: Transformer, x: Tensor, t: Tensor, h: Tensor) -> Tensor:
    """Logits of the data tokens at every position, float32, (B, L, V); t and h are (B,)."""
    with _usual_attention():
        logits: Tensor = model(x, t.float(), h.float())
    return logits.float()[..., : model.config.vocab_size]


@contextlib.contextmanager
def _usual_attention() -> Iterator[None]:
    """PyTorch's own attention in the network, whatever the project has in its place."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    with mock.patch.object(transformer, "attend", attend):
        yield


def jump(
    rule: Rule,
    logits: Tensor,
    x: Tensor,
    t: Tensor,
    then: Tensor,
    schedule: Schedule,
    generator: torch.Generator,
) -> Tensor:
    """The state at `then`, from the state x at t, with the posterior held fixed.

    published: leave with probability 1 - (1 - a) ** (1 - p(x)), for p without x, renormalised;
    exact: leave with probability a, for p; Euler: with 1 - exp(-(then - t) g(t)), for p.
    The last step, then = 1, draws from the whole of p in every rule.

    Args:
        rule: which of these.
        logits: float32, shape (B, L, V).
        x: state, int64, shape (B, L).
        t, then: times of each sequence, float64, shape (B,).
        schedule: kappa.
        generator: source of randomness.

    Returns:
        int64, shape (B, L).
    """
    p = logits.softmax(-1)
    a = jump_chance(rule, t, then, schedule).to(p.dtype)[:, None].expand(x.shape)
    landing = p
    if rule == "published":
        vocab_size = p.shape[-1]
        here = F.one_hot(x, vocab_size + 1)[..., :vocab_size].to(p.dtype)  # a mask id is nowhere
        landing = p * (1.0 - here)
        a = torch.where(a < 1.0, -torch.expm1(torch.log1p(-a) * (1.0 - (p * here).sum(-1))), a)
        whole = (then >= 1.0)[:, None] | (landing.sum(-1) == 0.0)
        landing = torch.where(whole[..., None], p, landing)
    u = torch.rand(x.shape, generator=generator, device=x.device)
    return torch.where(u < a, categorical(landing, generator), x)


def jump_chance(rule: Rule, t: Tensor, then: Tensor, schedule: Schedule) -> Tensor:
    """a(t, then), float64, (B,); exactly 1 on the last step."""
    if rule == "euler":
        return torch.where(then >= 1.0, 1.0, 1.0 - torch.exp(-(then - t) * schedule.rate(t)))
    return (schedule.kappa(then) - schedule.kappa(t)) / (1.0 - schedule.kappa(t))


def categorical(weights: Tensor, generator: torch.Generator) -> Tensor:
    """A token at every position, (B, L), from weights (B, L, V); drawn in float64."""
    flat = weights.flatten(0, 1).double()
    return torch.multinomial(flat, 1, generator=generator).view(weights.shape[:2])


def reference_distill_loss(
    model: Transformer,
    ema: Transformer,
    teacher: Transformer,
    x_1: Tensor,
    generator: torch.Generator,
    *,
    source: Source,
    schedule: Schedule | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """The published distillation loss of a batch, every branch computed for every row.

    Args:
        model: the student.
        ema: its moving average, which makes the targets.
        teacher: the pretrained network; the published loop calls it on every batch.
        x_1: data, int64, shape (B, L).
        generator: the only source of randomness, on the device of x_1.
        source: where x_0 comes from.
        schedule: kappa; linear if not given.
        weights: chance of h = 1, 1/2, ..., 1/1024, shape (11,); proportional to 1 / h if not given.

    Returns:
        Scalar, nats a token.
    """
    schedule = schedule or Polynomial()
    if weights is None:
        weights = 2.0 ** torch.arange(SMALLEST_EXPONENT + 1)
    batch, device = x_1.shape[0], x_1.device
    exponent = torch.multinomial(weights.to(device), batch, True, generator=generator)
    h = 2.0 ** -exponent.double()
    cells = 2**SMALLEST_EXPONENT
    u = torch.rand(batch, dtype=torch.float64, generator=generator, device=device)
    t = (u * (cells * (1.0 - h) + 1.0)).floor() / cells
    x_0 = source.draw(tuple(x_1.shape), generator)
    u = torch.rand(x_1.shape, generator=generator, device=device)
    x_t = torch.where(u < schedule.kappa(t)[:, None], x_1, x_0)

    log_p = whole_logits(model, x_t, t, h).log_softmax(-1)
    path = generalized_kl(log_p, x_t, x_1, schedule.rate(t).float())
    with torch.no_grad():
        whole_logits(teacher, x_t, t, h)
        target = rk4_logits(ema, x_t, t, h, schedule, generator).softmax(-1)
    to_target = (torch.xlogy(target, target) - target * log_p).sum(-1)
    smallest = h == 2.0**-SMALLEST_EXPONENT
    return torch.where(smallest[:, None], path, to_target).mean()


def generalized_kl(log_p: Tensor, x_t: Tensor, x_1: Tensor, g: Tensor) -> Tensor:
    """-g [p(x_t) - 1[x_t = x_1] + (1 - 1[x_t = x_1]) ln p(x_1)] at every position, (B, L).

    Args:
        log_p: float32, shape (B, L, V).
        x_t, x_1: state and data, shape (B, L); a mask id has p = 0.
        g: rate of jumping, shape (B,).
    """
    vocab_size = log_p.shape[-1]
    here = F.one_hot(x_t, vocab_size + 1)[..., :vocab_size]
    p_here = (log_p.exp() * here).sum(-1)
    log_p_data = log_p.gather(-1, x_1[..., None])[..., 0]
    done = (x_t == x_1).float()
    return -g[:, None] * (p_here - done + (1.0 - done) * log_p_data)


def rk4_logits(
    ema: Transformer,
    x_t: Tensor,
    t: Tensor,
    h: Tensor,
    schedule: Schedule,
    generator: torch.Generator,
) -> Tensor:
    """(l_1 + 2 l_2 + 2 l_3 + l_4) / 6 over three published half jumps, (B, L, V)."""
    half, middle = h / 2, t + h / 2
    l_1 = whole_logits(ema, x_t, t, half)
    x_1 = jump("published", l_1, x_t, t, middle, schedule, generator)
    l_2 = whole_logits(ema, x_1, middle, half)
    x_2 = jump("published", l_2, x_1, middle, t + h, schedule, generator)
    l_3 = whole_logits(ema, x_2, middle, half)
    x_3 = jump("published", l_3, x_2, middle, t + h, schedule, generator)
    l_4 = whole_logits(ema, x_3, t + h, half)
    return (l_1 + 2 * l_2 + 2 * l_3 + l_4) / 6


def pretrain_loss(
    model: Transformer, x_1: Tensor, generator: torch.Generator, *, source: Source
) -> Tensor:
    """Cross-entropy at uniform times on the linear path, logits whole; nats a token."""
    t = torch.rand(x_1.shape[0], dtype=torch.float64, generator=generator, device=x_1.device)
    t = t.clamp_max(LATEST_TIME)
    x_0 = source.draw(tuple(x_1.shape), generator)
    u = torch.rand(x_1.shape, generator=generator, device=x_1.device)
    x_t = torch.where(u < t[:, None], x_1, x_0)
    h = torch.full_like(t, 2.0**-SMALLEST_EXPONENT)
    return F.cross_entropy(whole_logits(model, x_t, t, h).flatten(0, 1), x_1.flatten())


def plain_optimizer(model: Transformer, learning_rate: float) -> torch.optim.AdamW:
    """AdamW as it comes."""
    return torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY
    )


def plain_update(
    loss: Tensor, model: Transformer, ema: Transformer, optimizer: torch.optim.Optimizer
) -> None:
    """Backward, clip, step, and the moving average, parameter by parameter."""
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
            average.mul_(EMA_DECAY).add_(parameter, alpha=1.0 - EMA_DECAY)
