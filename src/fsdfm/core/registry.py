"""The names in a registry, without importing the module that has it."""

from __future__ import annotations

import ast
import functools
import importlib.util
import pkgutil
import sys
from collections.abc import Collection, Iterator
from importlib.abc import InspectLoader


class Names(Collection[str]):
    """What a registry has, as of now, for the choices of an option.

    Modules that compute import torch, which takes seconds, and help needs no more than names. Until
    a module is imported they are read from its source, where the registry is a dict whose keys, or
    a tuple whose items, are written out; one that is not is imported.

    Args:
        place: module and variable, as in fsdfm.flow.grid.GRIDS.
        more: names that are choices beside those, and come first.
    """

    def __init__(self, place: str, *more: str) -> None:
        self.module, _, self.variable = place.rpartition(".")
        self.more = more

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def __contains__(self, name: object) -> bool:
        return name in self._names()

    def _names(self) -> tuple[str, ...]:
        there = getattr(sys.modules.get(self.module), self.variable, None)
        if there is None:
            there = written(self.module, self.variable)
        if there is None:
            there = pkgutil.resolve_name(f"{self.module}:{self.variable}")
        return (*self.more, *there)


@functools.cache
def written(module: str, variable: str) -> tuple[str, ...] | None:
    """The names as the source of a module has them; None where they are not written out.

    Args:
        module: by its full name; the packages that it is in are imported.
        variable: of the registry.
    """
    spec = importlib.util.find_spec(module)
    loader = spec.loader if spec is not None else None
    source = loader.get_source(module) if isinstance(loader, InspectLoader) else None
    for node in ast.parse(source or "").body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == variable for target in targets):
            value = getattr(node, "value", None)
            items = value.keys if isinstance(value, ast.Dict) else getattr(value, "elts", [None])
            names = [getattr(item, "value", None) for item in items]
            found = tuple(name for name in names if isinstance(name, str))
            return found if len(found) == len(items) else None
    return None
