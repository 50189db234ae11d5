"""What an evaluation can be told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fsdfm.core.errors import ConfigError
from fsdfm.core.options import AT_LEAST_1, Range, check, option

TaskName = Literal["unconditional", "continuation", "infilling"]

PAPER: Mapping[str, Any] = {
    "steps": ("1", "2", "4", "8", "16", "1024"),
    "length": 1024,
    "judge": ("gpt2-large",),
    "tasks": ("unconditional", "continuation"),
    "step": "published",
    "temperatures": (1.0,),
}
"""The FS-DFM paper's protocol (arXiv 2509.20624): ppl_mean and entropy_bits are its figures."""
PLAIN: Mapping[str, Any] = {
    "movers": "independent",
    "grid": "even",
    "draws": 1,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
"""Sampling options of the paper's protocol, whatever a model's own are."""
USUAL: Mapping[str, Any] = {
    **PAPER,
    "steps": ("1", "2", "4", "8", "16"),
    "length": None,
    "judge": ("smollm2",),
    "tasks": ("unconditional",),
    "step": None,
}
PROTOCOLS = {"paper": PAPER}
"""By the name of the preset; without one, USUAL."""
OWN = "each model's own"


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeSettings:
    """Which models to judge, at which settings, by whom. None is what the preset says."""

    out: Path = option()
    """Directory to write."""
    model: tuple[str, ...] = option((), form="DIR", unset="the bundled model")
    """Model or run directory, or org/name on the Hugging Face Hub."""
    steps: tuple[str, ...] | None = option(None, form="N[:SAMPLES]", unset="1 2 4 8 16")
    """Budgets in model calls. 1024:4 asks for 4 samples only at that budget."""
    num_samples: int = option(16, within=AT_LEAST_1)
    """Texts at each setting."""
    length: int | None = option(
        None, within=AT_LEAST_1, unset="1024, or the models' smallest context"
    )
    """Tokens of a text."""
    judge: tuple[str, ...] = option((), form="NAME", unset="smollm2")
    """smollm2 or gemma3, from packages (docs/evaluation.md); a directory that transformers can
    read, a .gguf file, or a name on the Hugging Face Hub."""
    judge_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the judge; auto: bfloat16 where the hardware multiplies it."""
    heldout: Path | None = option(None, unset="validation text of the bundled model")
    """Held-out text: a .txt or .jsonl file (also .gz, .zst), or a directory of fsdfm prepare, whose
    validation split is taken."""
    reference: tuple[str, ...] = option((), form="NAME=FILE", unset="none")
    """A further reference row, e.g. an autoregressive model's texts in a .jsonl."""
    tasks: tuple[TaskName, ...] | None = option(None, unset="unconditional")
    """What to generate: whole texts; continuations of held-out text from a quarter and a half of
    the length; held-out text with a quarter and a half of its tokens hidden."""
    temperatures: tuple[float, ...] | None = option(None, within=Range(0, 1000), unset="1")
    """Temperatures; several draw the frontier of quality against entropy."""
    step: str | None = option(None, unset=OWN)
    """Step rule of the sampler."""
    grid: str | None = option(None, unset=OWN)
    """Times of the model calls."""
    draws: int | None = option(None, within=AT_LEAST_1, form="K", unset=OWN)
    """Groups in which the positions of a call are drawn, of models with a joint head."""
    preset: str | None = option(None, choices=PROTOCOLS, unset="none")
    """paper: the protocol of the FS-DFM paper; what is given wins over it."""
    seed: int = option(0, within=Range(0, 2**32 - 1_000_001))
    """Each sample of a row takes the next one."""
    batch_size: int = option(1, within=AT_LEAST_1)
    """Texts made together; more pays on a GPU only."""
    device: str | None = option(None, unset="cuda, else mps, else cpu")
    """cuda, cuda:N, mps or cpu."""
    precision: str | None = option(None, unset="what is fast here")
    """Of the matrix products that write the texts; the judge has judge_dtype."""

    def __post_init__(self) -> None:
        check(self)
        if len(set(self.judge)) < len(self.judge):
            raise ConfigError(f"judge names one twice: {' '.join(self.judge)}.", "judge")
        self.budgets()
        self.references()

    def resolved(self) -> JudgeSettings:
        """With what was not said taken from the preset."""
        preset = USUAL if self.preset is None else PROTOCOLS[self.preset]
        unsaid = {k: v for k, v in preset.items() if getattr(self, k) in (None, ())}
        return replace(self, **unsaid)

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
                    f"steps takes whole numbers from 1, or N:SAMPLES like 1024:4, got {text!r}.",
                    "steps",
                )
            found.append(pair)
        if len({steps for steps, _ in found}) < len(found):
            raise ConfigError(f"steps names a budget twice: {' '.join(self.steps or ())}.", "steps")
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
                raise ConfigError(
                    f"reference takes NAME=FILE, each name once, got {text!r}.", "reference"
                )
        return [(name, file) for name, _, file in found]
