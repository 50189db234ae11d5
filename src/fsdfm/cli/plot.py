"""`fsdfm plot`: curves of trainings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fsdfm.cli.console import write
from fsdfm.cli.flags import Flags, parse
from fsdfm.core.errors import ConfigError
from fsdfm.core.files import write_whole
from fsdfm.core.options import option

ABOUT = """\
Draw what trainings wrote: loss, validation bound, learning rate, gradient norm, speed.

Of a single run also the loss by times and step sizes. A run may still be going."""
POSITIONAL = ("runs",)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Own:
    """What is drawn."""

    runs: tuple[Path, ...] = option((), form="RUN")
    """Directories of trainings, or files like their metrics.jsonl."""
    out: Path = option(form="FILE")
    """PNG to write."""


def run(argv: Sequence[str]) -> None:
    """Draw the curves into one file."""
    (given,) = parse("plot", ABOUT, argv, Flags(of=_Own, positional=POSITIONAL))
    args = _Own(**given)
    if not args.runs:
        raise ConfigError("plot needs runs: fsdfm plot RUN... --out FILE.png")
    if args.out.suffix.lower() != ".png":
        raise ConfigError(f"out={args.out} must end in .png.", "out")
    from fsdfm.eval.curves import picture, read_curves

    write_whole(args.out, picture([read_curves(path) for path in args.runs]))
    write(f"{args.out}\n")
