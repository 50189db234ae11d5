"""What a baseline can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fsdfm.core.options import AT_LEAST_1, SEED, Range, check, option


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineSettings:
    """What all kinds of baseline share."""

    data: Path = option()
    """Directory that `fsdfm prepare` wrote; the model sees its training split."""
    out: Path = option(form="FILE.jsonl")
    """File of texts to write, one JSON object a line: text, tokens, seed. It replaces one that is
    there."""
    num_samples: int = option(16, within=AT_LEAST_1)
    """Texts to draw."""
    length: int = option(1024, within=AT_LEAST_1)
    """Tokens of a text."""
    seed: int = option(0, within=SEED)
    """Seed of the first text; text k takes SEED + k."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramSettings(BaselineSettings):
    """An n-gram model with modified Kneser-Ney smoothing."""

    order: int = option(4, within=Range(1, 8))
    """Tokens of the longest n-gram: each token is drawn given ORDER - 1 before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoregressiveSettings(BaselineSettings):
    """A network of fsdfm adapt with attention causal."""

    model: str = option(form="DIR")
    """The run or model directory."""
    temperature: float = option(1.0, within=Range(0))
    """Divides the logits; 0 takes the likeliest token."""
