"""What an evaluation found: rows of per-sample sums, and the figures made of them.

A record holds one sample's sums and counts, so that any figure is a ratio of sums over samples and
gets its interval by resampling samples. Names say what is summed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fsdfm.core.errors import DataError
from fsdfm.core.files import write_whole
from fsdfm.eval.statistics import Estimate, Ratio, estimate, identity

FORMAT, FORMAT_VERSION = "fsdfm-report", 1
FACTS = {"fsdfm", "torch", "machine", "length", "seed", "batch_size", "preset"} | {
    "judge",
    "heldout",
    "models",
}
"""What a report says of all its rows; evaluation.py writes it. A report of several judges also
has `other_judges`, a list: the facts of those after the first."""

Record = dict[str, float]
"""Sums and counts of one sample:

nats, judge_tokens, utf8_bytes        what the judge said, of how much text
entropy_nats, repetition_4            of the sample's own tokens
generated_tokens, nfe, seconds        what it took (prompt tokens are not counted)
seed, threads                         of the sample; CPU threads at work
right_tokens, hidden_tokens           infilling: original tokens found again, of how many
elbo_nats, elbo_tokens, elbo_bytes    the model's bound on a held-out block
"""

Sum = Callable[[Record], float]


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure over samples: transform(sum of numerators / sum of denominators)."""

    numerator: Sum
    denominator: Sum
    about: str
    """Its definition in words, for the legend."""
    transform: Callable[[NDArray[np.float64]], NDArray[np.float64]] = identity
    compared_by: Literal["ratio", "difference"] = "difference"
    digits: int = 3


def _perplexity_of(record: Record) -> float:
    return math.exp(min(700.0, record["nats"] / max(1.0, record["judge_tokens"])))


def _judged(record: Record) -> float:
    return float(record["judge_tokens"] > 0)


def _one(record: Record) -> float:
    return 1.0


METRICS: dict[str, Metric] = {
    "ppl_pooled": Metric(
        lambda r: r["nats"],
        lambda r: r["judge_tokens"],
        "exp(nats of all samples under the judge / judge tokens of all samples)",
        np.exp,
        "ratio",
        1,
    ),
    "ppl_mean": Metric(
        _perplexity_of,
        _judged,
        "mean over samples of exp(nats / judge tokens): the FS-DFM paper's",
        digits=1,
    ),
    "bits_per_byte": Metric(
        lambda r: r["nats"] / math.log(2),
        lambda r: r["utf8_bytes"],
        "bits of all samples under the judge / bytes of their text",
    ),
    "entropy_nats": Metric(
        lambda r: r["entropy_nats"],
        _one,
        "entropy of a sample's own token histogram, mean over samples (model's tokens)",
    ),
    "entropy_bits": Metric(
        lambda r: r["entropy_nats"] / math.log(2),
        _one,
        "the same in bits: the FS-DFM paper's",
    ),
    "repetition_4": Metric(
        lambda r: r["repetition_4"],
        _one,
        "share of a sample's 4-grams that occurred earlier in it, mean over samples",
    ),
    "token_accuracy": Metric(
        lambda r: r["right_tokens"],
        lambda r: r["hidden_tokens"],
        "infilling: hidden tokens that are the original again / hidden tokens",
    ),
    "elbo_nats_per_token": Metric(
        lambda r: r["elbo_nats"],
        lambda r: r["elbo_tokens"],
        "upper bound on -ln p of held-out text, nats a token of the model (not tight with the "
        "uniform source)",
    ),
    "elbo_bits_per_byte": Metric(
        lambda r: r["elbo_nats"] / math.log(2),
        lambda r: r["elbo_bytes"],
        "the same in bits a byte of text, comparable between tokenizers",
    ),
    "nfe": Metric(lambda r: r["nfe"], _one, "model calls of a sample", digits=0),
    "seconds": Metric(
        lambda r: r["seconds"],
        _one,
        "wall-clock of a sample's batch / samples in it, mean; a hint where other work ran",
    ),
    "tokens_per_second": Metric(
        lambda r: r["generated_tokens"],
        lambda r: r["seconds"],
        "generated tokens / seconds (prompt tokens are not counted)",
        digits=0,
    ),
}
"""Every figure that is a ratio of sums, in the order of a report's columns."""

POOLED = {
    "distinct_2": "distinct 2-grams / 2-grams of all samples together (falls with their number)",
    "mauve": "MAUVE (arXiv 2102.01454) against other held-out text, over means of the judge's "
    "final hidden states on segments of 128 judge tokens, clusters = segments / 10",
    "js_byte_4_bits": "Jensen-Shannon divergence of byte 4-gram histograms from other held-out "
    "text, bits (the human row is its floor)",
    "js_word_1_bits": "the same of words",
}
"""Figures of all samples together, without interval. They depend on the number of samples, so only
rows as large as the human row have them."""

JUDGED = ("nats", "judge_tokens")
"""What a record has of a judge."""
OF_JUDGE = ("ppl_pooled", "ppl_mean", "bits_per_byte", "mauve")
"""The figures that depend on the judge."""


@dataclass(frozen=True, slots=True)
class Opinion:
    """What one judge says of a row."""

    records: list[Record]
    """JUDGED of each sample."""
    pooled: dict[str, float] = field(default_factory=dict)
    """Those of POOLED that depend on the judge."""


@dataclass(frozen=True, slots=True)
class Row:
    """A source of text at one setting."""

    name: str
    """Model or reference."""
    kind: Literal["model", "reference"]
    task: str
    steps: int | None
    """Budget in model calls; None where nothing was generated by steps."""
    temperature: float | None
    records: list[Record]
    """One for each sample; sample i of every row shares its seed and, where models share a
    tokenizer, its prompt."""
    pooled: dict[str, float] = field(default_factory=dict)
    """Figures of POOLED."""
    excerpt: str = ""
    """Beginning of the first sample, for human eyes."""
    others: dict[str, Opinion] = field(default_factory=dict)
    """What each judge after the first says, by its name; records and pooled are the first's."""

    @property
    def setting(self) -> tuple[str, int | None, float | None]:
        """What must agree for two rows to be compared."""
        return self.task, self.steps, self.temperature

    @property
    def opinion(self) -> Opinion:
        """What the first judge says."""
        sums = [{k: r[k] for k in JUDGED if k in r} for r in self.records]
        return Opinion(sums, {k: v for k, v in self.pooled.items() if k in OF_JUDGE})

    def under(self, judge: str) -> Row:
        """The row of a report whose only judge is one of the others."""
        told = self.others.get(judge, Opinion([{}] * len(self.records)))  # not a judged row
        pairs = zip(self.records, told.records, strict=True)
        records = [{k: v for k, v in r.items() if k not in JUDGED} | sums for r, sums in pairs]
        pooled = {k: v for k, v in self.pooled.items() if k not in OF_JUDGE} | told.pooled
        return replace(self, records=records, pooled=pooled, others={})

    def has(self, metric: str) -> NDArray[np.bool_]:
        """Which samples have the metric (an empty text has no perplexity), shape (n,)."""
        try:
            return np.array([METRICS[metric].denominator(r) > 0.0 for r in self.records], bool)
        except KeyError:
            return np.zeros(len(self.records), bool)

    def ratio(self, metric: str, among: NDArray[np.bool_] | None = None) -> Ratio | None:
        """The metric's sums over the samples that have it, all or some; None where none has."""
        kind, chosen = METRICS[metric], self.has(metric)
        if among is not None:
            chosen &= among
        if not chosen.any():
            return None
        records = [r for r, some in zip(self.records, chosen, strict=True) if some]
        try:
            numerators = np.array([kind.numerator(r) for r in records], dtype=np.float64)
        except KeyError:
            return None
        denominators = np.array([kind.denominator(r) for r in records], dtype=np.float64)
        return Ratio(numerators, denominators, kind.transform)

    def estimate(self, metric: str) -> Estimate | None:
        """The figure with its 95 % bootstrap interval over samples, or None."""
        ratio = self.ratio(metric)
        return None if ratio is None else estimate(ratio)


@dataclass(frozen=True, slots=True)
class Report:
    """Rows, and the facts that they share."""

    facts: dict[str, Any]
    """Judge, held-out text, models, machine, settings."""
    rows: list[Row]

    @property
    def judges(self) -> list[dict[str, Any]]:
        """Facts of each judge; the first is the one of the rows' own figures."""
        return [self.facts["judge"], *self.facts.get("other_judges", ())]

    def only(self, judges: Mapping[str, str]) -> Report:
        """The report with some of its judges, in this order.

        Args:
            judges: their names here -> what they are called from now on.
        """
        known = {judge["name"]: judge for judge in self.judges}
        own = self.judges[0]["name"]
        first, *rest = judges
        rows = []
        for row in self.rows:
            told = row.others | ({own: row.opinion} if row.others else {})
            others = {judges[name]: told[name] for name in rest if name in told}
            seen = row if first == own else row.under(first)
            rows.append(replace(seen, others=others))
        chosen = [known[name] | {"name": new} for name, new in judges.items()]
        facts = {k: v for k, v in self.facts.items() if k != "other_judges"}
        facts |= {"judge": chosen[0]} | ({"other_judges": chosen[1:]} if rest else {})
        return Report(facts, rows)

    def tasks(self) -> list[str]:
        """Tasks in the order of their rows."""
        return list(dict.fromkeys(row.task for row in self.rows))

    def save(self, path: Path) -> None:
        """Write report.json: records, and the figures for readers that do no arithmetic.

        Raises:
            DataError: the file cannot be written.
        """
        rows = [_to_json(row) for row in self.rows]
        text = json.dumps(
            {"format": FORMAT, "format_version": FORMAT_VERSION, "facts": self.facts, "rows": rows},
            indent=1,
            ensure_ascii=False,
        )
        write_whole(path, text + "\n")


def figures(row: Row) -> dict[str, Any]:
    """Every figure of a row as plain numbers: value, low, high, count; or the value alone."""
    found: dict[str, Any] = {}
    for name in METRICS:
        if (figure := row.estimate(name)) is not None:
            values = asdict(figure)
            found[name] = {k: None if v != v else v for k, v in values.items()}  # NaN is not JSON
    return found | row.pooled


def _to_json(row: Row) -> dict[str, Any]:
    """With the figures; a row that one judge saw has no `others`."""
    values = asdict(row) | {"figures": figures(row)}
    for name, told in values.pop("others").items():
        of_judge = {k: v for k, v in figures(row.under(name)).items() if k in OF_JUDGE}
        values.setdefault("others", {})[name] = told | {"figures": of_judge}
    return values


def _from_json(values: dict[str, Any]) -> Row:
    told = values.get("others", {})
    others = {k: Opinion(list(v["records"]), dict(v["pooled"])) for k, v in told.items()}
    return Row(**{k: v for k, v in values.items() if k != "figures"} | {"others": others})


def load_report(path: Path) -> Report:
    """Read a report.json, or the one in a directory.

    Raises:
        DataError: it is missing, damaged, or not a report of ours.
    """
    file = path / "report.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, Mapping) or values.get("format") != FORMAT:
            raise ValueError("it is not a report of fsdfm evaluate")
        if values["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its format version is {values['format_version']}, not 1")
        rows = [_from_json(row) for row in values["rows"] if isinstance(row, dict)]
        report = Report(dict(values["facts"]), rows)
        if missing := FACTS - report.facts.keys():
            raise ValueError(f"its facts lack {', '.join(sorted(missing))}")
        if not all(isinstance(report.facts[k], dict) for k in ("judge", "heldout", "models")):
            raise ValueError("its facts are damaged")
        names = [judge["name"] for judge in report.judges]
        if len(set(names)) < len(names):
            raise ValueError("it has a judge twice")
        for row in report.rows:
            judged = any(sums for sums in row.opinion.records)
            if row.others.keys() != (set(names[1:]) if judged else set()):
                raise ValueError(f"a row of {row.name} lacks a judge")
            if any(len(told.records) != len(row.records) for told in row.others.values()):
                raise ValueError(f"a row of {row.name} lacks a sample's judgement")
            said = [n for told in row.others.values() for n in (*told.records, told.pooled)]
            values = [v for numbers in (*row.records, row.pooled, *said) for v in numbers.values()]
            if not all(isinstance(v, int | float) for v in values):
                raise ValueError("a record holds something else than numbers")
            if not all(isinstance(v, int | float | None) for v in row.setting[1:]):
                raise ValueError("steps or temperature of a row are no numbers")
        return report
    except FileNotFoundError:
        raise DataError(f"There is no report {file}: make one with fsdfm evaluate.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"Cannot read report {file}: {error}.") from None


def frontier(rows: Sequence[Row], name: str, task: str, steps: int | None) -> list[Row]:
    """One model's rows at one budget over temperatures, coolest first."""
    found = [r for r in rows if (r.name, r.task, r.steps) == (name, task, steps)]
    return sorted(found, key=lambda r: r.temperature or 0.0)
