"""Reports side by side: which differences are real, and quality at equal entropy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fsdfm.eval.report import METRICS, OF_JUDGE, Report, Row, frontier
from fsdfm.eval.several import flattered, views
from fsdfm.eval.statistics import Estimate, Ratio, difference, matched, quotient
from fsdfm.eval.tables import apart, line_of, setting, table

COMPARED = (
    "ppl_pooled",
    "bits_per_byte",
    "entropy_nats",
    "repetition_4",
    "token_accuracy",
    "elbo_bits_per_byte",
)
COMPARABLE = {
    "entropy_nats": ("tokenizer",),
    "repetition_4": ("tokenizer",),
    "token_accuracy": ("tokenizer",),
    "elbo_bits_per_byte": ("source",),
}
"""What two models must share for a figure to be compared. (Times of a row are no independent draws:
no interval of theirs would hold, so none is compared.)"""
ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class Difference:
    """One model against the baseline at one setting, in one figure."""

    name: str
    row: Row
    baseline: Row
    metric: str
    figure: Estimate
    """Ratio to the baseline, or difference from it, with an interval for all comparisons
    together."""
    judge: str | None = None
    """Whose figure it is, where there are several judges and it depends on them."""

    @property
    def verdict(self) -> str:
        """Whether the interval leaves out equality."""
        equal = 1.0 if METRICS[self.metric].compared_by == "ratio" else 0.0
        if math.isnan(self.figure.low):
            return "one sample: cannot tell"
        if self.figure.low > equal:
            return "**higher**"
        return "**lower**" if self.figure.high < equal else "no clear difference"


@dataclass(frozen=True, slots=True)
class Named:
    """A row of one of several reports."""

    name: str
    """The model's, with its report's where two reports have one of this name."""
    row: Row
    about: Mapping[str, Any]
    """Facts of its model and its report."""


def named_rows(reports: Sequence[tuple[str, Report]]) -> list[Named]:
    """Rows of all reports, told apart by name; reference rows of the first report that has them.

    Args:
        reports: each with a label of its own.
    """
    assert len({label for label, _ in reports}) == len(reports)
    owners: dict[str, set[str]] = {}
    for label, report in reports:
        for row in report.rows:
            if row.kind == "model":
                owners.setdefault(row.name, set()).add(label)
    found: list[Named] = []
    seen: set[tuple[str, str]] = set()
    for label, report in reports:
        for row in report.rows:
            name = row.name
            if row.kind == "reference":
                if (name, row.task) in seen:
                    continue
                seen.add((name, row.task))
            elif len(owners[name]) > 1:
                name = f"{label}: {name}"
            kept = replace(row, name=name)
            if label != reports[0][0]:  # pooled figures stand beside one report's human row only
                others = {judge: replace(told, pooled={}) for judge, told in row.others.items()}
                kept = replace(kept, pooled={}, others=others)
            found.append(Named(name, kept, report.facts["models"].get(row.name, {})))
    return found


def differences(
    rows: Sequence[Named], baseline: str, judges: Sequence[str] = ("",)
) -> list[Difference]:
    """Every model against the baseline wherever their settings agree, under each judge.

    The intervals hold for all comparisons together: each has level 1 - 0.05 / m for m of them
    (Bonferroni). Figures that the models do not share a unit of are left out (COMPARABLE).

    Args:
        rows: of reports of these judges.
        baseline: name of a model.
        judges: their names.
    """
    base = {named.row.setting: named for named in rows if named.name == baseline}
    pairs = []
    for named in rows:
        other = base.get(named.row.setting)
        if named.row.kind != "model" or named.name == baseline or other is None:
            continue
        for metric in COMPARED:
            needed = COMPARABLE.get(metric, ())
            if any(named.about.get(k) != other.about.get(k) for k in needed):
                continue
            several = metric in OF_JUDGE and len(judges) > 1
            both = views([named.row, other.row], judges if several else judges[:1])
            for judge, (row, base_row) in zip(judges, both, strict=False):
                sides = _sides(row, base_row, metric)
                if sides is not None:
                    pairs.append((named, other, metric, judge if several else None, *sides))
    found = []
    level = 1.0 - ALPHA / max(1, len(pairs))
    for named, other, metric, by, a, b in pairs:
        compare = quotient if METRICS[metric].compared_by == "ratio" else difference
        figure = compare(a, b, level=level)
        found.append(Difference(named.name, named.row, other.row, metric, figure, by))
    return found


def _sides(a: Row, b: Row, metric: str) -> tuple[Ratio, Ratio] | None:
    """The sums of both rows: of the pairs that both have, where they have equally many samples."""
    paired = len(a.records) == len(b.records)
    both = a.has(metric) & b.has(metric) if paired else None
    left, right = a.ratio(metric, both), b.ratio(metric, both)
    if left is None or right is None:
        return None
    if METRICS[metric].compared_by == "ratio" and min(left.value, right.value) <= 0.0:
        return None
    return left, right


def comparison(
    rows: Sequence[Named], baseline: str, judges: Sequence[Mapping[str, Any]] = ({"name": ""},)
) -> str:
    """All rows side by side, the differences from the baseline, and quality at equal entropy.

    Args:
        rows: of reports of these judges.
        baseline: name of a model.
        judges: facts of each judge.
    """
    names = [judge["name"] for judge in judges]
    lines = ["# Comparison", ""]
    models = {n.name: n.about.get("ancestors", ()) for n in rows if n.row.kind == "model"}
    for task in dict.fromkeys(named.row.task for named in rows):
        chosen = [named.row for named in rows if named.row.task == task]
        judged = {row.name for row in chosen if any(row.opinion.records)}
        notes = flattered(judges, {k: v for k, v in models.items() if k in judged})
        lines += [f"## {task.capitalize()}", "", *table(chosen, names), *apart(notes), ""]
    found = differences(rows, baseline, names)
    lines += [f"## Against {baseline}", ""]
    if not found:
        lines += ["No other model has a row at the same task, steps and temperature.", ""]
    else:
        lines += [
            f"Perplexities as ratios, the rest as differences; {len(found)} comparisons whose "
            "intervals hold together at 95 % (Student's with the jackknife's error, Bonferroni). "
            "Bold is a real difference. Figures of tokens are compared between models of one "
            "tokenizer, bounds between models of one source, times not at all.",
            "",
            line_of(["model", "task", "setting", "figure", "against baseline", "interval", "so"]),
            line_of(["---"] * 7),
        ]
        for d in found:
            by = "x" if METRICS[d.metric].compared_by == "ratio" else ""
            figure = d.figure
            value = f"{figure.value:.3f}{by}" if by else f"{figure.value:+.3f}"
            interval = f"{figure.low:.3f} to {figure.high:.3f}"
            where = setting(d.row).lstrip(", ")
            metric = d.metric if d.judge is None else f"{d.metric} ({d.judge})"
            lines.append(line_of([d.name, d.row.task, where, metric, value, interval, d.verdict]))
        lines.append("")
    # Entropies have one unit only between models of one tokenizer.
    tokenizer = next((n.about.get("tokenizer") for n in rows if n.name == baseline), None)
    alike = [n.row for n in rows if n.about.get("tokenizer") == tokenizer]
    seen = list(zip(names, views(alike, names), strict=True))
    for read in (_beside_a_tempered_baseline, _at_equal_entropy):
        for name, as_seen in seen:
            lines += read(as_seen, baseline, f", judge {name}" if len(seen) > 1 else "")
    return "\n".join(lines)


def _at_equal_entropy(rows: Sequence[Row], baseline: str, judge: str) -> list[str]:
    """Perplexities interpolated over temperatures to one entropy, where there are sweeps."""
    lines: list[str] = []
    for task in dict.fromkeys(row.task for row in rows):
        of_task = [row for row in rows if row.task == task]
        anchors = [r for r in of_task if r.name == baseline and r.temperature is not None]
        if not anchors:
            continue
        anchor = max(anchors, key=lambda r: (r.steps or 0, -abs((r.temperature or 0.0) - 1.0)))
        entropy, quality = anchor.estimate("entropy_nats"), anchor.estimate("ppl_pooled")
        if entropy is None or quality is None:
            continue
        body = []
        for name, steps in dict.fromkeys((r.name, r.steps) for r in of_task if r.kind == "model"):
            curve = _curve(frontier(of_task, name, task, steps))
            if len(curve) > 1:
                found = matched(curve, entropy.value)
                figure = "out of range" if found is None else f"{found:.1f}"
                ratio = "" if found is None else f"{found / quality.value:.2f}x"
                span = f"{min(h for h, _ in curve):.2f} to {max(h for h, _ in curve):.2f}"
                body.append(line_of([name, str(steps), span, figure, ratio]))
        if body:
            lines += [
                f"## At equal entropy: {task}{judge}",
                "",
                f"`ppl_pooled` at {entropy.value:.2f} nats, the entropy of {anchor.name}"
                f"{setting(anchor)} (its own: {quality.value:.1f}), interpolated in ln ppl "
                "between temperatures.",
                "",
                line_of(["model", "steps", "entropies of its sweep", "ppl_pooled there", "ratio"]),
                line_of(["---"] * 5),
                *body,
                "",
            ]
    return lines


def _beside_a_tempered_baseline(rows: Sequence[Row], baseline: str, judge: str) -> list[str]:
    """Each model against the baseline at the same budget, cooled or heated to the same entropy."""
    body = []
    for row in rows:
        curve = _curve(frontier(rows, baseline, row.task, row.steps))
        entropy, quality = row.estimate("entropy_nats"), row.estimate("ppl_pooled")
        if row.kind != "model" or row.name == baseline or len(curve) < 2:
            continue
        if entropy is None or quality is None:
            continue
        found = matched(curve, entropy.value)
        there = "out of range" if found is None else f"{found:.1f}"
        ratio = "" if found is None else f"{quality.value / found:.2f}x"
        own = f"{quality.value:.1f} at {entropy.value:.2f}"
        body.append(line_of([row.name, row.task, setting(row).lstrip(", "), own, there, ratio]))
    if not body:
        return []
    return [
        f"## Beside {baseline} at the same budget and entropy{judge}",
        "",
        f"What a temperature alone does for {baseline}: its `ppl_pooled` at the same budget where "
        "its sweep, interpolated in ln ppl, has the entropy of the row. Only a ratio below 1 is a "
        "gain that no temperature gives.",
        "",
        line_of(["model", "task", "setting", "its own, nats", f"{baseline} there", "ratio"]),
        line_of(["---"] * 6),
        *body,
        "",
    ]


def _curve(rows: Iterable[Row]) -> list[tuple[float, float]]:
    found = []
    for row in rows:
        entropy, quality = row.estimate("entropy_nats"), row.estimate("ppl_pooled")
        if entropy is not None and quality is not None:
            found.append((entropy.value, math.log(quality.value)))
    return found
