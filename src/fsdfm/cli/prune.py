"""`fsdfm prune`: a model with fewer neurons -> model directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fsdfm.cli.console import work, write
from fsdfm.cli.flags import Flags, parse
from fsdfm.core.options import AT_LEAST_1, check, option

ABOUT = """\
Write a model with fewer neurons in its MLPs, where it loses least; the model is left as it is.

Train the result afterwards: fsdfm pretrain --init OUT_DIR --data DATA --out RUN."""
POSITIONAL = ("model", "out")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Own:
    """The arguments of `prune`."""

    model: str = option(form="DIR")
    """Model or run directory from `fsdfm adapt`."""
    out: Path = option(form="OUT_DIR")
    """Model directory to write."""
    data: Path = option(form="DIR")
    """Prepared text in its tokens, by which neurons are chosen."""
    mlp_size: int = option(within=AT_LEAST_1, form="N")
    """Neurons that each block keeps (a multiple of 64 can be saved in few bits)."""

    def __post_init__(self) -> None:
        check(self)


def run(argv: Sequence[str]) -> None:
    """Prune, and say how to go on."""
    (given,) = parse("prune", ABOUT, argv, Flags(of=_Own, positional=POSITIONAL))
    args = _Own(**given)
    with work("pruning blocks") as progress:
        from fsdfm.recipes.calibration import prune

        small = prune(args.model, args.out, args.data, args.mlp_size, progress)
    count = sum(parameter.numel() for parameter in small.parameters())
    write(
        f"{args.out}: {count:,} parameters; go on with  "
        f"fsdfm pretrain --init {args.out} --data {args.data} --out RUN\n"
    )
