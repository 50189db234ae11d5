"""One protocol for every recipe: the same search on its own seeds, then rows on others.

Of every recipe the search trains each learning rate of the language, then other windows of the
average at the best rate; it judges each of them on every grid, and keeps the power that wins over
all budgets together. What it compares is the mean of ln of the language's first measure. Then the
table's runs: fresh seeds for weights, batches and noise, and rows of update 0, of the last weights
and of the average. The teacher is drawn on all these grids too.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fsdfm.core.errors import ConfigError
from fsdfm.model.transformer import FlowNetwork
from fsdfm.study.languages import Language, Row, Setting
from fsdfm.study.recipes import RECIPES, TEACHER, Recipe
from fsdfm.study.training import WEIGHTS, Choice, student

LOG = logging.getLogger(__name__)
MANY = 1024
"""Calls of the teacher that students are compared with."""
WINDOWS = (0.1, 0.03, 1 / 3)
"""Of the average; the first one while learning rates are compared."""
POWERS = (1.0, 2.0, 4.0, 8.0)
FACTS = (
    *("recipe", "seed", "weights", "updates", "cost", "learning_rate", "window", "power"),
    *("calls", "temperature", "samples", "first_sample"),
)
"""What a row is of; the rest is figures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """What every recipe is given."""

    budget: float = 10_000.0
    """Forward passes of a batch, a backward pass counting 2: equal compute."""
    search_budget: float = 2_500.0
    seeds: Sequence[int] = (0, 1, 2)
    """Of the table."""
    search_seed: int = 100
    calls: Sequence[int] = (1, 2, 4, 8)
    many: int = MANY
    samples: int = 4096
    search_samples: int = 1024
    first_sample: int = 0
    """Number of the table's first noise; the search's noise begins at a million."""

    def __post_init__(self) -> None:
        if self.search_seed in self.seeds:
            raise ConfigError(
                f"The search may not use a seed of the table: {self.search_seed}.", "search_seed"
            )


class Study:
    """Rows of a study in a directory; what is there is kept.

    Args:
        out: directory, of one language, teacher and protocol.
        language: its text, teacher and judges.
        protocol: what every recipe is given.
    """

    def __init__(self, out: Path, language: Language, protocol: Protocol) -> None:
        self.out, self.language, self.protocol = out, language, protocol
        out.mkdir(parents=True, exist_ok=True)
        files = (out / "search.jsonl", out / "results.jsonl")
        self.searched, self.rows = (distinct(read(file)) for file in files)

    def choice(self, name: str) -> Choice:
        """What the search settles for a recipe."""
        recipe, rates = RECIPES[name], self.language.rates
        best = min((self._tried(name, recipe, Choice(r, WINDOWS[0])) for r in rates), key=score)
        others = [replace(best[1], window=window) for window in WINDOWS[1:]]
        return min((best, *(self._tried(name, recipe, each) for each in others)), key=score)[1]

    def _tried(self, name: str, recipe: Recipe, choice: Choice) -> tuple[float, Choice]:
        """The score of a learning rate and window on their best grid, lower is better."""
        protocol, kept = self.protocol, self.searched
        updates = recipe.updates(protocol.search_budget)
        run = self.out / f"search {name} {choice.learning_rate:g} {choice.window:.2g}"
        make = once(
            lambda: student(recipe, choice, self.language, run, updates, protocol.search_seed)
        )
        scores = {}
        for power in POWERS:
            cells = []
            for calls in protocol.calls:
                facts = {"recipe": name, "updates": updates, **asdict(replace(choice, power=power))}
                swept = [
                    self._row(
                        kept,
                        "search.jsonl",
                        facts,
                        Setting(recipe, calls, power, temperature),
                        lambda: make()("average"),
                        (protocol.search_samples, 1_000_000),
                    )
                    for temperature in self.language.temperatures
                ]
                cells.append(self.language.cell(swept, self._search_goal(), self._first()))
            scores[power] = sum(math.log(max(cell.middle, 1e-9)) for cell in cells) / len(cells)
        power = min(scores, key=scores.__getitem__)
        LOG.info(f"{name} {choice.learning_rate:g} {choice.window:.2g}: {scores[power]:.3f}")
        return scores[power], replace(choice, power=power)

    def _first(self) -> str:
        return next(iter(self.language.measures))

    def _search_goal(self) -> Row:
        """The teacher's many calls on the search's noise, few of them where nothing needs it."""
        many = self.protocol.many if len(self.language.temperatures) > 1 else 1
        facts = {"recipe": "teacher", "power": 1.0}
        setting = Setting(TEACHER, many, 1.0)
        drawn = (self.protocol.search_samples, 1_000_000)
        return self._row(
            self.searched, "search.jsonl", facts, setting, lambda: self.language.teacher, drawn
        )

    def students(self, name: str) -> None:
        """Rows of a recipe: its start, last weights and average, every seed and budget."""
        recipe, choice, protocol = RECIPES[name], self.choice(name), self.protocol
        updates = recipe.updates(protocol.budget)
        for seed in protocol.seeds:
            run = self.out / f"{name} {seed}"
            make = once(
                lambda run=run, seed=seed: student(  # type: ignore[misc]
                    recipe, choice, self.language, run, updates, seed
                )
            )
            for kind in WEIGHTS:
                facts = {"recipe": name, "seed": seed, "weights": kind, "updates": updates}
                facts |= {"cost": recipe.cost, **asdict(choice)}
                self._few(facts, recipe, choice.power, lambda kind=kind, make=make: make()(kind))  # type: ignore[misc]

    def teacher(self, powers: Sequence[float]) -> None:
        """Rows of the teacher: few calls on some grids, and many on the even one."""
        facts = {"recipe": "teacher", "seed": 0, "weights": "average", "updates": 0}
        for power in powers:
            self._few(facts | {"power": power}, TEACHER, power, lambda: self.language.teacher)
        self.goal()

    def goal(self) -> Row:
        """The teacher's many calls on the even grid."""
        facts = {"recipe": "teacher", "seed": 0, "weights": "average", "updates": 0, "power": 1.0}
        setting = Setting(TEACHER, self.protocol.many, 1.0)
        drawn = (self.protocol.samples, self.protocol.first_sample)
        return self._row(
            self.rows, "results.jsonl", facts, setting, lambda: self.language.teacher, drawn
        )

    def floors(self) -> dict[str, Row]:
        """Judged texts that no network of the study wrote, by name."""
        return self.language.floors(self.protocol.samples)

    def _few(
        self, facts: Row, recipe: Recipe, power: float, model: Callable[[], FlowNetwork]
    ) -> None:
        drawn = (self.protocol.samples, self.protocol.first_sample)
        for calls in self.protocol.calls:
            for temperature in self.language.temperatures:
                setting = Setting(recipe, calls, power, temperature)
                self._row(self.rows, "results.jsonl", facts, setting, model, drawn)

    def _row(
        self,
        rows: list[Row],
        file: str,
        facts: Row,
        setting: Setting,
        model: Callable[[], FlowNetwork],
        drawn: tuple[int, int],
    ) -> Row:
        """One row of a file, drawn and judged unless it is there."""
        facts = facts | {"calls": setting.calls, "temperature": setting.temperature}
        facts |= {"samples": drawn[0], "first_sample": drawn[1]}
        for row in rows:
            if facts.items() <= row.items():
                return row
        threads = {"threads": torch.get_num_threads()}
        row = facts | threads | self.language.draw(model(), setting, *drawn)
        rows.append(row)
        append(self.out / file, row)
        return row


def score(tried: tuple[float, Choice]) -> float:
    """For a minimum."""
    return tried[0]


def once(
    make: Callable[[], Callable[[str], FlowNetwork]],
) -> Callable[[], Callable[[str], FlowNetwork]]:
    """What is made when it is first asked for."""
    made: list[Callable[[str], FlowNetwork]] = []

    def get() -> Callable[[str], FlowNetwork]:
        if not made:
            made.append(make())
        return made[0]

    return get


def distinct(rows: Sequence[Row]) -> list[Row]:
    """The first row of all FACTS: processes side by side may have drawn the same one."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        found.setdefault(tuple(row.get(name) for name in FACTS), row)
    return list(found.values())


def append(path: Path, row: Row) -> None:
    """Add a row to a file, on a line of its own even where the last one was cut short."""
    cut = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as stream:
        stream.write(("\n" if cut else "") + json.dumps(row) + "\n")


def read(path: Path) -> list[Row]:
    """Rows of a file; none where there is no file. A last line that was cut short is left out."""
    return list(_lines(path)) if path.exists() else []


def _lines(path: Path) -> Iterator[Row]:
    for line in path.read_text("utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            LOG.warning(f"{path}: a line was cut short, and is left out.")
