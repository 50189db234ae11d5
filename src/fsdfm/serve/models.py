"""The models of a server, by the names that clients say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fsdfm.core.errors import ConfigError

BUNDLED = "bundled"


def named(places: Sequence[str]) -> dict[str, str | None]:
    """Where each model is, by its name: the last part of a directory; without any, the bundled one.

    Args:
        places: directories, or org/name on the Hugging Face Hub.

    Raises:
        ConfigError: two of one name.
    """
    found: dict[str, str | None] = {}
    for place in places:
        path = Path(place)
        name = path.resolve().name if path.exists() else place
        if name in found:
            raise ConfigError(f"model has two of the name {name!r}: rename one.", "model")
        found[name] = place
    return found or {BUNDLED: None}
