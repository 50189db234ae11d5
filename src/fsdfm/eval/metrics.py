"""What is measured on one sample, or on a list of them: pure functions of token ids and texts.

No one of these is a verdict. A judge's perplexity rewards repetition, which entropy, `repetition`
and `distinct` see; those reward noise, which the judge and `ngram_js_bits` see.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

Item = TypeVar("Item", bound=Hashable)

Unit = Literal["byte", "word"]


@dataclass(frozen=True, slots=True)
class Score:
    """What a judge says of one text."""

    nats: float
    """Total negative log-likelihood of the scored tokens."""
    tokens: int
    """Scored tokens, the judge's own; a start token or a prompt is not among them."""
    utf8_bytes: int
    """Bytes of the text that those tokens spell."""


def histogram_entropy_nats(ids: Sequence[int]) -> float:
    """Entropy of one sample's own token histogram.

        H = -sum_v f_v ln f_v,  f_v = count of v / length

    At most ln(length), so compare samples of one length only.

    Args:
        ids: tokens of one sample, at least one.

    Returns:
        H in [0, ln(length)], nats.

    Raises:
        ValueError: the sample is empty, so it has no histogram.
    """
    if not len(ids):
        raise ValueError("An empty sample has no token histogram; leave it out and count it.")
    length = len(ids)
    return math.fsum(n / length * math.log(length / n) for n in Counter(ids).values())


def _ngrams(items: Sequence[Item], n: int) -> Iterator[tuple[Item, ...]]:
    if n < 1:
        raise ValueError(f"An n-gram needs n >= 1, got n={n}.")
    return zip(*(items[start:] for start in range(n)), strict=False)


def repetition(ids: Sequence[int], n: int) -> float:
    """Share of one sample's n-grams that occurred earlier in it.

        1 - distinct n-grams / n-grams

    Grows with the length of the sample, so compare samples of one length only.

    Args:
        ids: tokens of one sample.
        n: tokens of an n-gram, at least 1.

    Returns:
        A share in [0, 1); 0 for a sample shorter than n, in which nothing recurs.

    Raises:
        ValueError: n is below 1.
    """
    grams = list(_ngrams(ids, n))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(samples: Iterable[Sequence[int]], n: int) -> float:
    """Distinct n-grams over n-grams, pooled over all samples.

    The pool makes recurrence between samples count, which `repetition` does not see. It also makes
    the number fall as samples are added: compare sets of one size and sample length only.

    Args:
        samples: tokens of each sample; n-grams do not cross from one into the next.
        n: tokens of an n-gram, at least 1.

    Returns:
        A share in (0, 1].

    Raises:
        ValueError: n is below 1, or no sample is as long as n.

    Source: distinct-1 and -2, arXiv 1510.03055.
    """
    seen: set[tuple[int, ...]] = set()
    total = 0
    for ids in samples:
        seen.update(_ngrams(ids, n))
        total += max(len(ids) - n + 1, 0)
    if not total:
        raise ValueError(f"No sample has {n} tokens, so there is no {n}-gram to count.")
    return len(seen) / total


def ngram_js_bits(texts: Iterable[str], reference: Iterable[str], n: int, unit: Unit) -> float:
    """Jensen-Shannon divergence between the pooled n-gram histograms of two lists of texts.

        JS = KL(f | m) / 2 + KL(g | m) / 2,  m = (f + g) / 2

    Biased upwards: two lists from one source do not give 0 but, with K n-grams in use, N and M
    counted and all of them common, about (K - 1) (1/N + 1/M) / (8 ln 2). Most n-grams of text are
    rare, so no formula corrects it: the floor to read a value against is human text against other
    human text, both of the same size as here.

    Args:
        texts: texts to judge.
        reference: texts to compare with.
        n: units of an n-gram, at least 1; n-grams do not cross from one text into the next.
        unit: "byte", of UTF-8, or "word", what `str.split` gives.

    Returns:
        JS in [0, 1], bits; 1 where the two lists share no n-gram.

    Raises:
        ValueError: n is below 1, unit is neither, or one of the lists has no n-gram.
    """
    ours, theirs = _histogram(texts, n, unit), _histogram(reference, n, unit)
    grams = ours | theirs  # a dict, not a set: the order of its sums is that of the texts
    f = np.array([ours[gram] for gram in grams]) / ours.total()
    g = np.array([theirs[gram] for gram in grams]) / theirs.total()
    # f / m = 2 f / (f + g); a term of weight 0 is 0, and its logarithm is never taken.
    kl_f = np.sum(f * np.log2(2.0 * f / (f + g), out=np.zeros_like(f), where=f > 0.0))
    kl_g = np.sum(g * np.log2(2.0 * g / (f + g), out=np.zeros_like(g), where=g > 0.0))
    return min(max(float(kl_f + kl_g) / 2.0, 0.0), 1.0)  # rounding alone can leave [0, 1]


def _histogram(texts: Iterable[str], n: int, unit: Unit) -> Counter[tuple[Hashable, ...]]:
    if unit not in ("byte", "word"):
        raise ValueError(f'unit is "byte" or "word", got {unit!r}.')
    counts: Counter[tuple[Hashable, ...]] = Counter()
    for text in texts:
        items: Sequence[Hashable] = text.encode() if unit == "byte" else text.split()
        counts.update(_ngrams(items, n))
    if not counts:
        raise ValueError(f"No text has {n} {unit}s, so there is no {unit} {n}-gram to count.")
    return counts
