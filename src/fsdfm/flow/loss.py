"""Losses per position, the ELBO, and a mean over rows that never stores all logits.

Shapes: B sequences, L positions, N rows (some of the B L positions), D hidden, V data tokens.
All of them take bf16 logits to float32 first: near-equal rows in bf16 give negative divergences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fsdfm.flow.path import Source, mixture_state
from fsdfm.flow.schedule import Polynomial, Schedule

LATEST_TIME = 1.0 - 1e-3
"""Times are clipped here: the rate is singular at 1."""

RowLoss = Callable[[Tensor, slice], Tensor]
"""(logits of some rows (n, V), which rows) -> loss of each, (n,)."""


PositionLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(logits (N, V), x_t (N,), x_1 (N,), g (N,)) -> nats (N,)."""


class TrainableModel(Protocol):
    """What losses need of a network."""

    def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """States (B, L), times (B,), step sizes (B,) -> hidden rows (B, L, D)."""
        ...

    def head_parameters(self) -> tuple[Tensor, Tensor]:
        """Weight (V or V + 1, D) and bias of the linear head."""
        ...


def _precise(x: Tensor) -> Tensor:
    """As float32, or float64 where it is float64 already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def generalized_kl(logits: Tensor, x_t: Tensor, x_1: Tensor, g: Tensor) -> Tensor:
    """Divergence between the true and the model's jump rates at one position.

        -g [ p(x_t) - 1[x_t = x_1] + (1 - 1[x_t = x_1]) ln p(x_1) ]

    Args:
        logits: (N, V).
        x_t: current tokens, shape (N,); a mask id, V, has p = 0.
        x_1: data tokens, shape (N,).
        g: rate of jumping, shape (N,).

    Returns:
        Nats, shape (N,), at least 0.

    Source: FS-DFM, arXiv 2509.20624.
    """
    log_p = _precise(logits).log_softmax(-1)
    last = logits.shape[-1] - 1
    at = log_p.gather(-1, x_t.clamp_max(last)[:, None])[:, 0].exp()
    p_here = torch.where(x_t <= last, at, 0.0)
    log_p_data = log_p.gather(-1, x_1[:, None])[:, 0]
    done = x_t == x_1
    return g * torch.where(done, 1.0 - p_here, -p_here - log_p_data)


def cross_entropy(logits: Tensor, x_t: Tensor, x_1: Tensor, g: Tensor) -> Tensor:
    """-ln p(x_1), nats, shape (N,); arguments as for `generalized_kl`, x_t and g unused."""
    return F.cross_entropy(_precise(logits), x_1, reduction="none")


def kl(target: Tensor, logits: Tensor) -> Tensor:
    """KL(target || softmax(logits)) of each row, nats.

    Args:
        target: probabilities, shape (N, V), float32; no gradient flows into it.
        logits: (N, V).

    Returns:
        (N,).
    """
    log_target = torch.where(target > 0.0, target, 1.0).log()
    return (target * (log_target - _precise(logits).log_softmax(-1))).sum(-1)


class _RowsLoss(torch.autograd.Function):
    """Sum of row losses; the backward pass is done chunk by chunk inside the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, loss: RowLoss, chunk: int
    ) -> Tensor:
        total = _precise(hidden.new_zeros(()))
        d_hidden = torch.empty_like(hidden)
        d_weight, d_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            with torch.enable_grad():
                logits = _precise(F.linear(hidden[rows], weight, bias)).detach().requires_grad_()
                value = loss(logits, rows).sum()
                (d_logits,) = torch.autograd.grad(value, logits)
            total += value.detach()
            d_hidden[rows] = (d_logits @ weight).to(hidden.dtype)
            d_weight += d_logits.T @ hidden[rows]
            d_bias += d_logits.sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        (grad,) = grads
        return grad * d_hidden, grad * d_weight, grad * d_bias, None, None


POSITION_LOSSES: dict[str, PositionLoss] = {
    "generalized_kl": generalized_kl,
    "cross_entropy": cross_entropy,
}


def mean_over_rows(
    model: TrainableModel, hidden: Tensor, loss: RowLoss, vocab_size: int, chunk: int = 1024
) -> Tensor:
    """Mean of a row loss whose logits exist only `chunk` rows at a time.

    The gradient is exact; it is computed along with the value, so the (N, V) logits are made once
    and never stored.

    Args:
        model: owner of the head.
        hidden: final hidden rows, shape (N, D).
        loss: row loss; it sees the V columns of data tokens.
        vocab_size: V; a mask column is left out.
        chunk: rows at a time.

    Returns:
        Scalar, nats.
    """
    weight, bias = model.head_parameters()
    weight, bias = weight[:vocab_size], bias[:vocab_size]
    if not torch.is_grad_enabled():
        total = _precise(hidden.new_zeros(()))
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            total += loss(_precise(F.linear(hidden[rows], weight, bias)), rows).sum()
        return total / hidden.shape[0]
    summed: Tensor = _RowsLoss.apply(hidden, weight, bias, loss, chunk)  # type: ignore[no-untyped-call]
    return summed / hidden.shape[0]


@torch.no_grad()
def elbo_nats_per_token(
    model: TrainableModel,
    x_1: Tensor,
    source: Source,
    schedule: Schedule | None = None,
    *,
    h: float = 1.0 / 1024,
    times: int = 16,
    seed: int = 0,
) -> Iterator[float]:
    """Upper bound on the negative log-likelihood, one estimate for each time.

    The mean of what is yielded is the estimate; the times are stratified over [0, 1).

    Args:
        model: the posterior.
        x_1: data, int64, shape (B, L).
        source: where x_0 comes from.
        schedule: kappa; linear if not given.
        h: step size shown to a step-aware network.
        times: number of times, and of model calls.
        seed: of the noise.

    Yields:
        Nats a token at one time.

    Source: Discrete Flow Matching, arXiv 2407.15595; the bound holds up to the clip at 0.999.
    """
    schedule = schedule or Polynomial()
    generator = torch.Generator(x_1.device).manual_seed(seed)
    batch, length = x_1.shape
    for k in range(times):
        # Shuffled and jittered: midpoints in order would tie each sequence to its own times.
        jitter = torch.rand(batch, dtype=torch.float64, generator=generator, device=x_1.device)
        order = torch.randperm(batch, generator=generator, device=x_1.device)
        t = ((k + (order + jitter) / batch) / times).clamp_max(LATEST_TIME)
        x_t = mixture_state(source.draw((batch, length), generator), x_1, t, schedule, generator)
        loss = path_loss(model, x_t, x_1, t, torch.full_like(t, h), source.vocab_size, schedule)
        yield float(loss)


def path_loss(
    model: TrainableModel,
    x_t: Tensor,
    x_1: Tensor,
    t: Tensor,
    h: Tensor,
    vocab_size: int,
    schedule: Schedule,
    position_loss: PositionLoss = generalized_kl,
) -> Tensor:
    """Mean loss of a batch on the path.

    Args:
        model: the posterior.
        x_t, x_1: state and data, int64, shape (B, L).
        t: times, shape (B,), at most LATEST_TIME.
        h: step sizes shown to the network, shape (B,).
        vocab_size: V.
        schedule: kappa.
        position_loss: generalized KL, or cross-entropy.

    Returns:
        Scalar, nats a token.
    """
    hidden = model.body(x_t, t.float(), h.float()).flatten(0, 1)
    g = schedule.rate(t.double()).float().repeat_interleave(x_t.shape[1])
    at, data = x_t.flatten(), x_1.flatten()
    return mean_over_rows(
        model,
        hidden,
        lambda logits, rows: position_loss(logits, at[rows], data[rows], g[rows]),
        vocab_size,
    )
