"""`fsdfm prune`: a model with fewer layers and neurons -> model directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fsdfm.cli.console import work, write
from fsdfm.cli.flags import Flags, parse
from fsdfm.core.options import AT_LEAST_1, check, option

ABOUT = """\
Write a model with fewer layers, or fewer neurons in each, or both; the model is left as it is.
What stays makes up for the rest, as far as it can.

Train the result afterwards: fsdfm pretrain --init OUT_DIR --frozen-share 0.33 --data DATA
--out RUN."""
POSITIONAL = ("model", "out")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Own:
    """The arguments of `prune`."""

    model: str = option(form="DIR")
    """Model or run directory from `fsdfm adapt`."""
    out: Path = option(form="OUT_DIR")
    """Model directory to write."""
    data: Path = option(form="DIR")
    """Prepared text in its tokens, by which it is pruned."""
    layers: str | None = option(None, form="K|LIST", unset="all of them")
    """Layers that stay: the K that are missed most, or a list like 0,1,5."""
    mlp_size: int | None = option(None, within=AT_LEAST_1, form="N", unset="all of them")
    """Neurons that each layer keeps; a multiple of 64 loses least where it is saved in few bits."""

    def __post_init__(self) -> None:
        check(self)


def run(argv: Sequence[str]) -> None:
    """Prune, and say how to go on."""
    (given,) = parse("prune", ABOUT, argv, Flags(of=_Own, positional=POSITIONAL))
    args = _Own(**given)
    from fsdfm.recipes.pruning import prune

    small = prune(
        args.model, args.out, args.data, layers=args.layers, mlp_size=args.mlp_size, work=work
    )
    count = sum(parameter.numel() for parameter in small.parameters())
    write(
        f"{args.out}: {count:,} parameters; go on with  "
        f"fsdfm pretrain --init {args.out} --frozen-share 0.33 --data {args.data} --out RUN\n"
    )
