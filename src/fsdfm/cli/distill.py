"""`fsdfm distill`: teach a model to write in a few steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fsdfm.cli.console import Stopped
from fsdfm.cli.flags import Flags, parse
from fsdfm.core.options import known, option
from fsdfm.recipes.settings import RECIPES, DistillSettings, Recipe, distill_settings

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
    own, given = parse(
        "distill",
        ABOUT,
        argv,
        Flags(of=_Own),
        Flags(of=DistillSettings, unsaid=known(Recipe), decides="the recipe's"),
    )
    settings = distill_settings(_Own(**own).recipe, **given)
    from fsdfm.cli.training import TrainingConsole
    from fsdfm.recipes import training

    if not training.distill(settings, TrainingConsole):
        raise Stopped
