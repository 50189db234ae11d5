"""A report as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fsdfm.eval.report import METRICS, OF_JUDGE, POOLED, Report, Row
from fsdfm.eval.settings import PLAIN
from fsdfm.eval.several import flattered, views

WITH_INTERVAL = ("ppl_pooled", "elbo_nats_per_token", "token_accuracy")
"""Figures whose interval a table has room for; report.json has them all."""

RARE = ("top_k", "min_p", "repetition_penalty")
"""Sampling options that are told where a model has some."""


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
            lines += [f"**{row.name}, {row.task}{setting(row)}**: {_escaped(text)}", ""]
    return "\n".join(lines)


def section(report: Report, task: str) -> list[str]:
    """Markdown lines: the table of a task, and whom its judges flatter."""
    rows = [row for row in report.rows if row.task == task]
    names = {row.name for row in rows if row.kind == "model" and any(row.opinion.records)}
    models = {k: v.get("ancestors", ()) for k, v in report.facts["models"].items() if k in names}
    notes = flattered(report.judges, models)
    return [*table(rows, [judge["name"] for judge in report.judges]), *apart(notes)]


def table(rows: Sequence[Row], judges: Sequence[str] = ("",)) -> list[str]:
    """Markdown lines: one row of figures for each row of a task.

    Args:
        rows: of one report.
        judges: names of its judges; where there are several, columns that depend on them are named.
    """
    seen = views(rows, judges)
    columns = _columns(seen, judges)
    head = ["source", "steps", "temperature", "samples", *(column.title for column in columns)]
    lines = [line_of(head), line_of(["---"] * len(head))]
    for number, row in enumerate(rows):
        steps = "" if row.steps is None else str(row.steps)
        heat = "" if row.temperature is None else f"{row.temperature:g}"
        cells = [row.name, steps, heat, str(len(row.records))]
        cells += [cell(seen[column.judge][number], column.metric) for column in columns]
        lines.append(line_of(cells))
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


def apart(notes: Sequence[str]) -> list[str]:
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
            + "".join(f", {n} {model[n]:g}" for n in RARE if model.get(n, PLAIN[n]) != PLAIN[n])
            + (f", from {', '.join(model['ancestors'])}" if model.get("ancestors") else "")
        )
    lines.append("- intervals: 95 %, bootstrap over samples; too short for very few of them")
    return lines


def setting(row: Row) -> str:
    """Steps and temperature of a row, to be put after a name."""
    steps = "" if row.steps is None else f", {row.steps} steps"
    return steps + ("" if row.temperature is None else f", temperature {row.temperature:g}")


def line_of(cells: Iterable[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"


def _escaped(text: str) -> str:
    return "".join("\\" + c if c in "\\`*_{}[]<>#|" else c for c in text)
