"""`fsdfm adapt`: make a flow model of a causal language model."""

from __future__ import annotations

from collections.abc import Sequence

from fsdfm.cli.config import settings_asked
from fsdfm.cli.console import Stopped, work
from fsdfm.cli.flags import Flags
from fsdfm.recipes.settings import AdaptSettings

ABOUT = """\
Make a flow model of a causal language model, and train it on prepared text.

Prepare the text with the model's own tokenizer: fsdfm prepare FILES --tokenizer MODEL --out DATA;
with --vocab-size there, the vocabulary is cut to what the text uses."""
POSITIONAL = ("model",)


def run(argv: Sequence[str]) -> None:
    """Train, with a bar or lines."""
    flags = Flags(of=AdaptSettings, positional=POSITIONAL)
    said, file = settings_asked("adapt", ABOUT, argv, flags)
    settings = AdaptSettings(**file | said)
    from fsdfm.cli.training import TrainingConsole
    from fsdfm.recipes import training

    if not training.adapt(settings, TrainingConsole, work):
        raise Stopped
