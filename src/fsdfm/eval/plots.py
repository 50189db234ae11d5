"""Pictures of a report: quality against calls, against entropy, and against time.

Each has a panel for every judge.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fsdfm.core.errors import ConfigError
from fsdfm.core.files import write_whole
from fsdfm.eval.report import Report, Row, frontier
from fsdfm.eval.several import views

SIZE_INCHES, DOTS_PER_INCH = (6.4, 4.4), 130
REFERENCE_STYLES = (":", "--", "-.", (0, (1, 4)))

Draw = Callable[[Any, Sequence[Row], Sequence[Row]], None]
"""(axes, generated rows, references)."""


def plot(report: Report, out: Path) -> list[Path]:
    """Write the pictures of the unconditional task.

    Args:
        report: what to show.
        out: directory for quality_nfe.png, quality_entropy.png and quality_seconds.png.

    Returns:
        The files written; none where nothing was generated unconditionally.

    Raises:
        ConfigError: matplotlib is missing.
        DataError: a file cannot be written.
    """
    check()
    rows = [r for r in report.rows if r.task == "unconditional"]
    if all(r.steps is None for r in rows):
        return []
    judges = [judge["name"] for judge in report.judges]
    panels = dict(zip(judges, views(rows, judges), strict=True))
    pictures: dict[str, Draw] = {
        "quality_nfe": lambda axes, made, given: _by_budget(axes, made, given, "nfe"),
        "quality_entropy": _frontiers,
        "quality_seconds": lambda axes, made, given: _by_budget(axes, made, given, "seconds"),
    }
    files = []
    for name, draw in pictures.items():
        files.append(out / f"{name}.png")
        write_whole(files[-1], _picture(draw, panels))
    return files


def check() -> None:
    """Raises ConfigError where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("Plots need matplotlib: pip install 'fsdfm[eval]'.")


def png(figure: Any) -> bytes:
    """A figure of matplotlib as a file that says nothing of who wrote it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _picture(draw: Draw, panels: dict[str, list[Row]]) -> bytes:
    """A panel for each judge, side by side.

    Args:
        draw: fills one panel, told the generated rows and the references.
        panels: the rows as each judge sees them, by the judge's name.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    width, height = SIZE_INCHES
    figure = Figure(figsize=(width * len(panels), height), dpi=DOTS_PER_INCH, layout="constrained")
    for number, (judge, rows) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), number)
        generated = [r for r in rows if r.steps is not None]
        draw(axes, generated, [r for r in rows if r.kind == "reference"])
        axes.set_yscale("log")
        axes.set_ylabel("perplexity under {} (pooled)".format(judge.replace("$", r"\$")))
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles, [label.replace("$", r"\$") for label in labels], fontsize=8)
    return png(figure)


def _by_budget(axes: Any, rows: Sequence[Row], references: Sequence[Row], column: str) -> None:
    """One line a model (and temperature), with the interval of each point."""
    for name, heat in dict.fromkeys((r.name, r.temperature) for r in rows):
        line = [r for r in rows if (r.name, r.temperature) == (name, heat)]
        points = sorted(
            (x.value, y.value, max(0.0, y.value - y.low), max(0.0, y.high - y.value))
            for r in line
            if (x := r.estimate(column)) and (y := r.estimate("ppl_pooled"))
        )
        if points:
            label = name if heat == 1.0 else f"{name}, temperature {heat:g}"
            across, up, below, above = zip(*points, strict=True)
            errors = (below, above) if len(line[0].records) > 1 else None
            axes.errorbar(across, up, yerr=errors, marker="o", capsize=3, label=label)
    for style, row in zip(_styles(), references, strict=False):
        if figure := row.estimate("ppl_pooled"):
            axes.axhline(figure.value, color="grey", linestyle=style, label=row.name)
    if column == "nfe":
        calls = sorted({r.steps for r in rows if r.steps is not None})
        axes.set_xscale("log", base=2)
        axes.set_xticks(calls, [str(n) for n in calls])
        axes.set_xlabel("model calls (NFE)")
    else:
        axes.set_xscale("log")
        axes.set_xlabel("seconds a text (batch time / its texts)")


def _frontiers(axes: Any, rows: Sequence[Row], references: Sequence[Row]) -> None:
    """One curve a model and budget over temperatures; down and to the right is better."""
    for name, steps in dict.fromkeys((r.name, r.steps) for r in rows):
        curve = [
            (x.value, y.value)
            for r in frontier(rows, name, "unconditional", steps)
            if (x := r.estimate("entropy_nats")) and (y := r.estimate("ppl_pooled"))
        ]
        if curve:
            axes.plot(*zip(*curve, strict=True), marker="o", label=f"{name}, {steps} steps")
    for marker, row in zip("*Xsd", references, strict=False):
        x, y = row.estimate("entropy_nats"), row.estimate("ppl_pooled")
        if x and y:
            axes.plot(x.value, y.value, marker, color="grey", markersize=9, label=row.name)
    axes.set_xlabel("entropy of a text's own tokens, nats")


def _styles() -> Iterator[Any]:
    while True:
        yield from REFERENCE_STYLES
