"""`fsdfm distill`: teach a model to write in a few steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fsdfm.cli.config import settings_asked
from fsdfm.cli.console import Stopped
from fsdfm.cli.flags import Flags
from fsdfm.core.options import known, option
from fsdfm.recipes.settings import (
    JOINT,
    OF_TARGET,
    RECIPES,
    DistillSettings,
    Recipe,
    distill_settings,
)

ABOUT = """\
Distil a few-step student from a teacher.

A recipe has all the numbers; what is given besides wins over it. --target another kind of target
takes the learning rate, average, grid and groups that go with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Own:
    """Where the numbers come from."""

    recipe: str = option("default", choices=RECIPES)
    """default: a joint head; consistency: the whole network, by what several small steps say;
    published: FS-DFM (arXiv 2509.20624), which trained for half a million updates."""


def run(argv: Sequence[str]) -> None:
    """Train, with a bar or lines."""
    said, file = settings_asked(
        "distill",
        ABOUT,
        argv,
        Flags(of=_Own),
        Flags(of=DistillSettings, unsaid=known(Recipe), decides="the recipe's"),
    )
    if "recipe" in said:  # its numbers win over the file's
        file = {name: file[name] for name in file.keys() - known(Recipe)}
    elif "target" in file and (said.get("target", file["target"]) == JOINT) != (
        file["target"] == JOINT
    ):
        file = {name: value for name, value in file.items() if name not in OF_TARGET}
    recipe = said.pop("recipe", file.pop("recipe", "default"))
    settings = distill_settings(recipe, **file | said)
    from fsdfm.cli.training import TrainingConsole
    from fsdfm.recipes import training

    if not training.distill(settings, TrainingConsole):
        raise Stopped
