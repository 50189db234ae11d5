"""Averages over samples with bootstrap intervals, comparisons of two, and the frontier.

Every figure here is a function of a ratio of two sums over samples, so one bootstrap serves all.
Legend: n samples, R resamples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

INDICES_AT_ONCE = 1 << 22
"""Entries of the (R, n) index matrix that exist at a time: 32 MiB."""


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

    def without_one(self) -> Array:
        """The figure on all samples but each in turn, shape (n,); of one sample, itself."""
        if self.count == 1:
            return np.array([self.value])
        rest = [x.sum() - x for x in (self.numerators, self.denominators)]
        return self.transform(rest[0] / rest[1])


def estimate(ratio: Ratio, *, seed: int = 0, resamples: int = 2000) -> Estimate:
    """A figure with its 95 % percentile bootstrap interval over samples.

    Resample n of the n samples with replacement, R times; the interval lies between the 2.5 % and
    97.5 % quantiles. Too short for few samples: at n = 10 a 95 %
    interval of a mean covers about 90 %.

    Args:
        ratio: the figure.
        seed: seed of the resampling; equal arguments give equal intervals.
        resamples: R.

    Returns:
        The figure, its interval and n; the interval is (NaN, NaN) where n = 1.
    """
    if ratio.count == 1:
        return Estimate(ratio.value, math.nan, math.nan, 1)
    rng = np.random.default_rng(seed)
    draws = [ratio.over(index) for index in _indices(rng, resamples, ratio.count)]
    low, high = np.quantile(np.concatenate(draws), [0.025, 0.975])
    return Estimate(ratio.value, float(low), float(high), ratio.count)


def difference(a: Ratio, b: Ratio, *, level: float = 0.95) -> Estimate:
    """a - b with its interval; natural for entropies, shares and bits per byte.

    The interval is Student's, with the jackknife's standard error over samples. (A bootstrap of few
    pairs never leaves their range, so it would call one tie in eight real at four pairs.)

    Where a and b have equally many samples they are taken as pairs, sample i of both from one seed
    and prompt: what a pair shares cancels. Where the counts differ each side has its own error.
    Samples of equal count that are no pairs lose nothing by it.

    Args:
        a: a figure.
        b: what it is compared with.
        level: coverage in (0, 1); 1 - 0.05 / m for m comparisons that shall hold together
            (Bonferroni).

    Returns:
        a - b, its interval (NaN, NaN if a side has one sample), and the smaller side's count.

    Raises:
        ValueError: level is not in (0, 1).
    """
    value, half, count = _student(a.value, b.value, a.without_one(), b.without_one(), level)
    return Estimate(value, value - half, value + half, count)


def quotient(a: Ratio, b: Ratio, *, level: float = 0.95) -> Estimate:
    """a / b with its interval, made on logarithms; natural for perplexities and times.

    Pairs, arguments, errors: `difference`; both figures must be positive.
    """
    a_without, b_without = (np.log(ratio.without_one()) for ratio in (a, b))
    value, half, count = _student(math.log(a.value), math.log(b.value), a_without, b_without, level)
    return Estimate(math.exp(value), math.exp(value - half), math.exp(value + half), count)


def _student(
    a: float, b: float, a_without: Array, b_without: Array, level: float
) -> tuple[float, float, int]:
    """a - b, half the width of its interval, and the smaller side's count."""
    if not 0.0 < level < 1.0:
        raise ValueError(f"level is a coverage in (0, 1), got {level}.")
    count = min(len(a_without), len(b_without))
    if count == 1:
        return a - b, math.nan, 1
    if len(a_without) == len(b_without):
        variance = _jackknife_variance(a_without - b_without)
    else:
        variance = _jackknife_variance(a_without) + _jackknife_variance(b_without)
    return a - b, student_quantile((1.0 + level) / 2.0, count - 1) * math.sqrt(variance), count


def _jackknife_variance(without_one: Array) -> float:
    """(n - 1) / n times the summed squares of the leave-one-out figures about their mean."""
    n = len(without_one)
    return (n - 1) / n * float(((without_one - without_one.mean()) ** 2).sum())


@functools.lru_cache(maxsize=64)
def student_quantile(p: float, freedom: int) -> float:
    """Quantile p of Student's distribution with `freedom` degrees.

    With x = sqrt(freedom) tan(u) its density becomes cos(u) ** (freedom - 1) on (-pi/2, pi/2).
    """
    u = np.linspace(-math.pi / 2.0, math.pi / 2.0, 400_001)
    weight = np.cos(u) ** (freedom - 1)
    mass = np.concatenate(([0.0], np.cumsum((weight[1:] + weight[:-1]) / 2.0)))
    return math.sqrt(freedom) * math.tan(float(np.interp(p, mass / mass[-1], u)))


def _indices(rng: np.random.Generator, resamples: int, count: int) -> Iterator[NDArray[np.int64]]:
    """Matrices of sample indices in blocks of rows; R rows in all."""
    rows = max(1, INDICES_AT_ONCE // count)
    for start in range(0, resamples, rows):
        yield rng.integers(count, size=(min(rows, resamples - start), count))


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
