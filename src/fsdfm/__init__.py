"""Long text from a handful of model calls.

import fsdfm

model = fsdfm.load()  # the bundled one, or fsdfm.load("RUN")
print(model.generate(steps=8, length=1024, seed=1).texts[0])
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from fsdfm.core import errors
from fsdfm.core.errors import CheckpointError, ConfigError, DataError, FsdfmError, TrainingError

if TYPE_CHECKING:
    from fsdfm.generate.generator import Generator, load
    from fsdfm.generate.request import Request, Result
    from fsdfm.generate.results import Generation, Sample, Snapshot

    __version__: str

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FsdfmError",
    "Generation",
    "Generator",
    "Request",
    "Result",
    "Sample",
    "Snapshot",
    "TrainingError",
    "__version__",
    "errors",
    "load",
]

_GENERATOR = ("Generation", "Generator", "Request", "Result", "Sample", "Snapshot", "load")


def __getattr__(name: str) -> Any:
    """Import on first use, so that the help of the command line does not wait for torch."""
    if name == "__version__":
        return importlib.metadata.version("fsdfm")
    if name in _GENERATOR:
        return getattr(importlib.import_module("fsdfm.generate.generator"), name)
    raise AttributeError(f"module 'fsdfm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
