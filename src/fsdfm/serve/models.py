"""The models of a server, by the names that clients say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from fsdfm.core.errors import ConfigError

if TYPE_CHECKING:
    from fsdfm.generate.generator import Generator

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


def loaded(
    places: Mapping[str, str | None], *, device: str | None = None, precision: str | None = None
) -> dict[str, Generator]:
    """The models, loaded in a thread that has ended.

    Products start a team of threads for each thread that asks for any, and it lasts as long as that
    one. The batcher's thread asks for all that come later: with an idle team beside its own there
    are more threads than cores, each product then has to wake its team, and texts take a third
    longer.

    Args:
        places: of the models, by their names.
        device: see `load`.
        precision: see `load`.

    Raises:
        CheckpointError, ConfigError: see `load`.
    """
    from fsdfm.generate.loading import load

    with ThreadPoolExecutor(1, "fsdfm-loading") as pool:
        found = {
            n: pool.submit(load, p, device=device, precision=precision) for n, p in places.items()
        }
        return {name: each.result() for name, each in found.items()}
