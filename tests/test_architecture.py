"""The import rule: errors know nothing; all know errors and core; train and eval know flow; bench
measures them all; study gathers the evidence."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fsdfm

PACKAGE = Path(fsdfm.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "core": {"errors"},
    "text": {"core", "errors"},
    "flow": {"errors"},
    "model": {"core", "errors"},
    "train": {"core", "errors", "flow"},
    "eval": {"core", "errors", "flow"},
    "bench": {"core", "errors", "flow", "model", "train"},
    "study": {"core", "errors", "text", "flow", "model", "train", "eval", "generate"},
}
"""Room -> other rooms. `app`, and the package's own front door, may import anything."""


def rooms_imported(source: str, package: str) -> Iterator[str]:
    """Rooms of fsdfm that a module names in an import, wherever in it the import stands.

    Args:
        source: text of the module.
        package: dotted name of the package that the module is in; relative imports start there.
    """
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level]
            start = ".".join([*base, node.module or ""]).strip(".") if node.level else node.module
            names = [f"{start}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [ast.literal_eval(node.args[0])]
        for name in names:
            top, _, rest = name.partition(".")
            if top == "fsdfm":
                yield rest.partition(".")[0] or "fsdfm"


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_the_rooms_below_it(path: Path) -> None:
    room = room_of(path)
    if room not in MAY_IMPORT:
        assert room in ("app", "__init__", "__main__"), f"architecture.md has no room {room}"
        return
    package = ".".join(("fsdfm", *path.relative_to(PACKAGE).parts[:-1]))
    found = set(rooms_imported(path.read_text(), package))
    assert found <= MAY_IMPORT[room] | {room}


def test_every_room_of_the_rule_that_exists_was_walked() -> None:
    rooms = {room_of(path) for path in MODULES}
    assert rooms >= {"errors", "text", "flow", "model", "train", "study", "app"}


@pytest.mark.parametrize(
    ("line", "room"),
    [
        ("import fsdfm.model.transformer", "model"),
        ("from fsdfm.model import transformer", "model"),
        ("from fsdfm import model", "model"),
        ("from ..model import transformer", "model"),
        ("from .. import model", "model"),
        ("from . import ema", "train"),
        ("from .ema import Ema", "train"),
        ("import fsdfm", "fsdfm"),
        ("def late():\n    from fsdfm.text.packing import TokenStore", "text"),
        ("if TYPE_CHECKING:\n    import fsdfm.app.cli as c", "app"),
        ("importlib.import_module('fsdfm.app.cli')", "app"),
    ],
)
def test_the_walk_sees_every_kind_of_import(line: str, room: str) -> None:
    assert list(rooms_imported(line, "fsdfm.train")) == [room]


def test_the_walk_leaves_other_packages_alone() -> None:
    assert not list(rooms_imported("import torch.nn\nfrom fsdfmx import y", "fsdfm.train"))
