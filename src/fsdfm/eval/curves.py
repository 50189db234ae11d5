"""Pictures of trainings: what their metrics.jsonl says, by updates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdfm.core.errors import DataError
from fsdfm.core.files import one_line
from fsdfm.eval.plots import DOTS_PER_INCH, check, png

PANELS = {
    "loss": "training loss, nats",
    "elbo_nats_per_token": "validation bound, nats a token",
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm, before clipping",
    "tokens_per_second": "tokens a second",
    "utilisation": "share of the peak",
}
"""Figures of a line of metrics.jsonl, and what a picture calls them."""
ACROSS = 3
PANEL_INCHES = 4.6, 3.2
OUTLIERS = 0.02
"""Of the points of a loss, how many of the highest may be cut off: those of the first updates."""


@dataclass(frozen=True, slots=True)
class Curves:
    """What one run wrote."""

    name: str
    records: list[dict[str, Any]]

    def points(self, figure: str, bucket: str | None = None) -> tuple[list[int], list[float]]:
        """Updates and values of a figure, or of one bucket of a table."""
        steps, values = [], []
        for record in self.records:
            value = record.get(figure)
            if bucket is not None:
                value = value.get(bucket) if isinstance(value, dict) else None
            if isinstance(value, int | float):
                steps.append(record["step"])
                values.append(float(value))
        return steps, values

    @property
    def tables(self) -> dict[str, list[str]]:
        """Figures that have a value a bucket, and the names of the buckets."""
        return {
            name: list(value)
            for record in self.records
            for name, value in record.items()
            if isinstance(value, dict)
        }


def read_curves(run: Path) -> Curves:
    """What a run wrote so far.

    Args:
        run: its directory, or a file like its metrics.jsonl.

    Raises:
        DataError: there is no such file, or no line of metrics in it.
    """
    path = run if run.is_file() else run / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(
            f"Cannot read {path} ({one_line(error)}): give directories of training runs."
        ) from None
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a run may be half written
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    if not records:
        raise DataError(f"{path} has no line of metrics yet: wait for the first one.")
    return Curves(path.parent.name if path.name == "metrics.jsonl" else path.stem, records)


def picture(runs: Sequence[Curves]) -> bytes:
    """A PNG with a panel for each figure; of a single run, also for each table.

    Raises:
        ConfigError: matplotlib is missing.
    """
    check()
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    shown = [name for name in PANELS if any(run.points(name)[0] for run in runs)]
    tables = runs[0].tables if len(runs) == 1 else {}
    count = len(shown) + len(tables)
    down, (width, height) = -(-count // ACROSS), PANEL_INCHES
    size = width * min(count, ACROSS), height * down
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    for number, name in enumerate((*shown, *tables), start=1):
        axes = figure.add_subplot(down, min(count, ACROSS), number)
        if name in tables:
            _table(axes, runs[0], name, tables[name])
        else:
            _curves(axes, runs, name)
        axes.set_xlabel("updates")
        axes.grid(alpha=0.3, linewidth=0.5)
    return png(figure)


def _curves(axes: Any, runs: Sequence[Curves], name: str) -> None:
    """One line a run."""
    high: list[float] = []
    for run, label in zip(runs, _labels(runs), strict=True):
        steps, values = run.points(name)
        marker = "o" if len(steps) < 30 else None
        axes.plot(steps, values, marker=marker, markersize=3, linewidth=1.2, label=label)
        high += values
    axes.set_title(PANELS[name], fontsize=10)
    if name in ("loss", "gradient_norm"):
        _cut(axes, high)
    if len(runs) > 1:
        axes.legend(fontsize=7)


def _table(axes: Any, run: Curves, name: str, buckets: Sequence[str]) -> None:
    """One line a bucket, from dark to light."""
    from matplotlib import colormaps

    high: list[float] = []
    for number, bucket in enumerate(buckets):
        colour = colormaps["viridis"](0.95 * number / max(1, len(buckets) - 1))
        steps, values = run.points(name, bucket)
        axes.plot(steps, values, linewidth=1.2, color=colour, label=bucket)
        high += values
    _cut(axes, high)
    what, _, by = name.rpartition("_by_")
    kinds: Mapping[str, str] = {"t": "time, from", "h": "step size"}
    axes.set_title(f"{what.replace('_', ' ')}, nats, by {kinds.get(by, by)}", fontsize=10)
    axes.legend(fontsize=6, ncols=2)


def _cut(axes: Any, values: Sequence[float]) -> None:
    """Leave out the highest points, where they would press all others flat."""
    if not values:
        return
    order = sorted(values)
    low, usual = order[0], order[int((1.0 - OUTLIERS) * (len(order) - 1))]
    if order[-1] - low > 3.0 * (usual - low) > 0.0:
        axes.set_ylim(low - 0.05 * (usual - low), usual + 0.3 * (usual - low))


def _labels(runs: Sequence[Curves]) -> list[str]:
    """Names of the runs, numbered where two are called the same."""
    names = [run.name.replace("$", r"\$") for run in runs]
    return [
        f"{name} ({number})" if names.count(name) > 1 else name
        for number, name in enumerate(names, start=1)
    ]
