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
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from fsdfm.flow.grid import SMALLEST_EXPONENT
from fsdfm.flow.path import Source
from fsdfm.flow.schedule import Polynomial, Schedule
from fsdfm.model import causal, transformer
from fsdfm.model.rotary import rotate
from fsdfm.model.transformer import FlowNetwork

Rule = Literal["exact", "published", "euler"]

BETAS, WEIGHT_DECAY, CLIP_NORM, EMA_DECAY = (0.9, 0.95), 0.03, 1.0, 0.9995
LATEST_TIME = 1.0 - 1e-3
"""Of pretraining: the rate is singular at 1."""


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products in dtype; float32 turns autocast off."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def reference_sample(
    model: FlowNetwork,
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
        y = jump(rule, logits, x, t.expand(batch), then.expand(batch), schedule, generator)
        x = settled(x, y, logits.shape[-1], model.config.absorbing)
    return x


def settled(x: Tensor, y: Tensor, vocab_size: int, absorbing: bool) -> Tensor:
    """Where a jump from x to y leads: with an absorbing source only masks move."""
    return torch.where(x == vocab_size, y, x) if absorbing else y


def whole_logits(model: FlowNetwork, x: Tensor, t: Tensor, h: Tensor) -> Tensor:
    """Logits of the data tokens at every position, float32, (B, L, V); t and h are (B,)."""
    with _usual_pieces():
        logits: Tensor = model(x, t.float(), h.float())
    return logits.float()[..., : model.config.vocab_size]


@contextlib.contextmanager
def _usual_pieces() -> Iterator[None]:
    """Attention, norms and activations as PyTorch has them, whatever stands in their place."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
        shared = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=shared)
        return y.transpose(1, 2).flatten(2)

    def modulated_rms(
        x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, dtype: torch.dtype
    ) -> Tensor:
        return torch.addcmul(
            bias[:, None], F.rms_norm(x, x.shape[-1:], eps=epsilon), weight[:, None]
        ).to(dtype)

    def swiglu(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(x.transpose(1, 2), cos, sin)

    pieces = (attend, modulated_rms, swiglu, turned)
    usual: dict[str, Any] = {piece.__name__: piece for piece in pieces}
    with (
        mock.patch.object(transformer, "attend", attend),
        mock.patch.multiple(causal, **usual),
    ):
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
    if rule == "published":
        there = x < p.shape[-1]  # a mask id is nowhere
        column = torch.where(there, x, 0)[..., None]
        weight = p.gather(-1, column)[..., 0]
        p_here = torch.where(there, weight, 0.0)
        a = torch.where(a < 1.0, -torch.expm1(torch.log1p(-a) * (1.0 - p_here)), a)
        whole = (then >= 1.0)[:, None] | (p_here >= 1.0) | ~there
        p.scatter_(-1, column, torch.where(whole, weight, 0.0)[..., None])  # p without x
    u = torch.rand(x.shape, generator=generator, device=x.device)
    return torch.where(u < a, categorical(p, generator), x)


def jump_chance(rule: Rule, t: Tensor, then: Tensor, schedule: Schedule) -> Tensor:
    """a(t, then), float64, (B,); exactly 1 on the last step."""
    if rule == "euler":
        return torch.where(then >= 1.0, 1.0, 1.0 - torch.exp(-(then - t) * schedule.rate(t)))
    return (schedule.kappa(then) - schedule.kappa(t)) / (1.0 - schedule.kappa(t))


def categorical(weights: Tensor, generator: torch.Generator) -> Tensor:
    """A token at every position, (B, L), from weights (B, L, V): the first whose sum passes u.

    In float64, of which float32 numbers clip rare tokens.
    """
    sums = weights.cumsum(-1, dtype=torch.float64)
    shape = (*weights.shape[:2], 1)
    u = torch.rand(shape, dtype=torch.float64, generator=generator, device=weights.device)
    return torch.searchsorted(sums, u * sums[..., -1:], right=True)[..., 0]


def reference_distill_loss(
    model: FlowNetwork,
    ema: FlowNetwork,
    teacher: FlowNetwork,
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
        target = rk4_logits(ema, x_t, t, h, schedule, generator, source.absorbing).softmax(-1)
    to_target = (torch.xlogy(target, target) - target * log_p).sum(-1)
    smallest = h == 2.0**-SMALLEST_EXPONENT
    return mean_of_counted(torch.where(smallest[:, None], path, to_target), x_t, source)


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
    ema: FlowNetwork,
    x_t: Tensor,
    t: Tensor,
    h: Tensor,
    schedule: Schedule,
    generator: torch.Generator,
    absorbing: bool,
) -> Tensor:
    """(l_1 + 2 l_2 + 2 l_3 + l_4) / 6 over three published half jumps, (B, L, V)."""
    half, middle = h / 2, t + h / 2
    l_1 = whole_logits(ema, x_t, t, half)

    def jumped(logits: Tensor, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        y = jump("published", logits, x, start, end, schedule, generator)
        return settled(x, y, logits.shape[-1], absorbing)

    def asked(x: Tensor, time: Tensor, before: Tensor) -> Tensor:
        logits = whole_logits(ema, x, time, half)
        # What has been revealed moves no more: the network has learned nothing about it.
        return (
            torch.where((x == logits.shape[-1])[..., None], logits, before) if absorbing else logits
        )

    x_1 = jumped(l_1, x_t, t, middle)
    l_2 = asked(x_1, middle, l_1)
    x_2 = jumped(l_2, x_1, middle, t + h)
    l_3 = asked(x_2, middle, l_2)
    x_3 = jumped(l_3, x_2, middle, t + h)
    l_4 = asked(x_3, t + h, l_3)
    return (l_1 + 2 * l_2 + 2 * l_3 + l_4) / 6


def pretrain_loss(
    model: FlowNetwork, x_1: Tensor, generator: torch.Generator, *, source: Source
) -> Tensor:
    """Cross-entropy at uniform times on the linear path, logits whole; nats a token."""
    t = torch.rand(x_1.shape[0], dtype=torch.float64, generator=generator, device=x_1.device)
    t = t.clamp_max(LATEST_TIME)
    x_0 = source.draw(tuple(x_1.shape), generator)
    u = torch.rand(x_1.shape, generator=generator, device=x_1.device)
    x_t = torch.where(u < t[:, None], x_1, x_0)
    h = torch.full_like(t, 2.0**-SMALLEST_EXPONENT)
    logits = whole_logits(model, x_t, t, h).flatten(0, 1)
    nats = F.cross_entropy(logits, x_1.flatten(), reduction="none").view_as(x_1)
    return mean_of_counted(nats, x_t, source)


def joint_loss(
    model: FlowNetwork, x_1: Tensor, generator: torch.Generator, *, source: Source
) -> Tensor:
    """Cross-entropy of a joint head at uniform times, half of the data known; nats a token.

    The body has no gradient. Every row passes the heads, and is weighed afterwards.
    """
    t = torch.rand(x_1.shape[0], dtype=torch.float64, generator=generator, device=x_1.device)
    t = t.clamp_max(LATEST_TIME)
    x_0 = source.draw(tuple(x_1.shape), generator)
    u = torch.rand(x_1.shape, generator=generator, device=x_1.device)
    x_t = torch.where(u < t[:, None], x_1, x_0)
    known = torch.rand(x_1.shape, generator=generator, device=x_1.device) < 0.5
    h = torch.full_like(t, 2.0**-SMALLEST_EXPONENT)
    with torch.no_grad(), _usual_pieces():
        hidden = model.body(x_t, t.float(), h.float()).flatten(0, 1)
    at = torch.arange(x_1.numel(), device=x_1.device)
    logits = model.head(model.told(hidden, at, x_1, known)).float()[:, : model.config.vocab_size]
    nats = F.cross_entropy(logits, x_1.flatten(), reduction="none").view_as(x_1)
    counted = ~known & (x_t == source.vocab_size if source.absorbing else True)
    return (nats * counted).sum() / counted.sum().clamp_min(1)


def mean_of_counted(nats: Tensor, x_t: Tensor, source: Source) -> Tensor:
    """Mean over (B, L); with an absorbing source over masks alone: all else is known."""
    if not source.absorbing:
        return nats.mean()
    counted = x_t == source.vocab_size
    return (nats * counted).sum() / counted.sum().clamp_min(1)


def plain_optimizer(model: FlowNetwork, learning_rate: float) -> torch.optim.AdamW:
    """AdamW as it comes."""
    return torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY
    )


def plain_update(
    loss: Tensor, model: FlowNetwork, ema: FlowNetwork, optimizer: torch.optim.Optimizer
) -> None:
    """Backward, clip, step, and the moving average, parameter by parameter."""
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
            average.mul_(EMA_DECAY).add_(parameter, alpha=1.0 - EMA_DECAY)
