"""An option is written once: as a field of a frozen dataclass beside the code that reads it.

The field states name, type, default, range and choices; the docstring under it is its help. Flags,
keyword arguments and known names of files are derived from the fields. Choices are a registry that
is looked into when it is needed, so that what is added to it is a choice everywhere.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import math
import operator
import textwrap
import types
import typing
from collections.abc import Collection, Hashable, Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from fsdfm.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from low to high."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    """Whether low itself is left out."""
    below: bool = False
    """Whether high itself is left out."""

    def __contains__(self, x: float) -> bool:
        """NaN is in no range."""
        over = x > self.low if self.above else x >= self.low
        return over and (x < self.high if self.below else x <= self.high)

    def words(self, whole: bool) -> str:
        """What a number must be."""
        low, high = (f"{x:g}" if isinstance(x, float) else str(x) for x in (self.low, self.high))
        if whole:
            ends = f">= {low}" if self.high == math.inf else f"from {low} to {high}"
            return f"a whole number {ends}" if self.low > -math.inf else "a whole number"
        if self.high == math.inf:
            if self.above and self.low == 0:
                return "positive"
            return f"a {'finite ' * self.below}number >= {low}"
        if self.above and not self.below:
            return f"above {low} and at most {high}"
        return f"in {'(' if self.above else '['}{low}, {high}{')' if self.below else ']'}"


AT_LEAST_0, AT_LEAST_1 = Range(0), Range(1)
POSITIVE, NOT_NEGATIVE = Range(0, above=True, below=True), Range(0, below=True)
"""Finite ones."""
SEED = Range(0, 2**63 - 1)


@dataclass(frozen=True, slots=True)
class Rule:
    """What a field says besides its type and default."""

    within: Range = field(default_factory=Range)
    choices: Collection[str] | None = None
    """A registry, or a tuple of names; None: those of a Literal, else anything."""
    unset: str = ""
    """What takes the place of None."""
    form: str = ""
    """How a value is written, if not by its type or choices."""
    also: str = ""
    """A word that may stand instead of a number."""
    help: str = ""
    """Where there is no docstring under the field."""


def option(
    default: Any = MISSING,
    *,
    within: Range | None = None,
    choices: Collection[str] | None = None,
    unset: str = "",
    form: str = "",
) -> Any:
    """A field that is an option; without a default it is required. See `Rule`."""
    rule = Rule(within or Range(), choices, unset, form)
    return field(default=default, metadata={"rule": rule})


def said(of: type[Any], name: str, *, unset: str, also: str = "") -> Any:
    """A field that says another dataclass's option, or leaves it open (None).

    Args:
        of: where the option is written: its range, choices, form and help hold here too.
        name: of both fields.
        unset: who decides where it is left open.
        also: a word that may stand instead of a number.
    """
    found = options(of)[name]
    rule = replace(found.rule, unset=unset, also=also, help=found.help)
    return field(default=None, metadata={"rule": rule})


@dataclass(frozen=True, slots=True)
class Option:
    """A field as its derivatives need it."""

    name: str
    hint: Any
    """Its type, as written."""
    default: Any
    """MISSING where it is required."""
    rule: Rule
    help: str

    @property
    def kind(self) -> Any:
        """The type of a value that is not None."""
        if typing.get_origin(self.hint) in (typing.Union, types.UnionType):
            kinds = [k for k in typing.get_args(self.hint) if k is not types.NoneType]
            word = typing.get_origin(kinds[-1]) is Literal  # of a number, or `also`
            (kind,) = kinds[:-1] if word and len(kinds) > 1 else kinds
            return kind
        return self.hint

    @property
    def item(self) -> Any:
        """The type of a value, or of each value of several."""
        many = typing.get_origin(self.kind) is tuple
        return typing.get_args(self.kind)[0] if many else self.kind

    @property
    def choices(self) -> tuple[str, ...] | None:
        """The values that there are, as of now; None: any."""
        if self.rule.choices is not None:
            return tuple(self.rule.choices)
        literal = typing.get_origin(self.item) is Literal
        return typing.get_args(self.item) if literal else None

    def checked(self, value: Any) -> Any:
        """The value as its type.

        Raises:
            ConfigError: another type, out of range, or no choice.
        """
        if value is None and self.kind is not self.hint:
            return None
        if self.item is not self.kind:
            if isinstance(value, str) or not isinstance(value, Collection):
                self._refuse("several values", value)
            return tuple(map(self._one, value))
        return self._one(value)

    def _one(self, value: Any) -> Any:
        if self.choices is not None:
            if not isinstance(value, str) or value not in self.choices:
                self._refuse(f"one of {', '.join(self.choices)}", repr(value))
        elif self.rule.also and value == self.rule.also:
            return value
        elif self.item is int:
            try:
                number = operator.index(value)
            except TypeError:
                number = None
            if number is None or isinstance(value, bool) or number not in self.rule.within:
                word = f", or {self.rule.also}" if self.rule.also else ""
                self._refuse(self.rule.within.words(whole=True) + word, repr(value))
            return number
        elif self.item is float:
            if isinstance(value, bool | str):
                self._refuse("a number", repr(value))
            try:
                real = float(value)
            except (TypeError, ValueError, OverflowError):
                self._refuse("a number", repr(value))
            if real not in self.rule.within:
                self._refuse(self.rule.within.words(whole=False), repr(real).removesuffix(".0"))
            return real
        elif self.item is Path:
            if not isinstance(value, str | Path):
                self._refuse("a path", repr(value))
            return Path(value)
        return value

    def _refuse(self, wanted: str, got: Any) -> typing.NoReturn:
        raise ConfigError(f"{self.name} must be {wanted}, got {got}.", self.name)


def options(settings: type[Any]) -> dict[str, Option]:
    """The options of a dataclass, by name, in order."""
    return _options(settings)  # type: ignore[arg-type]  # a class is hashable


@functools.cache
def _options(settings: Hashable) -> dict[str, Option]:
    assert isinstance(settings, type)
    hints, helps = typing.get_type_hints(settings), dict(_helps(settings))
    return {
        f.name: Option(
            f.name,
            hints[f.name],
            f.default,
            rule := f.metadata.get("rule") or Rule(),
            helps.get(f.name, rule.help),
        )
        for f in fields(settings)
    }


def check(settings: Any) -> None:
    """Check every field of a frozen dataclass, and keep values as their types; for `__post_init__`.

    Raises:
        ConfigError: the first field whose value cannot be.
    """
    for name, found in options(type(settings)).items():
        value = getattr(settings, name)
        if (checked := found.checked(value)) is not value:
            object.__setattr__(settings, name, checked)


def defaults(settings: type[Any]) -> dict[str, Any]:
    """What the options of a dataclass are where nothing is said, of those that need not be said."""
    found = options(settings).items()
    return {name: each.default for name, each in found if each.default is not MISSING}


def known(settings: type[Any]) -> frozenset[str]:
    """Names of the options of a dataclass."""
    return frozenset(options(settings))


def _helps(settings: type[Any]) -> Iterator[tuple[str, str]]:
    """Docstrings under the fields, those of bases first; none where there is no source."""
    for base in reversed(settings.__mro__[:-1]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):
            continue
        (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef))
        for line, below in itertools.pairwise(body):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                said = below.value if isinstance(below, ast.Expr) else None
                if isinstance(said, ast.Constant) and isinstance(said.value, str):
                    yield line.target.id, " ".join(said.value.split())
