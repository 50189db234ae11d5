"""Who looks on while a run trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from fsdfm.model.transformer import FlowNetwork
from fsdfm.recipes.settings import RunSettings
from fsdfm.text.tokenizer import Tokenizer
from fsdfm.train.loop import Watcher


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is about to do."""

    settings: RunSettings
    tokenizer: Tokenizer
    generation: dict[str, Any]
    """What generation.json will say."""
    tokens_per_update: int


Watch = Callable[[Plan], AbstractContextManager[Watcher[FlowNetwork]]]
"""The plan of a run -> who is told of it while it runs."""


class Nobody:
    """Watches nothing."""

    def advanced(self, step: int, steps: int, loss: float | None) -> None:
        """See `Watcher`."""

    def evaluated(self, record: dict[str, Any], ema: FlowNetwork) -> None:
        """See `Watcher`."""

    def saved(self, ema: FlowNetwork) -> None:
        """See `Watcher`."""


@contextmanager
def unwatched(plan: Plan) -> Iterator[Watcher[FlowNetwork]]:
    """A run that tells nobody; its metrics are in metrics.jsonl all the same."""
    yield Nobody()


@dataclass(frozen=True, slots=True)
class Exporting:
    """Exports the model before every checkpoint, and tells somebody else of all that happens."""

    export: Callable[[FlowNetwork], None]
    watcher: Watcher[FlowNetwork]

    def advanced(self, step: int, steps: int, loss: float | None) -> None:
        """See `Watcher`."""
        self.watcher.advanced(step, steps, loss)

    def evaluated(self, record: dict[str, Any], ema: FlowNetwork) -> None:
        """See `Watcher`."""
        self.watcher.evaluated(record, ema)

    def saved(self, ema: FlowNetwork) -> None:
        """Write the model directory, which is never older than the checkpoint."""
        self.export(ema)
        self.watcher.saved(ema)
