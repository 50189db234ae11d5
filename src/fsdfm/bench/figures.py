"""What a run did cost, beside what it should at least: rows and tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fsdfm.core.files import write_whole


@dataclass(frozen=True, slots=True)
class Row:
    """One side at one job. Seconds are medians over runs."""

    task: str
    side: str
    shape: str
    batch: int
    length: int
    steps: int
    malloc: str
    dtype: str
    seconds: float | None
    """Of one run; None where the side failed."""
    runs: list[float]
    """Seconds of each run, in order."""
    cpu_seconds: float | None
    """Of all threads of the process, in one run: what a busy machine leaves alone."""
    speedup: float | None
    """Seconds of the first side of this job over this one's."""
    tokens_per_second: float | None
    loaded_bytes: int | None
    """Held between runs: weights, packed weights, averages, moments."""
    memory_bytes: int | None
    """Peak of one run beyond the loaded model."""
    over_floor: float | None
    """Time over that of the run's own FLOPs at the rate of a bare matrix product, measured beside
    each run (a bfloat16 product for int8)."""
    of_peak: float | None
    """The run's FLOPs a second over the device's peak, if one was given."""
    split: dict[str, float] | None
    """Shares of an engine's time."""
    error: str | None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)


HEADERS = (
    "side",
    "seconds",
    "CPU s",
    "speed-up",
    "tokens/s",
    "held",
    "extra memory",
    "time / floor",
)


def cells(row: Row) -> list[str]:
    """A row's cells, under HEADERS."""
    if row.error is not None:
        return [row.side, "failed", *["-"] * (len(HEADERS) - 2)]
    return [
        row.side,
        _number(row.seconds, ".3f"),
        _number(row.cpu_seconds, ".3f"),
        _number(row.speedup, ".2f"),
        _number(row.tokens_per_second, ",.0f"),
        _mebibytes(row.loaded_bytes),
        _mebibytes(row.memory_bytes),
        _number(row.over_floor, ".2f"),
    ]


def title(row: Row) -> str:
    """What the rows of one job have in common."""
    what = f"{row.task}, {row.shape}, {row.batch} x {row.length} tokens, {row.steps} step"
    what += "s" * (row.steps > 1)
    return what + (f", malloc {row.malloc}" if row.malloc != "default" else "")


def grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by title, in order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(title(row), []).append(row)
    return groups


def markdown(rows: Sequence[Row]) -> str:
    """One table for each job."""
    lines = []
    for name, group in grouped(rows).items():
        lines += [f"**{name}**", "", _line(HEADERS), _line(["---"] * len(HEADERS))]
        lines += [_line(cells(row)) for row in group] + [""]
        lines += [f"{row.side}: {_shares(row.split)}\n" for row in group if row.split]
        lines += [f"{row.side}: {row.of_peak:.1%} of peak\n" for row in group if row.of_peak]
        lines += [f"{row.side}: {row.error}\n" for row in group if row.error]
    return "\n".join(lines)


def per_step(rows: Sequence[Row]) -> list[str]:
    """What the engine's longest budget took, in times of its shortest; steps should grow cheaper.

    A step on which few positions move needs the head on few rows, so N steps should take less than
    N times one step.
    """
    found = []
    groups: dict[tuple[str, str, int, int, str], list[Row]] = {}
    for row in rows:
        if row.side.startswith("engine") and row.seconds is not None:
            key = row.side, row.shape, row.batch, row.length, row.malloc
            groups.setdefault(key, []).append(row)
    for (side, shape, batch, length, malloc), group in groups.items():
        few, many = (choose(group, key=lambda row: row.steps) for choose in (min, max))
        if few.steps < many.steps and few.seconds and many.seconds:
            ratio, steps = many.seconds / few.seconds, many.steps / few.steps
            found.append(
                f"{side}, {shape}, {batch} x {length} tokens, malloc {malloc}: {many.steps:,} "
                f"steps take {ratio:.2f} x as long as {few.steps}: {ratio / steps:.2f} of {steps:g}"
            )
    return found


def described(facts: Mapping[str, Any]) -> str:
    """Machine and limits as one line."""
    numbers = (f"{v:,.0f}" if isinstance(v, float) else v for v in facts.values())
    return ", ".join(f"{name} {value}" for name, value in zip(facts, numbers, strict=True))


def report(facts: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Machine, tables, and how the engine's time grows with its steps, as Markdown."""
    lines = [described(facts), "", markdown(rows)]
    return "\n".join([*lines, *(f"{line}\n" for line in per_step(rows))])


def write_report(out: Path, facts: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """All that is known so far, as results.json and results.md of a directory."""
    record = {**facts, "rows": [row.to_dict() for row in rows]}
    write_whole(out / "results.json", json.dumps(record, indent=1) + "\n")
    write_whole(out / "results.md", report(facts, rows))


def median(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return statistics.median(values) if values else None


def _shares(split: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in split.items())


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.0f} MiB"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
