"""What a study shows: tables with the start of every student, intervals and costs; a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from fsdfm.core.files import write_whole
from fsdfm.eval.plots import png
from fsdfm.study.curve import budget
from fsdfm.study.languages import Cell, Language, Row
from fsdfm.study.protocol import Study

Key = tuple[str, int, str, float]
"""Recipe, seed, weights, power of the grid."""
SAID = {"start": "update 0", "last": "last weights", "average": "average"}


def tables(study: Study) -> str:
    """All tables of a study in Markdown: a figure each, then what everything cost.

    Args:
        study: with the rows so far; the teacher's many calls are judged now if they are not.
    """
    language, goal, floors = study.language, study.goal(), study.floors()
    parts = []
    for measure, title in language.measures.items():
        found = cells(study.rows, language, goal, measure, study.protocol.calls)
        many = language.cell([goal], goal, measure).text(language.digits)
        lines = [f"{title.capitalize()}. Teacher in {study.protocol.many} calls: {many}."]
        for name, row in floors.items():
            lines.append(f"{name}: {language.cell([row], goal, measure).text(language.digits)}.")
        parts.append("\n".join(lines) + "\n\n" + table(found, study.protocol.calls, language))
    parts.append(costs(study.rows))
    return "\n\n".join(parts) + "\n"


def cells(
    rows: Iterable[Row], language: Language, goal: Row, measure: str, calls: Sequence[int]
) -> dict[Key, dict[int, Cell]]:
    """Figures by row of the table, and by budget."""
    swept: dict[Key, dict[int, list[Row]]] = {}
    for row in rows:
        if row["calls"] in calls:
            swept.setdefault(key_of(row), {}).setdefault(row["calls"], []).append(row)
    return {
        key: {n: language.cell(each, goal, measure) for n, each in by_calls.items()}
        for key, by_calls in swept.items()
    }


def key_of(row: Row) -> Key:
    """Which row of the table a row of results belongs to."""
    return str(row["recipe"]), int(row["seed"]), str(row["weights"]), float(row["power"])


def table(found: dict[Key, dict[int, Cell]], calls: Sequence[int], language: Language) -> str:
    """One figure, in Markdown."""
    lines = [
        f"| recipe | seed | weights | grid | {' | '.join(map(budget, calls))} |",
        "|---" * (4 + len(calls)) + "|",
    ]
    for (name, seed, weights, power), by_calls in found.items():
        texts = [by_calls[n].text(language.digits) if n in by_calls else "" for n in calls]
        said = "" if name == "teacher" else SAID[weights]
        lines.append(f"| {name} | {seed} | {said} | {power:g} | {' | '.join(texts)} |")
    return "\n".join(lines)


def costs(rows: Iterable[Row]) -> str:
    """What each recipe was given, and what a text of it costs."""
    lines = [
        "| recipe | grid | calls | learning rate | window of the average | updates | "
        "forward passes of training | body passes | head passes | seconds a text |",
        "|---" * 10 + "|",
    ]
    seen = set()
    for row in rows:
        key = (row["recipe"], row["power"], row["calls"])
        if key in seen:
            continue
        seen.add(key)
        given = [f"{row[name]:.3g}" if name in row else "" for name in ("learning_rate", "window")]
        passes = f"{row['updates'] * row.get('cost', 0.0):,.0f}"
        lines.append(
            f"| {row['recipe']} | {row['power']:g} | {row['calls']} | {given[0]} | {given[1]} | "
            f"{row['updates']:,} | {passes} | {row['body_passes']:g} | {row['head_passes']:.2f} | "
            f"{row['seconds']:.2g} |"
        )
    return "\n".join(lines)


def picture(study: Study, path: Path) -> None:
    """The first measure against calls: a line a recipe, its average of the first seed."""
    from matplotlib.figure import Figure

    language, goal = study.language, study.goal()
    measure, title = next(iter(language.measures.items()))
    found = cells(study.rows, language, goal, measure, study.protocol.calls)
    figure = Figure(figsize=(7.5, 4.6), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for (name, seed, weights, power), by_calls in found.items():
        if weights == "average" and seed == study.protocol.seeds[0]:
            steps = sorted(by_calls)
            middles = [by_calls[n].middle for n in steps]
            below = [by_calls[n].middle - by_calls[n].low for n in steps]
            above = [by_calls[n].high - by_calls[n].middle for n in steps]
            label = f"{name}, grid of power {power:g}"
            axes.errorbar(steps, middles, (below, above), marker="o", capsize=3, label=label)
    many = language.cell([goal], goal, measure).middle
    axes.axhline(many, color="black", linestyle=":", label=f"teacher, {study.protocol.many} calls")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(study.protocol.calls, [str(n) for n in study.protocol.calls])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("model calls")
    axes.set_ylabel(textwrap.fill(title, 45))
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    write_whole(path, png(figure))
