"""Attention: PyTorch's own, but in bfloat16 on some CPUs, where plain products are faster.

Without AMX PyTorch's CPU kernel runs at a third of the rate of a bfloat16 product. Products over a
few heads at a time, with a softmax between them that stays in cache, take 12 ms instead of 21 for
1,024 positions of width 768 (AVX512-BF16, 2 threads), and with their gradients 45 instead of 62.
With AMX the kernel is the faster one (13.5 ms against 22.6, one thread), but not where gradients
are wanted: there they are equal.

Shapes: B sequences, H heads, G heads of keys (H a multiple of G), L positions, N of them that ask,
d width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fsdfm.core.device import has_tiles

SCORES_AT_ONCE = 2**21
"""Scores that exist at a time: 4 MB (or those of one head, where they are more)."""


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v.

    Heads that share keys are laid behind each other, as more rows that ask: no key is copied.

    Args:
        q: (B, H, N, d).
        k, v: (B, G, L, d).
        causal: whether a position sees only those up to itself; N is L then.

    Returns:
        (B, N, H d), heads side by side.
    """
    batch, heads, asking, width = q.shape
    plain = torch.compiler.is_compiling() or q.device.type != "cpu"
    bfloat16 = not plain and q.dtype == torch.bfloat16
    if causal or (bfloat16 and _has_tiles() and not torch.is_grad_enabled()):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    else:
        q = q.reshape(batch, k.shape[1], -1, width)
        kernel: Any = _Products.apply if bfloat16 else F.scaled_dot_product_attention
        y = kernel(q, k, v).view(batch, heads, asking, width)
    return y.transpose(1, 2).flatten(2)


_has_tiles = cache(has_tiles)


class _Products(torch.autograd.Function):
    """As products over groups of heads; the probabilities are computed again for the gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype)
        flat_q, flat_k, flat_v, flat_y = _flat(q * q.shape[-1] ** -0.5, k, v, y)
        for some in _groups(flat_q, flat_k):
            torch.bmm(_probabilities(flat_q[some], flat_k[some]), flat_v[some], out=flat_y[some])
        ctx.save_for_backward(q, k, v, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, y = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        inner = (grads[0].float() * y).sum(-1, keepdim=True).to(q.dtype)
        into = _flat(d_q, d_k, d_v)
        given = _flat(q * scale, k, v, grads[0], inner)
        for some in _groups(given[0], given[1]):
            (to_q, to_k, to_v), (q, k, v, d_y, mean) = (
                tuple(x[some] for x in each) for each in (into, given)
            )
            p = _probabilities(q, k)
            torch.bmm(p.transpose(1, 2), d_y, out=to_v)
            d_scores = torch.bmm(d_y, v.transpose(1, 2)).sub_(mean).mul_(p)
            torch.bmm(d_scores, k, out=to_q)
            torch.bmm(d_scores.transpose(1, 2), q, out=to_k)
        return d_q.mul_(scale), d_k, d_v


def _probabilities(q: Tensor, k: Tensor) -> Tensor:
    scores = torch.bmm(q, k.transpose(1, 2))
    return torch.softmax(scores, -1, out=scores)


def _flat(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, H, n, d) -> (B H, n, d), contiguous."""
    return tuple(x.contiguous().flatten(0, 1) for x in tensors)


def _groups(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Slices of the heads of all sequences, small enough for their scores to stay in cache."""
    count = max(1, SCORES_AT_ONCE // (q.shape[1] * k.shape[1]))
    for start in range(0, len(q), count):
        yield slice(start, start + count)
