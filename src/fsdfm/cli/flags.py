"""Options as flags, and messages about options as messages about flags."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import tyro

from fsdfm.core.options import Option, options

METAVARS = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """The options of a dataclass, as a command takes them."""

    of: type[Any]
    unsaid: Collection[str] = ()
    """Those that need not be said, whatever their default: what is not said is left out."""
    decides: str = ""
    """Who decides on these."""
    choices: Mapping[str, Collection[str]] = field(default_factory=dict)
    """Choices of options that name none themselves."""
    positional: Collection[str] = ()
    repeated: Collection[str] = ()
    """Those that are given once for each of their values."""
    without: Collection[str] = ()
    """Those that the command says in another way."""

    def options(self) -> dict[str, Option]:
        """Those that are flags."""
        return {n: o for n, o in options(self.of).items() if n not in self.without}


def parse(command: str, about: str, argv: Sequence[str], *groups: Flags) -> list[dict[str, Any]]:
    """Read the flags of a command; on a wrong one tyro explains it and exits with code 2.

    Args:
        command: its name.
        about: what it does, for its help.
        argv: what follows its name.
        groups: the options that it takes.

    Returns:
        The values of each group, by option.
    """
    names = [name for group in groups for name in group.options()]
    made = [_flag(o, g, names) for g in groups for o in g.options().values()]
    kind = make_dataclass("Flags", made, kw_only=True)
    found: Any = tyro.cli(
        kind,
        prog=f"fsdfm {command}",
        description=about,
        args=list(argv),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return [
        {
            name: value
            for name in group.options()
            if (value := getattr(found, name)) is not None or name not in group.unsaid
        }
        for group in groups
    ]


def spoken(text: str, names: Iterable[str], positional: Collection[str] = ()) -> str:
    """A text in which options are called by their flags.

    Args:
        text: that calls them by their names; `name=value` becomes two words.
        names: which words are options.
        positional: those of them that have no flag.
    """
    for name in dict.fromkeys(names):
        if name not in positional:
            flag = "--" + name.replace("_", "-")
            text = re.sub(
                rf"(?<![\w./=-]){name}(?:(=)(?=\S)|(?![\w/-]|\.\w))",
                lambda found, flag=flag: flag + " " * bool(found[1]),  # type: ignore[misc]
                text,
            )
    return text


def _flag(option: Option, group: Flags, names: Sequence[str]) -> tuple[str, Any, Any]:
    """A field of the dataclass that tyro reads."""
    name, unsaid = option.name, option.name in group.unsaid
    choices = tuple(group.choices.get(name, option.choices or ()))
    item: Any = Literal[choices] if choices else option.item
    form = option.rule.form or ("{" + ",".join(choices) + "}" if choices else "")
    form = form or METAVARS.get(item, "{True,False}" if unsaid else "")
    if option.rule.also:
        item, form = Union[item, Literal[option.rule.also]], f"{form}|{option.rule.also}"  # noqa: UP007
    several, repeated = option.item is not option.kind, name in group.repeated
    kind: Any = tuple[item, ...] if several else item
    told: dict[str, Any] = {
        "help": spoken(option.help, [n for n in names if "_" in n], group.positional)
    }
    if form:
        told["metavar"] = f"{form} ..." if several and not repeated else form
    words = ["repeatable"] * repeated
    if unsaid or option.rule.unset:
        decides = group.decides
        if unsaid and option.default is not MISSING:
            usual = option.rule.unset if option.default is None else option.default
            decides = f"{usual}, or {decides}"
        words.append(f"default: {decides if unsaid else option.rule.unset}")
    if words:
        told["help_behavior_hint"] = f"({'; '.join(words)})"
    if unsaid or option.hint is not option.kind:
        kind = Optional[kind]  # noqa: UP045  # of a value
    marks = [tyro.conf.arg(**told)]
    if name in group.positional:
        marks.append(tyro.conf.Positional)
    if repeated:
        marks.append(tyro.conf.UseAppendAction)
    default = None if unsaid else option.default
    made = field() if default is MISSING else field(default=default)
    return name, Annotated[(kind, *marks)], made
