"""The scripts beside the package still find what they import from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts import ROOT, script

SCRIPTS = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("recipes/*.py")])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_script_can_be_imported(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(path.parent))  # they import each other
    try:
        module = script(path)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "fsdfm":
            raise
        pytest.skip(f"needs {error.name}, which the tests do not install")
    assert callable(module.main)
