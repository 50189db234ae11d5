"""How far samples are from a known law: plug-in divergences of their 3-grams, with errors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fsdfm.study.chain import Chain

RESAMPLES = 50
"""Of the bootstrap over samples."""


def trigram_counts(x: Tensor, symbols: int) -> Tensor:
    """How often each 3-gram occurs in each sequence, float64, shape (count, V ** 3)."""
    grams = (x[:, :-2] * symbols + x[:, 1:-1]) * symbols + x[:, 2:]
    counts = torch.zeros(len(x), symbols**3, dtype=torch.float64)
    return counts.scatter_add_(1, grams, torch.ones_like(grams, dtype=torch.float64))


def trigram_figures(counts: Tensor, law: Tensor) -> tuple[float, float]:
    """Entropy of pooled 3-grams and their divergence from the true law, both plug-in, nats.

    Args:
        counts: of each 3-gram, shape (V ** 3,).
        law: true chance of each 3-gram, shape (V ** 3,).
    """
    p = counts / counts.sum()
    entropy = -torch.xlogy(p, p).sum()
    return float(entropy), float(-torch.xlogy(p, law).sum() - entropy)


def divergences(counts: Tensor, law: Tensor) -> Tensor:
    """The same divergence of many histograms at once: (..., V ** 3) -> (...)."""
    p = counts / counts.sum(-1, keepdim=True)
    return (torch.xlogy(p, p) - torch.xlogy(p, law)).sum(-1)


def figures(x: Tensor, chain: Chain) -> dict[str, Any]:
    """What is told of some samples of a chain.

    Args:
        x: samples, int64, shape (count, L).
        chain: the law.

    Returns:
        `nats`: of a token under the law; `entropy`: of the pooled 3-grams; `kl`: their divergence
        from the law; `windows`: that of each window's own 3-grams, left to right; `windows_mean`:
        their mean, in which errors of several windows cannot cancel (its floor is high, as each
        window has few 3-grams). All nats; those with `_se` are standard errors over samples.
    """
    nats, law = chain.nll(x), chain.trigrams.flatten()
    windows = [trigram_counts(each, chain.symbols) for each in x.unfold(1, 3, 1).unbind(1)]
    by_window = torch.stack(windows, 1)
    pooled = by_window.sum(1)
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(len(x), (RESAMPLES, len(x)), generator=generator)
    weights = torch.stack([torch.bincount(each, minlength=len(x)).double() for each in picked])
    entropy, kl = trigram_figures(pooled.sum(0), law)
    resampled = [trigram_figures(each, law) for each in weights @ pooled]
    spread = torch.tensor(resampled).std(0, correction=0)
    again = (weights @ by_window.flatten(1)).view(RESAMPLES, *by_window.shape[1:])
    each = divergences(by_window.sum(0), law)
    return {
        "nats": float(nats.mean()),
        "nats_se": float(nats.std() / len(x) ** 0.5),
        "entropy": entropy,
        "entropy_se": float(spread[0]),
        "kl": kl,
        "kl_se": float(spread[1]),
        "windows": [round(value, 6) for value in each.tolist()],
        "windows_mean": float(each.mean()),
        "windows_mean_se": float(divergences(again, law).mean(1).std(correction=0)),
    }
