"""How a recipe comes along: one run, judged at its start and after some numbers of updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fsdfm.core.errors import ConfigError
from fsdfm.model.transformer import FlowNetwork
from fsdfm.study.languages import KnownLaw, Row, Setting
from fsdfm.study.protocol import append, read
from fsdfm.study.recipes import TEACHER, Recipe
from fsdfm.study.training import Watch, at_snapshot, origin, snapshot, started, task_of, trained

SAVED_EVERY = 40
"""Updates between two checkpoints; snapshots lie on its multiples."""


class Curve:
    """One run on the known law, and its rows.

    Args:
        language: with the teacher, and the settings of the run (a checkpoint every SAVED_EVERY).
        recipe: how the student is made; it is drawn on the even grid.
        run: its directory.
        updates: after how many it is judged; multiples of SAVED_EVERY.

    Raises:
        ConfigError: other numbers of updates.
    """

    def __init__(
        self,
        language: KnownLaw,
        recipe: Recipe,
        run: Path,
        updates: Sequence[int],
    ) -> None:
        if any(step % SAVED_EVERY for step in updates):
            raise ConfigError(f"updates are multiples of {SAVED_EVERY}.", "updates")
        self.language, self.recipe, self.run, self.updates = language, recipe, run, updates

    def train(self) -> None:
        """Leave a snapshot after each of the updates; goes on where it stopped.

        Raises:
            Stopped: it was interrupted.
            ConfigError: the directory has a run of other settings, recipe or teacher.
        """
        language, seed = self.language, self.language.settings.seed
        model = started(self.recipe, language, seed)
        task = task_of(self.recipe.objective(language.source), language.source, language, seed)
        watch = Watch(self.run.name, self.run, model, self.updates)
        trained(self.run, language.settings, task, watch, origin(self.recipe, language))

    def rows(self, calls: Sequence[int], samples: int) -> list[Row]:
        """Of the teacher by both step rules, the start and the snapshots so far; kept as they come.

        Args:
            calls: budgets.
            samples: of a row.
        """
        self.run.mkdir(parents=True, exist_ok=True)
        path = self.run / "results.jsonl"
        rows, wanted = read(path), []

        def judged(name: str, updates: int, model: FlowNetwork, recipe: Recipe) -> None:
            for n in calls:
                facts = {"name": name, "updates": updates, "calls": n, "samples": samples}
                known = [row for row in rows if facts.items() <= row.items()]
                if not known:
                    known = [facts | self.language.draw(model, Setting(recipe, n, 1.0), samples, 0)]
                    rows.append(known[0])
                    append(path, known[0])
                wanted.append(known[0])

        for rule in dict.fromkeys((TEACHER.sampler, self.recipe.sampler)):
            recipe = replace(TEACHER, sampler=rule)
            judged(f"teacher, {rule} rule", 0, self.language.teacher, recipe)
        fresh = started(self.recipe, self.language, self.language.settings.seed).eval()
        judged("update 0", 0, fresh, self.recipe)
        for step in self.updates:
            for kind in ("average", "last"):
                if snapshot(self.run, step, kind).exists():
                    model = at_snapshot(fresh, self.run, step, kind)
                    judged(kind, step, model, self.recipe)
        return wanted


def curve_table(rows: Sequence[Row], calls: Sequence[int]) -> str:
    """In Markdown: mean of the windows; pooled; each in thousandths of a nat, with 95 %."""
    said = {"average": "average", "last": "last weights"}
    lines = [f"| | {' | '.join(map(budget, calls))} |", "|---" * (1 + len(calls)) + "|"]
    found = {(row["name"], row["updates"], row["calls"]): row for row in rows}
    for name, updates in dict.fromkeys(key[:2] for key in found):
        title = f"{updates:,} updates, {said[name]}" if name in said else name
        each = [found.get((name, updates, n)) for n in calls]
        texts = " | ".join("" if row is None else both(row) for row in each)
        lines.append(f"| {title} | {texts} |")
    return "\n".join(lines) + "\n"


def budget(calls: int) -> str:
    """Head of a column."""
    return f"{calls} call{'' if calls == 1 else 's'}"


def both(row: Row) -> str:
    """A cell: windows, then pooled."""
    texts = []
    for measure in ("windows_mean", "kl"):
        value, error = 1000.0 * row[measure], 1960.0 * row[f"{measure}_se"]
        digits = 1 if value < 100.0 and not math.isnan(value) else 0
        texts.append(f"{value:.{digits}f} ± {error:.{digits}f}")
    return "; ".join(texts)
