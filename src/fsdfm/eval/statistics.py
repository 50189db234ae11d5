"""Averages over samples with bootstrap intervals, comparisons of two, and the frontier.

Every figure here is a function of a ratio of two sums over samples, so one bootstrap serves all.
Legend: n samples, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

INDICES_AT_ONCE = 1 << 22
"""Entries of the (R, n) index matrix that exist at a time: 32 MiB."""
TAIL_RESAMPLES = 5
"""Fewest resamples outside each end of an interval; with fewer the end is one lucky draw."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its bootstrap interval."""

    value: float
    """The figure on all samples, not the mean of the resamples."""
    low: float
    """Lower end; NaN where one sample leaves nothing to resample."""
    high: float
    """Upper end; NaN as low."""
    count: int
    """Samples behind the figure; of a comparison, those of its smaller side."""


def identity(values: Array) -> Array:
    """What it is given: the transform of a plain ratio."""
    return values


@dataclass(frozen=True, slots=True, eq=False)
class Ratio:
    """A figure of n samples: f(sum of numerators / sum of denominators).

    Pooled perplexity is exp(sum of nats / sum of tokens); the mean of one number a sample has
    denominators of 1.
    """

    numerators: Array
    """One number a sample, shape (n,)."""
    denominators: Array
    """One positive number a sample, shape (n,)."""
    transform: Callable[[Array], Array] = identity
    """f, elementwise."""

    def __post_init__(self) -> None:
        shape = self.numerators.shape
        if len(shape) != 1 or shape != self.denominators.shape or not shape[0]:
            raise ValueError(
                f"Ratio needs one numerator and one denominator a sample, at least one sample; "
                f"got shapes {shape} and {self.denominators.shape}."
            )
        if not np.all(self.denominators > 0.0):
            raise ValueError(
                "Ratio needs positive denominators; leave out samples that have none, for example "
                "empty texts, and report how many."
            )

    @property
    def count(self) -> int:
        """n."""
        return len(self.numerators)

    @property
    def value(self) -> float:
        """The figure on all samples."""
        return float(self.over(np.arange(self.count)[None])[0])

    def over(self, index: NDArray[np.int64]) -> Array:
        """The figure on each row of a matrix of sample indices, shape (R, n) -> (R,)."""
        return self.transform(
            self.numerators[index].sum(axis=1) / self.denominators[index].sum(axis=1)
        )


def estimate(
    ratio: Ratio, *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> Estimate:
    """A figure with its percentile bootstrap interval over samples.

    Resample n of the n samples with replacement, R times; the interval lies between the
    (1 - level) / 2 and (1 + level) / 2 quantiles. Too short for few samples: at n = 10 a 95 %
    interval of a mean covers about 90 %.

    Args:
        ratio: the figure.
        seed: seed of the resampling; equal arguments give equal intervals.
        resamples: R.
        level: coverage in (0, 1); 1 - 0.05 / m for m figures that shall hold together (Bonferroni).

    Returns:
        The figure, its interval and n; the interval is (NaN, NaN) where n = 1.

    Raises:
        ValueError: level is not in (0, 1), or resamples are too few for its tails.
    """
    _check(resamples, level)
    rng = np.random.default_rng(seed)
    draws = [ratio.over(index) for (index,) in _indices(rng, resamples, (ratio.count,))]
    return _interval(ratio.value, np.concatenate(draws), level, ratio.count)


def difference(
    a: Ratio, b: Ratio, *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> Estimate:
    """a - b with its interval; natural for entropies, shares and bits per byte.

    Where a and b have equally many samples they are taken as pairs, sample i of both from one seed
    and prompt, and resampled together: what a pair shares cancels. Where the counts differ each
    side is resampled by itself. Samples of equal count that are no pairs lose nothing by it.

    Args:
        a: a figure.
        b: what it is compared with.
        seed, resamples, level: as in `estimate`.

    Returns:
        a - b, its interval (NaN, NaN if a side has one sample), and the smaller side's count.

    Raises:
        ValueError: as in `estimate`.
    """
    return _compare(a, b, np.subtract, seed, resamples, level)


def quotient(
    a: Ratio, b: Ratio, *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> Estimate:
    """a / b with its interval; natural for perplexities. Pairs, arguments, errors: `difference`."""
    return _compare(a, b, np.divide, seed, resamples, level)


def _compare(
    a: Ratio,
    b: Ratio,
    operation: Callable[[Array, Array], Array],
    seed: int,
    resamples: int,
    level: float,
) -> Estimate:
    _check(resamples, level)
    rng = np.random.default_rng(seed)
    counts = (a.count,) if a.count == b.count else (a.count, b.count)
    draws = [
        operation(a.over(index[0]), b.over(index[-1])) for index in _indices(rng, resamples, counts)
    ]
    value = operation(np.array([a.value]), np.array([b.value]))[0]
    return _interval(float(value), np.concatenate(draws), level, min(a.count, b.count))


def _check(resamples: int, level: float) -> None:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is a coverage in (0, 1), got {level}.")
    needed = math.ceil(2.0 * TAIL_RESAMPLES / (1.0 - level) - 1e-6)  # 1 - .95 is below .05
    if resamples < needed:
        raise ValueError(f"level={level} needs resamples >= {needed}, got {resamples}.")


def _indices(
    rng: np.random.Generator, resamples: int, counts: tuple[int, ...]
) -> Iterator[tuple[NDArray[np.int64], ...]]:
    """Matrices of sample indices, one for each count, in blocks of rows; R rows in all."""
    rows = max(1, INDICES_AT_ONCE // max(counts))
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        yield tuple(rng.integers(count, size=(size, count)) for count in counts)


def _interval(value: float, draws: Array, level: float, count: int) -> Estimate:
    if count == 1:
        return Estimate(value, math.nan, math.nan, 1)
    low, high = np.quantile(draws, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Estimate(value, float(low), float(high), count)


def matched(curve: Sequence[tuple[float, float]], at: float) -> float | None:
    """Perplexity of a model at a given entropy, between two points of its temperature sweep.

        ln ppl(at) = ln ppl_0 + (at - H_0) / (H_1 - H_0) (ln ppl_1 - ln ppl_0)

    H_0 <= at <= H_1 are neighbours in order of entropy, whatever their temperatures.

    Args:
        curve: (entropy, ln perplexity) of each temperature; of points that share an entropy, the
            one of lowest perplexity counts.
        at: entropy, in the unit of the curve.

    Returns:
        The perplexity, not its logarithm; None outside the range of the curve.
    """
    frontier = sorted({h: ln_ppl for h, ln_ppl in sorted(curve, reverse=True)}.items())
    for h, ln_ppl in frontier:
        if h == at:
            return math.exp(ln_ppl)
    for (h_0, ln_ppl_0), (h_1, ln_ppl_1) in pairwise(frontier):
        if h_0 < at < h_1:
            weight = (at - h_0) / (h_1 - h_0)
            return math.exp(ln_ppl_0 + weight * (ln_ppl_1 - ln_ppl_0))
    return None
