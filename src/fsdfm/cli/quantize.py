"""`fsdfm quantize`: a model in few bits -> model directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fsdfm.cli.console import work, write
from fsdfm.cli.flags import Flags, parse
from fsdfm.core.options import check, option

ABOUT = """\
Write a model whose weights are stored in few bits; the model is left as it is.

It takes a fraction of the disk. In memory and in speed it is like any other model."""
POSITIONAL = ("model", "out")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Own:
    """The arguments of `quantize`."""

    model: str = option(form="DIR")
    """Model or run directory."""
    out: Path = option(form="OUT_DIR")
    """Model directory to write."""
    bits: tuple[str, ...] = option(("blocks=4", "vocab_embed=6", "joint=4"), form="PREFIX=N")
    """Bits of a weight, from 3 to 8, by the beginning of its tensor's name; N alone is for all that
    is left, which else is stored in 16."""
    data: Path | None = option(None, form="DIR", unset="none")
    """Prepared text in its tokens, by which weights are rounded so that products lose little;
    without it each goes to its nearest code, which loses far more."""

    def __post_init__(self) -> None:
        check(self)


def run(argv: Sequence[str]) -> None:
    """Quantize, and say what it takes."""
    (given,) = parse("quantize", ABOUT, argv, Flags(of=_Own, positional=POSITIONAL))
    args = _Own(**given)
    from fsdfm.recipes.quantizing import quantize

    network = quantize(args.model, args.out, args.bits, data=args.data, work=work)
    count = sum(parameter.numel() for parameter in network.parameters())
    size = sum(path.stat().st_size for path in args.out.glob("*.safetensors")) / 2**20
    write(
        f"{args.out}: {count:,} parameters in {size:.1f} MiB; try  "
        f"fsdfm generate --model {args.out}\n"
    )
