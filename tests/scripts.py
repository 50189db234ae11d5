"""The scripts of benchmarks/ and recipes/, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def script(path: str | Path) -> ModuleType:
    """Import a script.

    Args:
        path: from the project's root, such as benchmarks/bound.py.
    """
    place = ROOT / path
    spec = importlib.util.spec_from_file_location(f"script_{place.stem}", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as dataclasses want it
    spec.loader.exec_module(module)
    return module
