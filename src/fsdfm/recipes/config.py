"""The settings of a run as a TOML file: written with the run, and read to repeat it."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsdfm.core.errors import ConfigError
from fsdfm.core.files import one_line
from fsdfm.core.options import Option

CONFIG = "config.toml"
"""Its name in a run directory."""
COMMAND = "command"
"""The key that says whose settings these are."""


def toml(command: str, settings: Mapping[str, Any]) -> str:
    """Settings, a line each; what is not set (None) has none.

    Args:
        command: that reads them.
        settings: texts, numbers, paths, and lists of these.
    """
    lines = [
        f"# fsdfm {command} with this file as its config repeats the run, or goes on with it.",
        "# Relative paths start where the command is run.",
        f"{COMMAND} = {_value(command)}",
    ]
    lines += [f"{name} = {_value(value)}" for name, value in settings.items() if value is not None]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def read_config(path: Path, command: str, known: Mapping[str, Option]) -> dict[str, Any]:
    """The settings that a file gives.

    Args:
        path: a TOML file; every key is a field, and none is required.
        command: that reads it.
        known: the fields that it takes.

    Raises:
        ConfigError: no such file, no TOML, another command's, an unknown key, or a value of another
            kind.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"Cannot read {path} ({one_line(error)}): config must be a TOML file.", "config"
        ) from None
    theirs = found.pop(COMMAND, command)
    if theirs != command:
        raise ConfigError(f"{path} has the settings of fsdfm {theirs}, not of fsdfm {command}.")
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}."
            raise ConfigError(f"{path}: there is no setting {name!r}; {hint}")
    return {name: _read(path, known[name], value) for name, value in found.items()}


def _read(path: Path, option: Option, value: Any) -> Any:
    if option.item in (str, Path) or option.choices is not None:
        each = value if option.item is not option.kind and isinstance(value, list) else [value]
        if not all(isinstance(one, str) for one in each):
            raise ConfigError(f"{path}: {option.name} must be a text in quotes, got {value!r}.")
        if option.item is Path:
            return Path(value) if each != value else tuple(map(Path, each))
    if option.item is bool and not isinstance(value, bool):
        raise ConfigError(f"{path}: {option.name} must be true or false, got {value!r}.")
    try:
        return option.checked(value)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
