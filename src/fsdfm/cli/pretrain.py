"""`fsdfm pretrain`: train a flow model from scratch."""

from __future__ import annotations

from collections.abc import Sequence

from fsdfm.cli.console import Stopped
from fsdfm.cli.flags import Flags, parse
from fsdfm.recipes.settings import PretrainSettings

ABOUT = "Train a flow model (the teacher) on prepared text."


def run(argv: Sequence[str]) -> None:
    """Train, with a bar or lines."""
    (given,) = parse("pretrain", ABOUT, argv, Flags(of=PretrainSettings))
    settings = PretrainSettings(**given)
    from fsdfm.cli.training import TrainingConsole
    from fsdfm.recipes import training

    if not training.pretrain(settings, TrainingConsole):
        raise Stopped
