"""What an evaluation can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import UseAppendAction, arg

from fsdfm.core.errors import ConfigError

TaskName = Literal["unconditional", "continuation", "infilling"]

PAPER: dict[str, Any] = {
    "steps": ("1", "2", "4", "8", "16", "1024"),
    "length": 1024,
    "judge": ("gpt2-large",),
    "tasks": ("unconditional", "continuation"),
    "step": "published",
    "temperatures": (1.0,),
}
"""The FS-DFM paper's protocol (arXiv 2509.20624): ppl_mean and entropy_bits are its figures."""
USUAL: dict[str, Any] = {
    **PAPER,
    "steps": ("1", "2", "4", "8", "16"),
    "length": None,
    "judge": ("smollm2",),
    "tasks": ("unconditional",),
    "step": None,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateArgs:
    """Judge the texts of one or more models at several budgets.

    Writes report.md, report.json and plots. What is done is kept in OUT/parts, so a command that
    was interrupted goes on where it stopped. Under torchrun samples are spread over the processes.
    """

    out: Path
    """Directory to write."""
    model: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(metavar="DIR", help_behavior_hint="(repeatable; default: the bundled model)"),
    ] = ()
    """Model or run directory, or org/name on the Hugging Face Hub."""
    steps: Annotated[
        tuple[str, ...] | None,
        arg(metavar="N[:SAMPLES] ...", help_behavior_hint="(default: 1 2 4 8 16)"),
    ] = None
    """Budgets in model calls. 1024:4 asks for 4 samples only at that budget."""
    num_samples: int = 16
    """Texts at each setting."""
    length: Annotated[
        int | None,
        arg(metavar="INT", help_behavior_hint="(default: 1024, or the models' smallest context)"),
    ] = None
    """Tokens of a text."""
    judge: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(metavar="NAME", help_behavior_hint="(repeatable; default: smollm2)"),
    ] = ()
    """smollm2 or gemma3, from packages (docs/evaluation.md); a directory that transformers can
    read, a .gguf file, or a name on the Hugging Face Hub."""
    judge_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the judge; auto: bfloat16 where the hardware multiplies it."""
    heldout: Annotated[
        Path | None,
        arg(metavar="PATH", help_behavior_hint="(default: validation text of the bundled model)"),
    ] = None
    """Held-out text: a .txt or .jsonl file (also .gz, .zst), or a directory of fsdfm prepare, whose
    validation split is taken."""
    reference: Annotated[
        UseAppendAction[tuple[str, ...]],
        arg(metavar="NAME=FILE", help_behavior_hint="(repeatable)"),
    ] = ()
    """A further reference row, e.g. an autoregressive model's texts in a .jsonl."""
    tasks: Annotated[
        tuple[TaskName, ...] | None,
        arg(
            metavar="{unconditional,continuation,infilling} ...",
            help_behavior_hint="(default: unconditional)",
        ),
    ] = None
    """What to generate: whole texts; continuations of held-out text from a quarter and a half of
    the length; held-out text with a quarter and a half of its tokens hidden."""
    temperatures: Annotated[
        tuple[float, ...] | None, arg(metavar="FLOAT ...", help_behavior_hint="(default: 1)")
    ] = None
    """Temperatures; several draw the frontier of quality against entropy."""
    step: Annotated[
        Literal["exact", "published", "euler"] | None,
        arg(metavar="{exact,published,euler}", help_behavior_hint="(default: each model's own)"),
    ] = None
    """Step rule of the sampler."""
    grid: Annotated[
        Literal["even", "late", "latest"] | None,
        arg(metavar="{even,late,latest}", help_behavior_hint="(default: each model's own)"),
    ] = None
    """Times of the model calls: evenly spaced, long steps first, or nearly all in the first
    (for joint heads)."""
    draws: Annotated[
        int | None, arg(metavar="K", help_behavior_hint="(default: each model's own)")
    ] = None
    """Groups in which the positions of a call are drawn, of models with a joint head."""
    preset: Annotated[
        Literal["paper"] | None, arg(metavar="{paper}", help_behavior_hint="(optional)")
    ] = None
    """paper: the protocol of the FS-DFM paper; flags that are given win over it."""
    seed: int = 0
    """Sample k of every row takes SEED + k."""
    batch_size: int = 1
    """Texts made together; more pays on a GPU only."""
    device: Annotated[
        str | None, arg(metavar="DEVICE", help_behavior_hint="(default: cuda, else mps, else cpu)")
    ] = None
    """cuda, cuda:N, mps or cpu."""
    precision: Annotated[
        Literal["float32", "bfloat16", "int8"] | None,
        arg(
            metavar="{float32,bfloat16,int8}",
            help_behavior_hint="(default: bfloat16 where it is fast)",
        ),
    ] = None
    """Of the matrix products that write the texts; the judge's is --judge-dtype."""

    def resolved(self) -> EvaluateArgs:
        """With what was not said taken from the preset.

        Raises:
            ConfigError: a value out of range.
        """
        preset = PAPER if self.preset == "paper" else USUAL
        args = replace(self, **{k: v for k, v in preset.items() if getattr(self, k) in (None, ())})
        for name in ("num_samples", "batch_size"):
            if getattr(args, name) < 1:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} must be at least 1, got {getattr(args, name)}.")
        if args.draws is not None and args.draws < 1:
            raise ConfigError(f"--draws must be at least 1, got {args.draws}.")
        if args.length is not None and args.length < 1:
            raise ConfigError(f"--length must be at least 1, got {args.length}.")
        if not 0 <= args.seed < 2**32 - 1_000_000:
            raise ConfigError(f"--seed must be at least 0 and below 4 billion, got {args.seed}.")
        for temperature in args.temperatures or ():
            if not 0.0 <= temperature < math.inf:
                raise ConfigError(f"--temperatures must be at least 0, got {temperature:g}.")
        if len(set(args.judge)) < len(args.judge):
            raise ConfigError(f"judge names one twice: {' '.join(args.judge)}.")
        args.budgets()
        args.references()
        return args

    def budgets(self) -> list[tuple[int, int]]:
        """(steps, samples) of each budget.

        Raises:
            ConfigError: not N or N:SAMPLES.
        """
        found = []
        for text in dict.fromkeys(self.steps or ()):
            steps, _, samples = text.partition(":")
            try:
                pair = int(steps), int(samples or self.num_samples)
            except ValueError:
                pair = 0, 0
            if min(pair) < 1:
                raise ConfigError(
                    f"--steps takes whole numbers from 1, or N:SAMPLES like 1024:4, got {text!r}."
                )
            found.append(pair)
        if len({steps for steps, _ in found}) < len(found):
            raise ConfigError(f"--steps names a budget twice: {' '.join(self.steps or ())}.")
        return found

    def references(self) -> list[tuple[str, str]]:
        """(name, file) of each further reference row.

        Raises:
            ConfigError: not NAME=FILE, or a name given twice.
        """
        found = [text.partition("=") for text in self.reference]
        names = [name for name, _, _ in found]
        for text, (name, _, file) in zip(self.reference, found, strict=True):
            if not name or not file or names.count(name) > 1:
                raise ConfigError(f"--reference takes NAME=FILE, each name once, got {text!r}.")
        return [(name, file) for name, _, file in found]
