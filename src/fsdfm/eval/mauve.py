"""MAUVE, written from its paper: how far two sets of texts overlap, by vectors of their texts.

The text encoder is the caller's, and so is the number: values compare only under one encoder, one
number of points and one number of clusters.

Legend: n and m points of P and Q, u distinct points, d features, k clusters.

Source: Pillutla et al., MAUVE, arXiv 2102.01454.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

KEPT_VARIANCE = 0.9
MIXTURES = 1000
RESTARTS = 5
MAX_ITERATIONS = 100


def mauve(
    p: ArrayLike, q: ArrayLike, *, clusters: int | None = None, scaling: float = 5.0, seed: int = 0
) -> float:
    """Overlap of two sets of points: 1 for the same distribution, near 0 for disjoint ones.

    Scale each point to length 1, project all on the principal components that keep 90 % of the
    variance, cluster all by k-means, and take the two histograms over the clusters to
    `divergence_area`. Depends neither on the order of the points nor on which set is P.

    Biased downwards for two sets of one source, the more so the fewer points there are to a
    cluster: human against other human text of the same size is the ceiling.

    Args:
        p: features of one set, shape (n, d), n >= 2, finite.
        q: features of the other, shape (m, d), m >= 2, finite.
        clusters: k, at least 2; by default max(2, round(min(n, m) / 10)), the paper's n / 10.
            Fewer where there are fewer distinct points.
        scaling: c > 0; how fast the value falls as the sets part.
        seed: seed of the k-means starts.

    Returns:
        MAUVE in [0, 1].

    Raises:
        ValueError: features that are not finite or not of one width, fewer than two points a side,
            fewer than two clusters, or a scaling that is not positive.
    """
    p_features, q_features = _features(p, "P"), _features(q, "Q")
    if p_features.shape[1] != q_features.shape[1]:
        widths = f"{p_features.shape[1]} and {q_features.shape[1]}"
        raise ValueError(f"P and Q need features of one width, got {widths}.")
    n, m = len(p_features), len(q_features)
    k = max(2, round(min(n, m) / 10)) if clusters is None else clusters
    if k < 2:
        raise ValueError(f"MAUVE needs at least 2 clusters, got {k}.")
    # Distinct points in sorted order, with counts: neither the order of the points nor which set is
    # P can then reach the clustering, and equal points share a cluster.
    points, index = np.unique(
        _unit(np.concatenate([p_features, q_features])), axis=0, return_inverse=True
    )
    p_counts = np.bincount(index[:n], minlength=len(points))
    q_counts = np.bincount(index[n:], minlength=len(points))
    weights = (p_counts + q_counts).astype(np.float64)
    labels = _k_means(_principal(points, weights), weights, k, np.random.default_rng(seed))
    return divergence_area(
        np.bincount(labels, p_counts, minlength=k) / n,
        np.bincount(labels, q_counts, minlength=k) / m,
        scaling,
    )


def divergence_area(p: Array, q: Array, scaling: float = 5.0) -> float:
    """Area under the divergence curve of two histograms.

        x = exp(-c KL(Q | R)),  y = exp(-c KL(P | R)),  R = lambda P + (1 - lambda) Q

    as lambda runs over (0, 1), from (1, 0) to (0, 1), which close the curve. Disjoint histograms
    have x = (1 - lambda)^c and y = lambda^c, so an area of Gamma(c + 1)^2 / Gamma(2 c + 1), 1/252
    at c = 5: the least there is.

    Args:
        p: histogram, summing to 1, shape (k,).
        q: histogram, summing to 1, shape (k,).
        scaling: c > 0.

    Returns:
        The area in (0, 1] by trapezoids over 999 even mixtures; 1 for equal histograms.

    Raises:
        ValueError: the scaling is not positive.

    Source: MAUVE, arXiv 2102.01454, its divergence curve.
    """
    if not scaling > 0.0:
        raise ValueError(f"MAUVE needs a scaling above 0, got {scaling}.")
    weight = np.arange(1, MIXTURES)[:, None] / MIXTURES
    mixture = weight * p + (1.0 - weight) * q
    x = np.concatenate([[1.0], np.exp(-scaling * _kl_nats(q, mixture)), [0.0]])
    y = np.concatenate([[0.0], np.exp(-scaling * _kl_nats(p, mixture)), [1.0]])
    return float(np.trapezoid(y[::-1], x[::-1]))


def _kl_nats(p: Array, mixtures: Array) -> Array:
    """KL(P | R) of each row R; R > 0 wherever P > 0. Not below 0, though rounding can be."""
    at = p > 0.0
    return np.asarray(np.maximum((p[at] * np.log(p[at] / mixtures[:, at])).sum(axis=1), 0.0))


def _features(values: ArrayLike, name: str) -> Array:
    features = np.asarray(values, dtype=np.float64)
    if features.ndim != 2 or len(features) < 2 or not features.shape[1]:
        raise ValueError(
            f"{name} needs features of at least 2 points, shape (points, features); "
            f"got shape {features.shape}."
        )
    if not np.isfinite(features).all():
        raise ValueError(f"{name} has features that are NaN or infinite.")
    return features


def _unit(points: Array) -> Array:
    """Each row at length 1; a row of zeros has no direction and stays."""
    length = np.linalg.norm(points, axis=1, keepdims=True)
    return np.asarray(np.divide(points, length, out=np.zeros_like(points), where=length > 0.0))


def _principal(points: Array, weights: Array) -> Array:
    """Coordinates on the fewest principal components that keep 90 % of the variance; (u, <= d)."""
    centred = points - np.average(points, axis=0, weights=weights)
    _, singular, components = np.linalg.svd(
        np.sqrt(weights)[:, None] * centred, full_matrices=False
    )
    share = np.cumsum(singular**2)
    kept = int((share < KEPT_VARIANCE * share[-1]).sum()) + 1
    return np.asarray(centred @ components[:kept].T)


def _k_means(points: Array, weights: Array, k: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Cluster of each point: the best of several Lloyd runs from k-means++ starts."""
    runs = (_lloyd(points, weights, _spread(points, weights, k, rng)) for _ in range(RESTARTS))
    labels, _ = min(runs, key=lambda run: run[1])
    return labels


def _spread(points: Array, weights: Array, k: int, rng: np.random.Generator) -> Array:
    """k-means++ start: each next centre is a point drawn by weight times squared distance."""
    centres = [points[rng.choice(len(points), p=weights / weights.sum())]]
    nearest = _square_distances(points, centres[0][None])[:, 0]
    while len(centres) < min(k, len(points)):
        mass = weights * nearest
        if not mass.sum() > 0.0:
            break  # every point is a centre already
        centres.append(points[rng.choice(len(points), p=mass / mass.sum())])
        nearest = np.minimum(nearest, _square_distances(points, centres[-1][None])[:, 0])
    return np.array(centres)


def _lloyd(points: Array, weights: Array, centres: Array) -> tuple[NDArray[np.int64], float]:
    """Labels and weighted sum of squares once the labels stay, or after MAX_ITERATIONS."""
    row = np.arange(len(points))
    labels = np.full(len(points), -1)
    for _ in range(MAX_ITERATIONS):
        squares = _square_distances(points, centres)
        before, labels = labels, squares.argmin(axis=1)
        if np.array_equal(before, labels):
            break
        members = np.zeros((len(centres), len(points)))
        members[labels, row] = weights
        sizes = members.sum(axis=1, keepdims=True)
        # An empty cluster keeps its centre: it counts 0 in both histograms.
        centres = np.divide(members @ points, sizes, out=centres.copy(), where=sizes > 0.0)
    return labels, float(weights @ squares[row, labels])


def _square_distances(points: Array, centres: Array) -> Array:
    """(u, k); not below 0, though rounding can be."""
    inner = points @ centres.T
    squares = (points**2).sum(axis=1)[:, None] + (centres**2).sum(axis=1) - 2.0 * inner
    return np.asarray(np.maximum(squares, 0.0))
