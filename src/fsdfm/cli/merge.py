"""`fsdfm merge`: a model and an adapter -> model directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fsdfm.cli.console import status, write
from fsdfm.cli.flags import Flags, parse
from fsdfm.core.options import check, option

ABOUT = "Write a model with an adapter's weights added; both are left as they are."
POSITIONAL = ("model", "adapter", "out")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Own:
    """The arguments of `merge_adapter`."""

    model: str = option(form="DIR")
    """Model that the adapter was trained on."""
    adapter: Path = option(form="ADAPTER")
    """Run directory of a training with --lora."""
    out: Path = option(form="OUT_DIR")
    """Model directory to write."""

    def __post_init__(self) -> None:
        check(self)


def run(argv: Sequence[str]) -> None:
    """Merge, and say how to go on."""
    (given,) = parse("merge", ABOUT, argv, Flags(of=_Own, positional=POSITIONAL))
    args = _Own(**given)
    with status("Merging"):
        from fsdfm.model.io.adapter import merge_adapter

        merge_adapter(args.model, args.adapter, args.out)
    write(f"{args.out}: try  fsdfm generate --model {args.out}\n")
