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
from fsdfm.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FsdfmError,
    TrainingError,
    WorkerError,
)

if TYPE_CHECKING:
    from fsdfm.generate.generator import Generator
    from fsdfm.generate.loading import load
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
    "WorkerError",
    "__version__",
    "errors",
    "load",
]

_MODULES = {
    "Generation": "results",
    "Generator": "generator",
    "Request": "request",
    "Result": "request",
    "Sample": "results",
    "Snapshot": "results",
    "load": "loading",
}
"""Of the room generate, by what is public in them."""


def __getattr__(name: str) -> Any:
    """Import on first use, so that the help of the command line does not wait for torch."""
    if name == "__version__":
        return importlib.metadata.version("fsdfm")
    if name in _MODULES:
        return getattr(importlib.import_module(f"fsdfm.generate.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'fsdfm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
