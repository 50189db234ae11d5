"""The import rule: the rooms of the house, and what each may import."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fsdfm

PACKAGE = Path(fsdfm.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "flow": {"core"},
    "text": {"core"},
    "model": {"core", "flow"},  # flow: the smallest step size, and what is known of sources
    "train": {"core", "flow"},
    "eval": {"core", "text"},
    "generate": {"core", "flow", "model", "text"},
    "serve": {"core", "generate"},
    "recipes": {"core", "flow", "model", "text", "train"},  # trainings put together from settings
    "bench": {"core", "flow", "model", "train", "generate"},
    "study": {"core", "text", "flow", "model", "train", "eval", "generate"},
}
"""Room -> other rooms. `cli`, and the package's own front door, may import anything."""

BY_NAME = ("import_module", "Names")
"""What takes the name of a module as its first argument."""


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
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(BY_NAME):
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
        assert room in ("cli", "__init__", "__main__"), f"architecture.md has no room {room}"
        return
    package = ".".join(("fsdfm", *path.relative_to(PACKAGE).parts[:-1]))
    found = set(rooms_imported(path.read_text(), package))
    assert found <= MAY_IMPORT[room] | {room}


def test_every_room_of_the_rule_that_exists_was_walked() -> None:
    rooms = {room_of(path) for path in MODULES}
    assert rooms == {*MAY_IMPORT, "cli", "__init__", "__main__"}


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
        ("if TYPE_CHECKING:\n    import fsdfm.cli.main as c", "cli"),
        ("importlib.import_module('fsdfm.cli.main')", "cli"),
        ("Names('fsdfm.flow.grid.GRIDS')", "flow"),
    ],
)
def test_the_walk_sees_every_kind_of_import(line: str, room: str) -> None:
    assert list(rooms_imported(line, "fsdfm.train")) == [room]


def test_the_walk_leaves_other_packages_alone() -> None:
    assert not list(rooms_imported("import torch.nn\nfrom fsdfmx import y", "fsdfm.train"))


PIPS = ("--no-deps", "--force-reinstall")
"""Flags of pip, which anybody may name."""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nobody_speaks_flags_but_the_command_line(path: Path) -> None:
    if room_of(path) == "cli":
        return
    texts = [
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    said = [flag for text in texts for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)]
    assert [flag for flag in said if flag not in PIPS] == []


def test_contributing_names_files_and_registries_that_there_are() -> None:
    root = Path(__file__).parents[1]
    text = (root / "CONTRIBUTING.md").read_text()
    rows = [line.split("|")[2:4] for line in text.splitlines() if line.startswith("| a")]
    assert len(rows) >= 12
    for touch, test in rows:
        files = re.findall(r"`([\w/]+\.py)`", touch)
        files = [file for file in files if file != "cli/NAME.py"]
        sources = "".join((PACKAGE / file).read_text() for file in files)
        places = re.findall(r"`(tests/\w+\.py)`", test)
        assert places and all((root / place).exists() for place in places)
        for name in re.findall(r"`([A-Z]\w+|[a-z_]+)`", touch):
            assert re.search(rf"\b{name}\b", sources), (name, files)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [
                a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            ]
            assert len([name for name in given if name not in ("self", "cls")]) <= 8, node.name
            assert (node.end_lineno or node.lineno) - node.lineno < 60, node.name


PLACERS = {"core/files.py", "model/io/directory.py"}
"""Modules that put a finished file in the place of another. text/packing.py places a directory."""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_whole_files_are_written_in_one_place(path: Path) -> None:
    text, name = path.read_text(), str(path.relative_to(PACKAGE))
    placed = re.findall(r"os\.replace\(|os\.rename\(|\.rename\(|partial\.replace\(", text)
    assert not placed or name in PLACERS


WRITERS = ("write_text", "write_bytes", "savefig", "save_file", "write_tensors")
"""What writes a whole file of the name that it is given."""
UNFINISHED = ("partial", "staged", "buffer")
"""What a file is called that is not in its place yet."""
ELSEWHERE = {
    "core/files.py": "whole-file writes themselves",
    "core/tensors.py": "told where by those that put the file in its place",
    "text/shards.py": "shards grow in a directory that is put in its place when they are done",
    "bench/worker.py": "the kernel's switches",
}


def direct_writes(source: str) -> Iterator[str]:
    """Calls that write a whole file in its own place."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        modes = [each.value for each in node.args if isinstance(each, ast.Constant)]
        opens = name == "open" and any(re.fullmatch("[wx]b?", str(mode)) for mode in modes)
        if (opens or name in WRITERS) and not any(each in ast.unparse(node) for each in UNFINISHED):
            yield ast.unparse(node)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nobody_writes_a_file_in_its_own_place_or_makes_digests_of_their_own(path: Path) -> None:
    text, name = path.read_text(), str(path.relative_to(PACKAGE))
    if name not in ELSEWHERE:
        assert list(direct_writes(text)) == [], "core/files.py: write_whole, or replacing"
    assert "hashlib" not in text or name == "core/files.py", "core/files.py: digest"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_smallest_step_is_written_once(path: Path) -> None:
    found = re.search(r"/ 1024|2(\.0)?\*\*-10\b", path.read_text())
    assert not found, "flow/grid.py: SMALLEST_STEP"


def test_the_walk_sees_direct_writes() -> None:
    lines = (
        "path.write_text(data)",
        "save_file(tensors, directory / name)",
        "figure.savefig(path)",
        "path.open('wb')",
        "open(out, 'w')",
    )
    assert [list(direct_writes(line)) for line in lines] == [[line] for line in lines]
    for line in ("save_file(tensors, partial)", "path.open('rb')", "path.open('a')", "open(path)"):
        assert not list(direct_writes(line))
