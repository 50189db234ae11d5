"""`fsdfm convert`: a published checkpoint -> model directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fsdfm.cli.console import status, write
from fsdfm.cli.flags import Flags, parse
from fsdfm.core.options import AT_LEAST_1, check, option
from fsdfm.core.registry import Names

ABOUT = "Turn a published checkpoint into a model directory."
POSITIONAL = ("checkpoint", "out")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Own:
    """The arguments of `convert_published`."""

    checkpoint: Path = option(form="FILE")
    """The checkpoint: .pth (networks by name, or one state dict) or .safetensors."""
    out: Path = option(form="OUT_DIR")
    """Model directory to write."""
    tokenizer: Path = option(form="FILE")
    """tokenizer.json that the network was trained with (GPT-2's, for the published ones)."""
    weights: str | None = option(
        None,
        choices=Names("fsdfm.model.io.convert.NETWORKS"),
        unset="student_ema, else the first of these that is there",
    )
    """Which of its networks to take."""
    heads: int | None = option(None, within=AT_LEAST_1, unset="the file's, or its shape's")
    """Heads of the attention, where the file lacks rotary_emb.inv_freq, which tells them."""

    def __post_init__(self) -> None:
        check(self)


def run(argv: Sequence[str]) -> None:
    """Convert, and say what it is."""
    (given,) = parse("convert", ABOUT, argv, Flags(of=_Own, positional=POSITIONAL))
    args = _Own(**given)
    with status("Converting"):
        from fsdfm.model.io.convert import convert_published
        from fsdfm.text.tokenizer import Tokenizer

        config = convert_published(
            args.checkpoint,
            args.out,
            tokenizer_json=Tokenizer.from_file(args.tokenizer).to_json(),
            weights=args.weights,
            heads=args.heads,
        )
    write(
        f"{args.out}: {config.blocks} blocks of width {config.hidden_size}, "
        f"{config.vocab_size} tokens, {config.source} source, "
        f"{'no step size' if config.step_embedding == 'none' else 'step-aware'}\n"
    )
