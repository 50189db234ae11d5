"""Settings of a training, from flags and from the file that a run leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any

from fsdfm.cli.flags import Flags, parse
from fsdfm.core.errors import ConfigError
from fsdfm.core.options import known, option, options
from fsdfm.recipes.config import read_config


@dataclass(frozen=True, slots=True, kw_only=True)
class FromFile:
    """Where settings come from that no flag gives."""

    config: Path | None = option(None, form="FILE", unset="none")
    """Settings in a TOML file, as a run leaves them in config.toml; flags win over them."""


def settings_asked(
    command: str, about: str, argv: Sequence[str], *groups: Flags
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the flags of a training say, and what its config file does.

    Raises:
        ConfigError: a file that cannot be read, or a setting that neither gives.
    """
    config = Flags(of=FromFile)
    if not any(word.split("=")[0] == "--config" for word in argv):
        _, *given = parse(command, about, argv, config, *groups)
        return {k: v for group in given for k, v in group.items()}, {}
    # Any flag may be missing: the file may have it.
    optional = [replace(g, unsaid=known(g.of), decides="the file's") for g in groups]
    own, *given = parse(command, about, argv, config, *optional)
    said = {k: v for group in given for k, v in group.items()}
    fields = {name: option for group in groups for name, option in group.options().items()}
    found = read_config(own["config"], command, fields)
    required = [n for n, o in options(groups[-1].of).items() if o.default is MISSING]
    for name in required:
        if name not in said and name not in found and name not in groups[-1].unsaid:
            raise ConfigError(f"{own['config']} has no {name}: give {name} too.", name)
    return said, found
