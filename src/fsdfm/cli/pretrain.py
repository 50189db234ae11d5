"""`fsdfm pretrain`: train a flow model from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fsdfm.cli.console import Stopped
from fsdfm.cli.flags import Flags, parse
from fsdfm.core.options import option
from fsdfm.recipes.settings import PRETRAINED, PretrainSettings, pretrain_settings

ABOUT = """\
Train a flow model (the teacher) on prepared text.

A recipe has numbers; what is given besides wins over it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Own:
    """Where the numbers come from."""

    recipe: str = option("default", choices=PRETRAINED)
    """default: the numbers below; published: FS-DFM (arXiv 2509.20624), a million updates of 128
    sequences; choose its preset besides."""


def run(argv: Sequence[str]) -> None:
    """Train, with a bar or lines."""
    own, given = parse(
        "pretrain",
        ABOUT,
        argv,
        Flags(of=_Own),
        Flags(of=PretrainSettings, unsaid=PRETRAINED["published"], decides="the recipe's"),
    )
    settings = pretrain_settings(_Own(**own).recipe, **given)
    from fsdfm.cli.training import TrainingConsole
    from fsdfm.recipes import training

    if not training.pretrain(settings, TrainingConsole):
        raise Stopped
