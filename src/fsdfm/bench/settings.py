"""What a benchmark can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fsdfm.core.options import AT_LEAST_1, check, option
from fsdfm.model.config import PRESETS

SHAPES = (*PRESETS, "adapted", "bundled")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """What is measured."""

    shape: str = option("tiny", choices=SHAPES)
    """Network: a preset of the published kind; adapted, 12 layers of SmolLM2 and a cut
    vocabulary; or bundled, that of the model that comes with fsdfm."""
    model: Path | None = option(None, form="DIR", unset="none")
    """Model or run whose shape is taken instead of a preset's; its weights are not read."""
    steps: int = option(8, within=AT_LEAST_1)
    """Model calls of the samplers."""
    length: int = option(1024, within=AT_LEAST_1)
    """Tokens of a text; training takes at most 256."""
    batch_size: int = option(1, within=AT_LEAST_1)
    """Texts made together."""
    repeats: int = option(3, within=AT_LEAST_1)
    """Timed runs of each side; the median is shown."""
    device: str | None = option(None, unset="cuda, else cpu")
    """cuda, cuda:N or cpu."""

    def __post_init__(self) -> None:
        check(self)
