"""Choices are read from the source of a registry, or from the registry once it is there."""

from __future__ import annotations

import ast
import pkgutil
import sys
from pathlib import Path

import pytest

import fsdfm
from fsdfm.core.registry import Names, written
from fsdfm.flow.step import STEP_RULES

PLACES = sorted(
    {
        ast.literal_eval(node.args[0])
        for path in Path(fsdfm.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Names"
    }
)


@pytest.mark.parametrize("place", PLACES)
def test_what_is_written_is_what_is_there(place: str) -> None:
    module, _, variable = place.rpartition(".")
    assert written(module, variable) == tuple(pkgutil.resolve_name(f"{module}:{variable}"))


def test_there_are_registries_to_look_at() -> None:
    assert {"fsdfm.flow.step.STEP_RULES", "fsdfm.flow.grid.GRIDS"} <= set(PLACES)


def test_step_rules_are_called_by_their_own_names() -> None:
    assert [rule.name for rule in STEP_RULES.values()] == list(STEP_RULES)


@pytest.fixture
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that nobody has imported."""
    (tmp_path / "some_rules.py").write_text(
        'KEYS: dict[str, int] = {"a": 1, "b": 2}\nITEMS = ("c", "d")\n'
        "MADE = {name: 0 for name in ITEMS}\nDECLARED: int\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "some_rules", raising=False)
    return "some_rules"


@pytest.mark.parametrize(("variable", "names"), [("KEYS", ["a", "b"]), ("ITEMS", ["c", "d"])])
def test_names_are_read_without_an_import(rules: str, variable: str, names: list[str]) -> None:
    found = Names(f"{rules}.{variable}", "first")
    assert list(found) == ["first", *names]
    assert (len(found), names[0] in found, "z" in found) == (3, True, False)
    assert rules not in sys.modules


def test_a_registry_that_is_not_written_out_is_imported(rules: str) -> None:
    assert written(rules, "MADE") is None and written(rules, "DECLARED") is None
    assert list(Names(f"{rules}.MADE")) == ["c", "d"]
    sys.modules[rules].MADE["e"] = 0  # type: ignore[attr-defined]
    assert list(Names(f"{rules}.MADE")) == ["c", "d", "e"]
