"""A run directory is one run's: claimed, locked, and known again by run.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fsdfm.core.errors import CheckpointError, ConfigError
from fsdfm.core.files import one_line, write_whole
from fsdfm.core.lock import locked

LOCK = ".lock"


@contextmanager
def claimed(out: Path, facts: dict[str, Any]) -> Iterator[None]:
    """Hold the run directory for this process alone.

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
        _claim(out, facts)
        yield


def _claim(out: Path, facts: dict[str, Any]) -> None:
    """Write what the run is, or check that the directory holds this very run.

    Raises:
        ConfigError: it holds another run.
        CheckpointError: it cannot be written, or holds something else.
    """
    path = out / "run.json"
    facts = json.loads(json.dumps(facts, default=str))
    try:
        if path.exists():
            _same_run(out, json.loads(path.read_text()), facts)
            return
        if {other.name for other in out.iterdir()} - {LOCK, ".run.json.partial"}:
            raise ConfigError(f"out={out} is not empty and holds no run: choose another.", "out")
        write_whole(path, json.dumps(facts, indent=2) + "\n", error=CheckpointError)
    except OSError as error:
        raise CheckpointError(
            f"Cannot write run directory {out} ({one_line(error)}): choose another out.",
            "out",
        ) from None
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{path} is not a run's settings: choose another out.", "out"
        ) from None


def _same_run(out: Path, old: Any, new: dict[str, Any]) -> None:
    if not isinstance(old, dict) or old.get("format") != "fsdfm-run":
        raise ValueError("foreign")
    # Settings last: their context_length is not the network's, and must not hide behind it.
    # An older fsdfm had fewer settings, and did what is the default of those that came later.
    settings = {k: v for k, v in new["settings"].items() if k in old["settings"]}
    differences = {
        key: f"{key} {was.get(key)} -> {now.get(key)}"
        for was, now in ((dict(old["model"]), new["model"]), (dict(old["settings"]), settings))
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
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
