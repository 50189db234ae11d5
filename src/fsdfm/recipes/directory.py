"""A run directory is one run's: claimed, locked, and known again by run.json."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from fsdfm.core.errors import CheckpointError, ConfigError
from fsdfm.core.files import one_line, write_whole
from fsdfm.core.lock import locked
from fsdfm.recipes.config import CONFIG, toml
from fsdfm.train.checkpoint import steps_done
from fsdfm.train.settings import TrainSettings

LOG = logging.getLogger(__name__)
LOCK = ".lock"
FREE = (
    "steps",
    "cooldown_steps",
    "log_every",
    "evaluate_every",
    "checkpoint_every",
    "sample_every",
)
"""Settings that may change when a run goes on: no update that is done would have been another,
unless the run has begun to cool down."""
UNBORN = (".run.json.partial", f".{CONFIG}.partial", CONFIG)
"""What a run that was killed before it began leaves behind."""
Settings = TypeVar("Settings", bound=TrainSettings)


def settled(out: Path, name: str) -> Any:
    """What a setting is in the run that a directory holds; None where there is no run."""
    try:
        return _read(out)["settings"][name]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def going_on(settings: Settings, speaks: bool = True) -> Settings:
    """The settings of a new run, or of one that goes on with more or fewer updates.

    Its learning rate keeps the cosine that it began with: the updates that are done stay those of
    this run, and its new settings repeat it.

    Args:
        settings: with `out` among them.
        speaks: whether to warn of it.
    """
    decay = settings.decay_steps
    try:
        old = _read(settings.out)["settings"]  # type: ignore[attr-defined]
        began, before = old.get("decay_steps") or old["steps"], old["steps"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return settings  # no run yet; what is no run is refused when it is claimed
    if decay is None and began != settings.steps and not _only_warmed_up(old):
        kept = replace(settings, decay_steps=began)
        if before != settings.steps and speaks:
            rate = replace(kept, steps=began + 1, cooldown_steps=0).learning_rate_at(began)
            LOG.warning(
                f"steps {before} -> {settings.steps}: the learning rate keeps its cosine over "
                f"{began} updates, and is {rate:g} after them; cooldown_steps lets it fall."
            )
        return kept
    return settings


def _read(out: Path) -> Any:
    """What run.json says."""
    return json.loads((out / "run.json").read_text("utf-8"))


def _only_warmed_up(settings: Mapping[str, Any]) -> bool:
    """Whether a run has seen nothing of its cosine, whatever length that was to have."""
    return not settings.get("decay_steps") and bool(settings["steps"] <= settings["warmup_steps"])


def refuse_taken(out: Path) -> None:
    """Raises ConfigError where a directory holds something, and no run."""
    if not out.is_dir() or (out / "run.json").exists():
        return
    if {other.name for other in out.iterdir()} - {LOCK, *UNBORN}:
        raise ConfigError(f"out={out} is not empty and holds no run: choose another.", "out")


def made(out: Path, model: str | Path) -> None:
    """Make the directory of what a model becomes, before the long work.

    Raises:
        CheckpointError: it is the model itself, or a run's, or cannot be made.
    """
    if out.resolve() == Path(model).resolve():
        raise CheckpointError(f"{out} is the model itself: choose another place.")
    if (out / "run.json").exists():
        raise CheckpointError(f"{out} is the directory of a run: choose another place.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"Cannot write {out} ({one_line(error)}).") from None


@contextmanager
def claimed(out: Path, facts: dict[str, Any], defaults: dict[str, Any]) -> Iterator[None]:
    """Hold the run directory for this process alone.

    Args:
        out: the directory.
        facts: what run.json says.
        defaults: of its settings: what a run did whose fsdfm had fewer.

    Raises:
        ConfigError: it holds another run, or another process trains in it.
        CheckpointError: it cannot be written, or holds something else.
    """
    with ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out / LOCK, out))
        except OSError as error:
            raise CheckpointError(
                f"Cannot write run directory {out} ({one_line(error)}): choose another out.",
                "out",
            ) from None
        _claim(out, facts, defaults)
        yield


def _claim(out: Path, facts: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Write what the run is, or check that the directory holds this very run.

    Raises:
        ConfigError: it holds another run.
        CheckpointError: it cannot be written, or holds something else.
    """
    facts, defaults = (json.loads(json.dumps(each, default=str)) for each in (facts, defaults))
    try:
        if (out / "run.json").exists():
            _refuse_another(out, facts, defaults)
        refuse_taken(out)
        settings = facts["settings"] | facts.pop("places", {})
        for name, text in (
            (CONFIG, toml(facts["command"], settings)),
            ("run.json", json.dumps(facts, indent=2) + "\n"),
        ):
            file = out / name
            if not file.exists() or file.read_bytes() != text.encode():
                write_whole(file, text, error=CheckpointError)
    except OSError as error:
        raise CheckpointError(
            f"Cannot write run directory {out} ({one_line(error)}): choose another out.",
            "out",
        ) from None
    except UnicodeEncodeError:
        raise ConfigError(
            "The name of a file or directory is not UTF-8, so config.toml cannot say it: rename it."
        ) from None


def _refuse_another(out: Path, new: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raises ConfigError where a directory holds another run, CheckpointError where it has none."""
    try:
        _same_run(out, _read(out), new, defaults)
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{out / 'run.json'} is not a run's settings: choose another out.", "out"
        ) from None


def _same_run(out: Path, old: Any, new: dict[str, Any], defaults: dict[str, Any]) -> None:
    if not isinstance(old, dict) or old.get("format") != "fsdfm-run":
        raise ValueError("foreign")
    # Settings last: their context_length is not the network's, and must not hide behind it.
    # An older fsdfm had fewer settings, and did what is the default of those that came later.
    came = {name: defaults[name] for name in new["settings"].keys() & defaults.keys()}
    was = came | old["settings"]
    before, after = map(_without_free, (was, new["settings"]))
    if _only_warmed_up(was):
        before["decay_steps"] = after["decay_steps"]
    differences = {
        key: f"{key} {one.get(key)} -> {other.get(key)}"
        for one, other in ((dict(old["model"]), new["model"]), (before, after))
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    }
    for key, what in (
        ("command", "command"),
        ("data_sha256", "data"),
        ("start_sha256", "starting weights"),
    ):
        if old.get(key) != new[key]:
            differences[key] = f"other {what}"
    if differences:
        raise ConfigError(
            f"out={out} holds another run ({'; '.join(differences.values())}): "
            f"give the same settings to go on with it, or choose another out.",
            "out",
        )

    _refuse_another_past(out, was, new["settings"])


def _refuse_another_past(out: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raises ConfigError where updates that are done would have been others, or not be."""
    (end, length), (other_end, other_length) = (
        (each["steps"], each["cooldown_steps"]) for each in (old, new)
    )
    if (end, length) == (other_end, other_length):
        return
    done = steps_done(out / "checkpoint.safetensors")
    if length and done > end - length:
        raise ConfigError(
            f"out={out} has begun to cool down: go on with steps={end} and "
            f"cooldown_steps={length}, or start another run from its model.",
            "out",
            "steps",
            "cooldown_steps",
        )
    if other_end < done:
        raise ConfigError(f"out={out} has {done} updates: give steps of {done} or more.", "steps")
    if other_length and done > other_end - other_length:
        raise ConfigError(
            f"out={out} has {done} updates, and should have begun to cool down after "
            f"{other_end - other_length}: give steps of {done + other_length} or more, or fewer "
            "cooldown_steps.",
            "out",
            "steps",
            "cooldown_steps",
        )


def _without_free(settings: dict[str, Any]) -> dict[str, Any]:
    """What decides on the updates: the cosine's length, whatever the run's."""
    decay = settings.get("decay_steps") or settings["steps"]
    kept = {name: value for name, value in settings.items() if name not in FREE}
    return {**kept, "decay_steps": decay}
