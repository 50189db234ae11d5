"""Truths of the text metrics, of the bootstrap, and what one metric alone would let through."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from fsdfm.eval import statistics
from fsdfm.eval.mauve import mauve
from fsdfm.eval.metrics import (
    Score,
    Unit,
    distinct,
    histogram_entropy_nats,
    ngram_js_bits,
    repetition,
)
from fsdfm.eval.statistics import Ratio, difference, estimate, matched, quotient

Array = NDArray[np.float64]


def mean(values: Array) -> Ratio:
    return Ratio(values, np.ones_like(values))


def width(interval: statistics.Estimate) -> float:
    return interval.high - interval.low


# One sample, one list of samples.


def test_entropy_of_a_histogram_is_its_closed_form() -> None:
    assert histogram_entropy_nats([5, 6, 7, 8, 5, 6, 7, 8]) == pytest.approx(2.0 * math.log(2.0))
    assert histogram_entropy_nats([1, 1, 1, 2]) == pytest.approx(0.5623351446)
    assert histogram_entropy_nats([9] * 30) == 0.0
    assert histogram_entropy_nats(list(range(1024))) == pytest.approx(math.log(1024))


def test_repetition_is_the_share_of_ngrams_seen_before() -> None:
    ids = [1, 2, 1, 2, 1, 3]  # 12 21 12 21 13: two of five recur
    assert repetition(ids, 2) == pytest.approx(2 / 5)
    assert repetition(ids, 1) == pytest.approx(3 / 6)
    assert repetition(ids, 4) == 0.0
    assert repetition([7] * 10, 3) == pytest.approx(7 / 8)
    assert repetition([1, 2], 3) == repetition([], 1) == 0.0


def test_distinct_is_pooled_and_falls_with_the_number_of_samples() -> None:
    assert distinct([[1, 2, 3], [2, 3, 4]], 2) == pytest.approx(3 / 4)  # 12 23 | 23 34, not 32
    assert distinct([[1, 2, 3], [9]], 2) == 1.0
    rng = random.Random(0)
    samples = [[rng.randrange(50) for _ in range(100)] for _ in range(20)]
    shares = [distinct(samples[:count], 2) for count in (1, 5, 20)]
    assert shares == sorted(shares, reverse=True)
    assert distinct(samples[:1], 2) == pytest.approx(1.0 - repetition(samples[0], 2))


def test_js_divergence_is_its_closed_form() -> None:
    # f = (1, 0), g = (1/2, 1/2): H(3/4, 1/4) - H(1/2, 1/2) / 2.
    expected = 2.0 - 0.75 * math.log2(3.0) - 0.5
    assert ngram_js_bits(["aa"], ["ab"], 1, "byte") == pytest.approx(expected)
    assert ngram_js_bits(["ab"], ["aa"], 1, "byte") == pytest.approx(expected)
    assert ngram_js_bits(["sea sea"], ["sea  ship\n"], 1, "word") == pytest.approx(expected)
    assert ngram_js_bits(["one two one"], ["one two one"], 2, "word") == 0.0
    assert ngram_js_bits(["one two"], ["two one"], 2, "word") == 1.0


def test_js_ngrams_stay_within_a_text_and_bytes_are_utf8() -> None:
    assert ngram_js_bits(["ab", "cd"], ["cd", "ab"], 2, "byte") == 0.0
    assert ngram_js_bits(["ab", "cd"], ["abcd"], 2, "byte") > 0.1
    # e acute is C3 A9 and c cedilla C3 A7: they share one byte of two, so half the mass.
    assert ngram_js_bits(["é"], ["ç"], 1, "byte") == pytest.approx(0.5)


def test_js_divergence_of_one_source_is_its_stated_bias() -> None:
    # 8 m / (1/N + 1/M) times JS in nats is chi-square with K - 1 = 15 degrees of freedom, so JS has
    # a relative standard deviation of sqrt(2 / 15); 60 pairs, 4.5 standard errors.
    rng = np.random.default_rng(0)
    letters = np.frombuffer(b"abcdefghijklmnop", dtype=np.uint8)

    def text(length: int) -> list[str]:
        return [letters[rng.integers(16, size=length)].tobytes().decode()]

    found = np.mean([ngram_js_bits(text(2000), text(4000), 1, "byte") for _ in range(60)])
    bias = 15 * (1 / 2000 + 1 / 4000) / (8 * math.log(2.0))
    assert found == pytest.approx(bias, rel=4.5 * math.sqrt(2 / 15 / 60))


def test_metrics_refuse_what_has_no_value() -> None:
    with pytest.raises(ValueError, match="empty sample"):
        histogram_entropy_nats([])
    with pytest.raises(ValueError, match="n=0"):
        repetition([1, 2], 0)
    with pytest.raises(ValueError, match="No sample has 3 tokens"):
        distinct([[1, 2], []], 3)
    for texts, reference in ((["a b"], []), ([], ["a b"]), (["a b"], [" "])):
        with pytest.raises(ValueError, match="No text has 2 words"):
            ngram_js_bits(texts, reference, 2, "word")
    unit: Unit = "char"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="unit is"):
        ngram_js_bits(["a"], ["a"], 1, unit)


# Estimates and comparisons.


def test_value_is_f_of_the_ratio_of_sums() -> None:
    nats, tokens = np.array([30.0, 10.0]), np.array([10.0, 20.0])
    assert estimate(Ratio(nats, tokens, np.exp)).value == pytest.approx(math.exp(40 / 30))
    each = estimate(mean(np.exp(nats / tokens)))
    assert each.value == pytest.approx((math.exp(3.0) + math.exp(0.5)) / 2.0)
    assert each.count == 2


def test_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    # A quantile of R = 20,000 draws has standard error sqrt(.025 .975 / R) / phi(1.96) = 0.019
    # standard deviations; two ends of 1.96 each, 4.5 standard errors.
    half = 1.96 * values.std() / 20.0
    found = estimate(mean(values), resamples=20000)
    tolerance = 4.5 * 0.019 / 1.96
    assert found.high - found.value == pytest.approx(half, rel=tolerance)
    assert found.value - found.low == pytest.approx(half, rel=tolerance)


def test_95_percent_intervals_hold_the_truth_94_times_in_100() -> None:
    # n = 40: the interval is t(39) at 1.96 sqrt(39 / 40), which covers 94.0 %; 400 trials.
    rng = np.random.default_rng(1)
    held = 0
    for trial in range(400):
        found = estimate(mean(rng.normal(0.3, 1.0, 40)), seed=trial, resamples=400)
        held += found.low <= 0.3 <= found.high
    assert held / 400 == pytest.approx(0.94, abs=4.5 * math.sqrt(0.94 * 0.06 / 400))


def test_interval_follows_a_monotone_transform() -> None:
    rng = np.random.default_rng(2)
    nats, tokens = rng.normal(300.0, 40.0, 30), rng.integers(50, 100, 30).astype(np.float64)
    # With 2,001 resamples both ends are order statistics, so no interpolation comes between.
    plain = estimate(Ratio(nats, tokens), resamples=2001)
    exp = estimate(Ratio(nats, tokens, np.exp), resamples=2001)
    assert exp.low == pytest.approx(math.exp(plain.low), rel=1e-9)
    assert exp.high == pytest.approx(math.exp(plain.high), rel=1e-9)


def test_pairs_cancel_what_they_share() -> None:
    rng = np.random.default_rng(3)
    tokens = rng.integers(50, 100, 25).astype(np.float64)
    nats = rng.normal(4.0, 1.0, 25) * tokens
    a, b = Ratio(nats + tokens * math.log(2.0), tokens, np.exp), Ratio(nats, tokens, np.exp)
    twice = quotient(a, b)  # every resample of the pairs has the same factor
    assert (twice.value, twice.low, twice.high) == pytest.approx((2.0, 2.0, 2.0), rel=1e-12)
    assert twice.count == 25
    more = difference(mean(nats + 0.3), mean(nats))
    assert (more.value, more.low, more.high) == pytest.approx((0.3, 0.3, 0.3), rel=1e-9)


def test_sides_of_unequal_count_have_their_own_errors() -> None:
    rng = np.random.default_rng(4)
    a, b = rng.normal(0.0, 1.0, 300), rng.normal(0.0, 2.0, 200)
    found = difference(mean(a), mean(b))
    error = math.sqrt(a.var(ddof=1) / 300 + b.var(ddof=1) / 200)
    assert width(found) == pytest.approx(2 * 1.972 * error, rel=1e-4)  # t(199) at 97.5 %
    assert found.value == pytest.approx(a.mean() - b.mean())
    assert found.count == 200
    # Were a[:200] and a paired, 0 would be the whole interval.
    assert width(difference(mean(a), mean(a[:200]))) > 0.1


@pytest.mark.parametrize(
    ("p", "freedom", "t"),
    [(0.975, 1, 12.7062), (0.975, 3, 3.18245), (0.95, 7, 1.89458), (0.995, 15, 2.94671)],
)
def test_students_quantiles_are_those_of_the_tables(p: float, freedom: int, t: float) -> None:
    assert statistics.student_quantile(p, freedom) == pytest.approx(t, rel=1e-4)
    assert statistics.student_quantile(1.0 - p, freedom) == pytest.approx(-t, rel=1e-4)


@pytest.mark.parametrize("count", [2, 4, 16])
@pytest.mark.parametrize("level", [0.95, 1.0 - 0.05 / 40])
def test_a_tie_is_called_real_as_seldom_as_stated(count: int, level: float) -> None:
    """Pooled perplexities of two equal models; a bootstrap calls 1 in 8 real at four pairs."""
    rng, trials, called = np.random.default_rng(count), 400, 0
    tokens = np.full(count, 100.0)
    for _ in range(trials):
        a, b = (Ratio(100.0 * rng.normal(5.0, 0.2, count), tokens, np.exp) for _ in range(2))
        found = quotient(a, b, level=level)
        called += not found.low <= 1.0 <= found.high
    rate = 1.0 - level
    assert called / trials == pytest.approx(rate, abs=4.5 * math.sqrt(rate * level / trials))


def test_resampling_depends_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ratio = mean(np.random.default_rng(5).normal(size=31))
    found = estimate(ratio, seed=1)
    assert estimate(ratio, seed=1) == found
    assert estimate(ratio, seed=2) != found
    monkeypatch.setattr(statistics, "INDICES_AT_ONCE", 70)  # two rows at a time, not all
    assert estimate(ratio, seed=1) == found


def test_one_sample_has_a_value_and_no_interval() -> None:
    one, many = mean(np.array([3.0])), mean(np.array([1.0, 2.0]))
    for found, value in ((estimate(one), 3.0), (difference(many, one), -1.5)):
        assert found.value == value
        assert math.isnan(found.low)
        assert math.isnan(found.high)


def test_statistics_refuse_what_has_no_value() -> None:
    with pytest.raises(ValueError, match="positive denominators"):
        Ratio(np.ones(2), np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match="at least one sample"):
        Ratio(np.ones(0), np.ones(0))
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        Ratio(np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match=r"coverage in \(0, 1\)"):
        difference(mean(np.ones(3)), mean(np.ones(3)), level=95.0)


def test_matched_perplexity_is_geometric_between_neighbours() -> None:
    curve = [(5.0, math.log(40.0)), (3.0, math.log(5.0)), (4.0, math.log(10.0))]
    assert matched(curve, 4.0) == pytest.approx(10.0)
    assert matched(curve, 4.5) == pytest.approx(20.0)
    assert matched(curve, 3.25) == pytest.approx(5.0 * 2.0**0.25)
    assert matched(curve, 3.0) == pytest.approx(5.0)
    assert matched(curve, 5.0) == pytest.approx(40.0)
    assert matched(curve, 2.99) is None
    assert matched(curve, 5.01) is None
    assert matched([], 4.0) is None
    assert matched([*curve, (4.0, math.log(12.0))], 4.5) == pytest.approx(20.0)


# One sentence forty times.

SENTENCE = "It is a way I have of driving off the spleen and regulating the circulation. "

PROSE = """\
Call me Ishmael. Some years ago—never mind how long precisely—having little or no money in my
purse, and nothing particular to interest me on shore, I thought I would sail about a little and
see the watery part of the world. It is a way I have of driving off the spleen and regulating the
circulation. Whenever I find myself growing grim about the mouth; whenever it is a damp, drizzly
November in my soul; whenever I find myself involuntarily pausing before coffin warehouses, and
bringing up the rear of every funeral I meet; and especially whenever my hypos get such an upper
hand of me, that it requires a strong moral principle to prevent me from deliberately stepping into
the street, and methodically knocking people’s hats off—then, I account it high time to get to sea
as soon as I can. This is my substitute for pistol and ball. With a philosophical flourish Cato
throws himself upon his sword; I quietly take to the ship. There is nothing surprising in this. If
they but knew it, almost all men in their degree, some time or other, cherish very nearly the same
feelings towards the ocean with me.

There now is your insular city of the Manhattoes, belted round by wharves as Indian isles by coral
reefs—commerce surrounds it with her surf. Right and left, the streets take you waterward. Its
extreme downtown is the battery, where that noble mole is washed by waves, and cooled by breezes,
which a few hours previous were out of sight of land. Look at the crowds of water-gazers there.

Circumambulate the city of a dreamy Sabbath afternoon. Go from Corlears Hook to Coenties Slip, and
from thence, by Whitehall, northward. What do you see?—Posted like silent sentinels all around the
town, stand thousands upon thousands of mortal men fixed in ocean reveries. Some leaning against
the spiles; some seated upon the pier-heads; some looking over the bulwarks of ships from China;
some high aloft in the rigging, as if striving to get a still better seaward peep. But these are
all landsmen; of week days pent up in lath and plaster—tied to counters, nailed to benches,
clinched to desks. How then is this? Are the green fields gone? What do they here?

But look! here come more crowds, pacing straight for the water, and seemingly bound for a dive.
Strange! Nothing will content them but the extremest limit of the land; loitering under the shady
lee of yonder warehouses will not suffice. No. They must get just as nigh the water as they
possibly can without falling in. And there they stand—miles of them—leagues. Inlanders all, they
come from lanes and alleys, streets and avenues—north, east, south, and west. Yet here they all
unite. Tell me, does the magnetic virtue of the needles of the compasses of all those ships attract
them thither?

Once more. Say you are in the country; in some high land of lakes. Take almost any path you please,
and ten to one it carries you down in a dale, and leaves you there by a pool in the stream. There
is magic in it. Let the most absent-minded of men be plunged in his deepest reveries—stand that man
on his legs, set his feet a-going, and he will infallibly lead you to water, if water there be in
all that region. Should you ever be athirst in the great American desert, try this experiment, if
your caravan happen to be supplied with a metaphysical professor. Yes, as every one knows,
meditation and water are wedded for ever.

But here is an artist. He desires to paint you the dreamiest, shadiest, quietest, most enchanting
bit of romantic landscape in all the valley of the Saco. What is the chief element he employs?
There stand his trees, each with a hollow trunk, as if a hermit and a crucifix were within; and
here sleeps his meadow, and there sleep his cattle; and up from yonder cottage goes a sleepy smoke.
Deep into distant woodlands winds a mazy way, reaching to overlapping spurs of mountains bathed in
their hill-side blue. But though the picture lies thus tranced, and though this pine-tree shakes
down its sighs like leaves upon this shepherd’s head, yet all were vain, unless the shepherd’s eye
were fixed upon the magic stream before him. Go visit the Prairies in June, when for scores on
scores of miles you wade knee-deep among Tiger-lilies—what is the one charm wanting?—Water—there is
not a drop of water there! Were Niagara but a cataract of sand, would you travel your thousand
miles to see it? Why did the poor poet of Tennessee, upon suddenly receiving two handfuls of
silver, deliberate whether to buy him a coat, which he sadly needed, or invest his money in a
pedestrian trip to Rockaway Beach? Why is almost every robust healthy boy with a robust healthy
soul in him, at some time or other crazy to go to sea? Why upon your first voyage as a passenger,
did you yourself feel such a mystical vibration, when first told that you and your ship were now
out of sight of land? Why did the old Persians hold the sea holy? Why did the Greeks give it a
separate deity, and own brother of Jove? Surely all this is not without meaning. And still deeper
the meaning of that story of Narcissus, who because he could not grasp the tormenting, mild image
he saw in the fountain, plunged into it and was drowned. But that same image, we ourselves see in
all rivers and oceans. It is the image of the ungraspable phantom of life; and this is the key to
it all.
"""
"""Moby Dick, chapter 1 (Herman Melville, 1851; public domain)."""


class CacheBigram:
    """A judge: bytes given the byte before, learned from the text so far and nothing else.

    P(b | a) = (n(a, b) + 4 P(b)) / (n(a) + 4),  P(b) = (n(b) + 1/4) / (n + 64)
    """

    def __init__(self) -> None:
        self.pairs = np.zeros((256, 256))

    def distribution(self, before: int) -> Array:
        single = (self.pairs.sum(axis=0) + 0.25) / (self.pairs.sum() + 64.0)
        return np.asarray((self.pairs[before] + 4.0 * single) / (self.pairs[before].sum() + 4.0))

    def score(self, text: str) -> Score:
        data, nats = text.encode(), 0.0
        for before, byte in pairwise(b"\n" + data):
            p = self.distribution(before)
            assert p.min() > 0.0
            assert p.sum() == pytest.approx(1.0, abs=1e-12)
            nats -= math.log(p[byte])
            self.pairs[before, byte] += 1.0
        return Score(nats, len(data), len(data))


def segments(text: str) -> list[str]:
    return [text[start : start + 80] for start in range(0, len(text) - 79, 80)]


def byte_trigram_features(texts: Iterable[str]) -> Array:
    """Byte 3-grams hashed into 64 counts."""
    rows = []
    for text in texts:
        data = text.encode()
        hashed = [zlib.crc32(data[i : i + 3]) % 64 for i in range(len(data) - 2)]
        rows.append(np.bincount(hashed, minlength=64))
    return np.array(rows, dtype=np.float64)


def word_ids(text: str) -> list[int]:
    return [zlib.crc32(word.encode()) for word in text.split()]


def test_one_sentence_forty_times_pleases_a_judge_and_no_other_metric() -> None:
    repeated = SENTENCE * 40
    prose = PROSE[: len(repeated)]

    ppl = [math.exp(s.nats / s.tokens) for s in (CacheBigram().score(t) for t in (repeated, prose))]
    # Found: 3.97 and 15.9 a byte (1.99 and 3.99 bits).
    assert ppl[0] < ppl[1] / 3.0

    ours, human = word_ids(repeated), word_ids(prose)
    # Found: 2.62 and 5.38 nats; 4-grams repeated .975 and 0; distinct 2-grams .025 and .97.
    assert histogram_entropy_nats(ours) <= math.log(len(SENTENCE.split()))
    assert histogram_entropy_nats(human) > 2.0 * histogram_entropy_nats(ours)
    assert repetition(ours, 4) > 0.95
    assert repetition(human, 4) < 0.01
    assert distinct([ours], 2) < 0.05
    assert distinct([human], 2) > 0.9


def test_one_sentence_forty_times_is_far_from_human_text() -> None:
    every = segments(PROSE)
    reference, human = every[::2], every[1::2]
    repeated = segments(SENTENCE * 40)[: len(human)]
    target = byte_trigram_features(reference)
    # Found: 1 / 252, the least there is, and 0.98 (0.86 to 0.99 over k-means seeds).
    assert mauve(byte_trigram_features(repeated), target) < 0.1
    assert mauve(byte_trigram_features(human), target) > 0.6
    # Found: 0.76 and 0.37 bits; the latter is the floor at 2,640 bytes a side.
    assert ngram_js_bits(repeated, reference, 3, "byte") > 1.5 * ngram_js_bits(
        human, reference, 3, "byte"
    )
