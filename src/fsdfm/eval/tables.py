"""Reports as Markdown tables, and the comparison of several."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fsdfm.eval.report import METRICS, OF_JUDGE, POOLED, Report, Row, frontier
from fsdfm.eval.several import flattered, views
from fsdfm.eval.statistics import Estimate, Ratio, difference, matched, quotient

WITH_INTERVAL = ("ppl_pooled", "elbo_nats_per_token", "token_accuracy")
"""Figures whose interval a table has room for; report.json has them all."""
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


def markdown(report: Report) -> str:
    """The whole report as Markdown."""
    lines = ["# Evaluation", "", *_facts(report), ""]
    for task in report.tasks():
        lines += [f"## {task.capitalize()}", "", *section(report, task), ""]
    lines += ["## What the columns are", ""]
    about = {name: metric.about for name, metric in METRICS.items()} | POOLED
    shown = {column.metric for column in _columns([report.rows], [""])}
    lines += [f"- `{name}`: {text}" for name, text in about.items() if name in shown]
    lines += ["", "## Beginnings of the first samples", ""]
    for row in report.rows:
        if row.excerpt:
            text = " ".join(row.excerpt.split())
            lines += [f"**{row.name}, {row.task}{_setting(row)}**: {_escaped(text)}", ""]
    return "\n".join(lines)


def section(report: Report, task: str) -> list[str]:
    """Markdown lines: the table of a task, and whom its judges flatter."""
    rows = [row for row in report.rows if row.task == task]
    names = {row.name for row in rows if row.kind == "model" and any(row.opinion.records)}
    models = {k: v.get("ancestors", ()) for k, v in report.facts["models"].items() if k in names}
    notes = flattered(report.judges, models)
    return [*table(rows, [judge["name"] for judge in report.judges]), *_apart(notes)]


def table(rows: Sequence[Row], judges: Sequence[str] = ("",)) -> list[str]:
    """Markdown lines: one row of figures for each row of a task.

    Args:
        rows: of one report.
        judges: names of its judges; where there are several, columns that depend on them are named.
    """
    seen = views(rows, judges)
    columns = _columns(seen, judges)
    head = ["source", "steps", "temperature", "samples", *(column.title for column in columns)]
    lines = [_line(head), _line(["---"] * len(head))]
    for number, row in enumerate(rows):
        steps = "" if row.steps is None else str(row.steps)
        heat = "" if row.temperature is None else f"{row.temperature:g}"
        cells = [row.name, steps, heat, str(len(row.records))]
        cells += [cell(seen[column.judge][number], column.metric) for column in columns]
        lines.append(_line(cells))
    return lines


def cell(row: Row, column: str) -> str:
    """One figure as text, with its interval where there is room; empty where it has none."""
    if column in POOLED:
        value = row.pooled.get(column)
        return "" if value is None else f"{value:.3f}"
    figure = row.estimate(column)
    if figure is None:
        return ""
    digits = METRICS[column].digits
    text = f"{figure.value:.{digits}f}"
    if column in WITH_INTERVAL and not math.isnan(figure.low):
        text += f" ({figure.low:.{digits}f}-{figure.high:.{digits}f})"
    return text


@dataclass(frozen=True, slots=True)
class _Column:
    """A figure, as one of the judges sees it."""

    metric: str
    judge: int
    title: str


def _columns(seen: Sequence[Sequence[Row]], judges: Sequence[str]) -> list[_Column]:
    """The figures that any of the rows has, as each judge sees them."""
    found = []
    for name in (*METRICS, *POOLED):
        several = name in OF_JUDGE and len(judges) > 1
        for number, judge in enumerate(judges if several else judges[:1]):
            if any(_has(row, name) for row in seen[number]):
                found.append(_Column(name, number, f"{name} ({judge})" if several else name))
    return found


def _has(row: Row, name: str) -> bool:
    return name in row.pooled if name in POOLED else row.ratio(name) is not None


def _apart(notes: Sequence[str]) -> list[str]:
    """Lines under a table, each a paragraph."""
    return [line for note in notes for line in ("", note)]


def _facts(report: Report) -> list[str]:
    facts = report.facts
    heldout = facts["heldout"]
    lines = [
        f"- fsdfm {facts['fsdfm']}, torch {facts['torch']}, {facts['machine']}",
        f"- texts of {facts['length']} tokens, seeds from {facts['seed']}, batches of "
        f"{facts['batch_size']}" + (f", preset {facts['preset']}" if facts["preset"] else ""),
        *(
            f"- judge: {judge['name']}, {judge['parameters'] / 1e6:.0f} M parameters, "
            f"{judge['dtype']}, windows of {judge['window_tokens']} tokens, "
            f"stride {judge['stride_tokens']}"
            for judge in report.judges
        ),
        f"- held-out text: {heldout['name']}, {heldout['blocks']} blocks",
    ]
    for name, model in facts["models"].items():
        lines.append(
            f"- {name}: {model['parameters'] / 1e6:.1f} M parameters, {model['dtype']}, "
            f"{model['source']} source, step embedding {model['step_embedding']}, {model['step']} "
            f"rule, {model['movers']} movers, {model.get('grid', 'even')} grid, "
            f"{model.get('draws', 1)} draws a call, {model.get('seams', 'fixed')} seams, "
            f"top-p {model['top_p']:g}"
            + (f", from {', '.join(model['ancestors'])}" if model.get("ancestors") else "")
        )
    lines.append("- intervals: 95 %, bootstrap over samples; too short for very few of them")
    return lines


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
        lines += [f"## {task.capitalize()}", "", *table(chosen, names), *_apart(notes), ""]
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
            _line(["model", "task", "setting", "figure", "against baseline", "interval", "so"]),
            _line(["---"] * 7),
        ]
        for d in found:
            by = "x" if METRICS[d.metric].compared_by == "ratio" else ""
            figure = d.figure
            value = f"{figure.value:.3f}{by}" if by else f"{figure.value:+.3f}"
            interval = f"{figure.low:.3f} to {figure.high:.3f}"
            setting = _setting(d.row).lstrip(", ")
            metric = d.metric if d.judge is None else f"{d.metric} ({d.judge})"
            lines.append(_line([d.name, d.row.task, setting, metric, value, interval, d.verdict]))
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
                body.append(_line([name, str(steps), span, figure, ratio]))
        if body:
            lines += [
                f"## At equal entropy: {task}{judge}",
                "",
                f"`ppl_pooled` at {entropy.value:.2f} nats, the entropy of {anchor.name}"
                f"{_setting(anchor)} (its own: {quality.value:.1f}), interpolated in ln ppl "
                "between temperatures.",
                "",
                _line(["model", "steps", "entropies of its sweep", "ppl_pooled there", "ratio"]),
                _line(["---"] * 5),
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
        body.append(_line([row.name, row.task, _setting(row).lstrip(", "), own, there, ratio]))
    if not body:
        return []
    return [
        f"## Beside {baseline} at the same budget and entropy{judge}",
        "",
        f"What a temperature alone does for {baseline}: its `ppl_pooled` at the same budget where "
        "its sweep, interpolated in ln ppl, has the entropy of the row. Only a ratio below 1 is a "
        "gain that no temperature gives.",
        "",
        _line(["model", "task", "setting", "its own, nats", f"{baseline} there", "ratio"]),
        _line(["---"] * 6),
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


def _setting(row: Row) -> str:
    steps = "" if row.steps is None else f", {row.steps} steps"
    return steps + ("" if row.temperature is None else f", temperature {row.temperature:g}")


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


def _escaped(text: str) -> str:
    return "".join("\\" + c if c in "\\`*_{}[]<>#|" else c for c in text)
