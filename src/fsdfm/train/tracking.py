"""Who else is told the lines of metrics.jsonl: TensorBoard, Weights & Biases, Trackio."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fsdfm.core.errors import ConfigError
from fsdfm.core.files import one_line

Record = Mapping[str, Any]
Tracker = tuple[Callable[[dict[str, float], int], None], Callable[[], None]]
"""(figures, updates done) -> None, and what ends it."""


def _tensorboard(directory: Path, settings: Record) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writers: list[Any] = []

    def tell(figures: dict[str, float], step: int) -> None:
        if not writers:  # what a run that was killed told after its checkpoint is told again
            writers.append(SummaryWriter(str(directory / "tensorboard"), purge_step=step))
        for name, value in figures.items():
            writers[0].add_scalar(name, value, step)
        writers[0].flush()

    def end() -> None:
        for writer in writers:
            writer.close()

    return tell, end


def _hosted(module: str) -> Callable[[Path, Record], Tracker]:
    """Trackers that share the interface of Weights & Biases."""

    def start(directory: Path, settings: Record) -> Tracker:
        library = __import__(module)
        library.init(
            project="fsdfm",
            name=directory.resolve().name,
            config={n: v if isinstance(v, int | float) else str(v) for n, v in settings.items()},
        )
        return lambda figures, step: library.log(figures, step=step), library.finish

    return start


TRACKERS: dict[str, Callable[[Path, Record], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _hosted("wandb"),
    "trackio": _hosted("trackio"),
}
"""By the name of the package."""


class Told:
    """Tells a tracker, which starts with the first line: only the process that writes has one.

    Args:
        name: one of TRACKERS.
        directory: of the run.
        settings: of the run, as the tracker is to show them.
    """

    def __init__(self, name: str, directory: Path, settings: Record) -> None:
        self.name, self.directory, self.settings = name, directory, settings
        self.tracker: Tracker | None = None

    def __call__(self, record: Record) -> None:
        with _as_config_errors(self.name):
            if self.tracker is None:
                self.tracker = TRACKERS[self.name](self.directory, self.settings)
            tell, _ = self.tracker
            tell(figures(record), int(record["step"]))

    def close(self) -> None:
        """What was told is kept."""
        if self.tracker is not None:
            _, end = self.tracker
            end()


@contextmanager
def tracked(name: str | None, directory: Path, settings: Record) -> Iterator[Callable[..., None]]:
    """Who is told the lines of metrics while the block runs.

    Raises:
        ConfigError: its package is missing, or it cannot start.
    """
    if name is None:
        yield lambda record: None
        return
    if importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"track={name} needs another library: pip install {name}, or leave track out.", "track"
        )
    told = Told(name, directory, settings)
    try:
        yield told
    finally:
        told.close()


def figures(record: Record) -> dict[str, float]:
    """The numbers of a line; those of a table as table/bucket."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            # 1/2 as 1-2: a slash makes a group.
            flat |= {f"{name}/{bucket.replace('/', '-')}": each for bucket, each in value.items()}
        elif name != "step":
            flat[name] = value
    return {name: float(value) for name, value in flat.items() if value is not None}


@contextmanager
def _as_config_errors(name: str) -> Iterator[None]:
    """Whatever goes wrong there, in one line: metrics.jsonl has the figures in any case."""
    try:
        yield
    except Exception as error:  # libraries raise many kinds
        raise ConfigError(
            f"{name} cannot be told the metrics ({one_line(error)}): mend it, or leave track out, "
            "then run the same command again.",
            "track",
        ) from None
