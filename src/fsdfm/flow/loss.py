"""Losses per position, the ELBO, and a mean over rows that never stores all logits.

Shapes: B sequences, L positions, N rows (some of the B L positions), D hidden, V data tokens.
All of them take bf16 logits to float32 first: near-equal rows in bf16 give negative divergences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fsdfm.flow.grid import SMALLEST_STEP
from fsdfm.flow.host import seeded, send
from fsdfm.flow.path import Batch, Source, mixed, shown
from fsdfm.flow.posterior import JointHead
from fsdfm.flow.schedule import Polynomial, Schedule

LATEST_TIME = 1.0 - 1e-3
"""Times are clipped here: the rate is singular at 1."""

GOLDEN = (5.0**0.5 - 1.0) / 2.0
"""Multiples of it fill [0, 1) evenly, however many there are."""

CPU_CHUNK, OTHER_CHUNK = 2**25, 2**28
"""Logits that exist at a time on a CPU, and on any other device."""
CPU_PIECE, OTHER_PIECE = 2**20, 2**26
"""Logits that are taken to float32 at a time: on a CPU, what is made of them stays in its cache."""

RowLoss = Callable[[Tensor, slice], Tensor]
"""(logits of some rows (n, V), float32; which rows of their chunk) -> loss of each, (n,)."""
ChunkLoss = Callable[[slice], RowLoss]
"""Which rows -> their loss; called once for each chunk, to prepare what all its rows need."""


PositionLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(logits (N, V), x_t (N,), x_1 (N,), g (N,)) -> nats (N,)."""


Divergence = Callable[[Tensor, Tensor], Tensor]
"""(target probabilities (N, V), logits (N, V)) -> nats of each row (N,)."""


class TrainableModel(JointHead, Protocol):
    """What losses need of a network."""

    def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """States (B, L), times (B,), step sizes (B,) -> hidden rows (B, L, D)."""
        ...

    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V or V + 1, D) of the linear head, and its bias, if it has one."""
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
    last = logits.shape[-1] - 1
    log_p = _precise(logits.detach()).log_softmax(-1)
    here, data = x_t.clamp_max(last), x_1
    p_here = torch.where(x_t <= last, _at(log_p, here).exp(), 0.0)
    done = x_t == x_1
    nats = g * torch.where(done, 1.0 - p_here, -p_here - _at(log_p, data))
    # d p(k) = p(k) (1[k] - p) and d ln p(k) = 1[k] - p, both in the logits.
    still = torch.where(done, 0.0, g)
    spikes = torch.stack((here, data), 1), torch.stack((-g * p_here, -still), 1)
    return _SoftmaxLoss.apply(logits, log_p, nats, g * p_here + still, *spikes)  # type: ignore[no-any-return, no-untyped-call]


def cross_entropy(logits: Tensor, x_t: Tensor, x_1: Tensor, g: Tensor) -> Tensor:
    """-ln p(x_1), nats, shape (N,); arguments as for `generalized_kl`, x_t and g unused."""
    log_p = _precise(logits.detach()).log_softmax(-1)
    nats, one = -_at(log_p, x_1), log_p.new_ones(len(x_1))
    return _SoftmaxLoss.apply(logits, log_p, nats, one, x_1[:, None], -one[:, None])  # type: ignore[no-any-return, no-untyped-call]


def kl(target: Tensor, logits: Tensor) -> Tensor:
    """KL(target || softmax(logits)) of each row, nats.

    Args:
        target: probabilities, shape (N, V), float32; no gradient flows into it.
        logits: (N, V).

    Returns:
        (N,).
    """
    log_p = _precise(logits.detach()).log_softmax(-1)
    # The clamp keeps 0 ln 0 at 0; the difference first, or near-equal rows lose their digits.
    log_target = target.clamp_min(torch.finfo(target.dtype).tiny).log_()
    nats = log_target.sub_(log_p).mul_(target).sum(-1)
    return _SoftmaxLoss.apply(logits, log_p, nats, target.sum(-1), None, target)  # type: ignore[no-any-return, no-untyped-call]


def _at(log_p: Tensor, index: Tensor) -> Tensor:
    return log_p.gather(-1, index[:, None])[:, 0]


class _SoftmaxLoss(torch.autograd.Function):
    """A loss whose gradient in the logits is mass p + spikes, in as few passes as that takes.

    `spikes` are the values at the places (N, k); without places, minus a whole row (N, V).
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        log_p: Tensor,
        nats: Tensor,
        mass: Tensor,
        places: Tensor | None,
        spikes: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(log_p, mass, places, spikes)
        ctx.dtype = logits.dtype
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        log_p, mass, places, spikes = ctx.saved_tensors
        grad = grads[0][:, None]
        slope = log_p.exp().mul_(mass[:, None] * grad)
        if places is None:
            slope.addcmul_(spikes, grad, value=-1.0)
        else:
            slope.scatter_add_(1, places, (spikes * grad).to(slope.dtype))
        return slope.to(ctx.dtype), None, None, None, None, None


class _RowsLoss(torch.autograd.Function):
    """Sum of row losses; the backward pass is done chunk by chunk inside the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, loss: ChunkLoss
    ) -> Tensor:
        total = _precise(hidden.new_zeros(()))
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        d_bias = None if bias is None else torch.zeros_like(bias)
        for rows, logits, pieces in _chunks(hidden, weight, bias):
            row_loss = loss(rows)
            for piece in pieces:
                with torch.enable_grad():
                    some = _precise(logits[piece]).detach().requires_grad_()
                    value = row_loss(some, piece).sum()
                    (slope,) = torch.autograd.grad(value, some)
                total += value.detach()
                logits[piece] = slope  # in the place of the logits, in the format of the products
            d_hidden[rows] = (logits @ weight).to(hidden.dtype)
            d_weight += logits.T @ hidden[rows]
            if d_bias is not None:
                d_bias += logits.sum(0, dtype=d_bias.dtype)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        (grad,) = grads
        return grad * d_hidden, grad * d_weight, None if d_bias is None else grad * d_bias, None


def _chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> Iterator[tuple[slice, Tensor, list[slice]]]:
    """Rows, their logits (n, V), and the pieces of the chunk to take to float32 at a time."""
    cpu, columns = hidden.device.type == "cpu", len(weight)
    chunk = max(1, (CPU_CHUNK if cpu else OTHER_CHUNK) // columns)
    some = max(1, (CPU_PIECE if cpu else OTHER_PIECE) // columns)
    for start in range(0, len(hidden), chunk):
        rows = slice(start, min(start + chunk, len(hidden)))
        count = rows.stop - start
        pieces = [slice(i, min(i + some, count)) for i in range(0, count, some)]
        yield rows, F.linear(hidden[rows], weight, bias), pieces


POSITION_LOSSES: dict[str, PositionLoss] = {
    "generalized_kl": generalized_kl,
    "cross_entropy": cross_entropy,
}


def mean_over_rows(
    model: TrainableModel, hidden: Tensor, loss: ChunkLoss, vocab_size: int
) -> Tensor:
    """Mean of a row loss; few rows' logits exist at a time.

    The gradient is exact; it is computed along with the value, so the (N, V) logits are made once
    and never stored.

    Args:
        model: owner of the head.
        hidden: final hidden rows, shape (N, D).
        loss: of rows; it sees the V columns of data tokens.
        vocab_size: V; a mask column is left out.

    Returns:
        Scalar, nats; 0 where there are no rows.
    """
    weight, bias = model.head_parameters()
    weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
    if torch.is_grad_enabled():
        total: Tensor = _RowsLoss.apply(hidden, weight, bias, loss)  # type: ignore[no-untyped-call]
    else:
        total = _precise(hidden.new_zeros(()))
        for rows, logits, pieces in _chunks(hidden, weight, bias):
            row_loss = loss(rows)
            for piece in pieces:
                total += row_loss(_precise(logits[piece]), piece).sum()
    return total / max(1, hidden.shape[0])


@torch.no_grad()
def elbo_nats_per_token(
    model: TrainableModel,
    x_1: Tensor,
    source: Source,
    schedule: Schedule | None = None,
    *,
    h: float = SMALLEST_STEP,
    times: int = 16,
    seed: int = 0,
    first: int = 0,
) -> Iterator[float]:
    """Upper bound on the negative log-likelihood, one estimate for each time.

    The mean of what is yielded is the estimate. A sequence's noise depends on the seed and on its
    number alone, so batches of any size give the same.

    Times near 1 are drawn more often, and count less: t = 1 - (1 - s) ** 2 with weight 2 (1 - s).
    There few positions are hidden, and each counts 1 / (1 - t). A sequence has one s in each of
    `times` equal parts of [0, 1), at a place that differs between sequences as evenly as can be.

    Over seeds the standard deviation is about 8 nats / sqrt(times x tokens) (bundled model, text;
    13 with even times), so 0.01 nats cost 0.6 M tokens forward.

    Args:
        model: the posterior.
        x_1: data, int64, shape (B, L), on the model's device.
        source: where x_0 comes from.
        schedule: kappa; linear if not given.
        h: step size shown to a step-aware network.
        times: number of times, and of model calls.
        seed: of the noise, at least 0.
        first: number of the first sequence; the others follow.

    Yields:
        Nats a token at one time.

    Source: Discrete Flow Matching, arXiv 2407.15595; the bound holds up to the clip at 0.999.
    """
    schedule = schedule or Polynomial()
    length, numbers = x_1.shape[1], range(first, first + len(x_1))
    generators = [seeded(seed, number) for number in numbers]
    places = torch.rand(times, dtype=torch.float64, generator=seeded(seed))
    shifts = torch.tensor([number * GOLDEN % 1.0 for number in numbers], dtype=torch.float64)
    for k in range(times):
        left = 1.0 - (k + (places[k] + shifts) % 1.0) / times
        t = (1.0 - left**2).clamp_max(LATEST_TIME)
        x_0 = torch.stack([source.draw((length,), g) for g in generators])
        data = torch.cat(
            [shown(t[i : i + 1], length, schedule, g) for i, g in enumerate(generators)]
        )
        batch = mixed(x_0, x_1, data, t, torch.full_like(t, h), source)
        share = len(batch.places) / x_1.numel()
        if share == 0.0:
            yield 0.0
            continue
        loss = path_loss(model, batch, source.vocab_size, schedule, weight=2.0 * left)
        yield share * float(loss)


def hidden_rows(model: TrainableModel, batch: Batch) -> Tensor:
    """Hidden rows of all positions, (B L, D)."""
    t, h = (send(each.float(), batch.x_t.device) for each in (batch.t, batch.h))
    return model.body(batch.x_t, t, h).flatten(0, 1)


def told_rows(model: TrainableModel, batch: Batch) -> Tensor:
    """Hidden rows of the positions that count, told what is known beside them, (N, D).

    With a joint head that is another function than its plain rows, even where nothing is known:
    training always passes through it.
    """
    hidden, device = hidden_rows(model, batch), batch.x_t.device
    at = send(batch.places, device)
    if batch.counted is not None:
        hidden = hidden.index_select(0, at)
    return model.told(hidden, at, batch.x_t, send(batch.known, device))


def path_loss(
    model: TrainableModel,
    batch: Batch,
    vocab_size: int,
    schedule: Schedule,
    position_loss: PositionLoss = generalized_kl,
    *,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean loss on the path.

    Args:
        model: the posterior.
        batch: states, times (at most LATEST_TIME) and data.
        vocab_size: V.
        schedule: kappa.
        position_loss: generalized KL, or cross-entropy.
        weight: of each sequence, multiplies its rate of jumping, shape (B,), on the CPU.

    Returns:
        Scalar, nats for each position that counts; 0 where none does.
    """
    rows, g = told_rows(model, batch), schedule.rate(batch.t)
    if weight is not None:
        g = g * weight
    return mean_over_positions(model, rows, batch, batch.places, g, vocab_size, position_loss)


def mean_over_positions(
    model: TrainableModel,
    rows: Tensor,
    batch: Batch,
    places: Tensor,
    g: Tensor,
    vocab_size: int,
    position_loss: PositionLoss,
) -> Tensor:
    """Mean of a position loss over some of the B L positions.

    Args:
        model: owner of the head.
        rows: hidden rows, (N, D).
        batch: their states, times and data.
        places: which positions they are, int64, (N,), on the CPU.
        g: rate of jumping of each sequence, shape (B,), on the CPU.
        vocab_size: V.
        position_loss: of each row.

    Returns:
        Scalar, nats.
    """
    device = rows.device
    at = send(places, device)
    here, data = (x.flatten().index_select(0, at) for x in (batch.x_t, batch.x_1))
    rates = send(g.float()[places // batch.x_t.shape[1]], device)

    def loss(part: slice) -> RowLoss:
        a, b, rate = here[part], data[part], rates[part]
        return lambda logits, piece: position_loss(logits, a[piece], b[piece], rate[piece])

    return mean_over_rows(model, rows, loss, vocab_size)
