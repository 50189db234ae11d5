"""Shape and conventions of a network, and the shapes that have a name."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from fsdfm.core.errors import ConfigError

if TYPE_CHECKING:
    from fsdfm.model.rotary import Rotary

Source = Literal["uniform", "mask"]
StepEmbedding = Literal["none", "raw", "log2"]
Attention = Literal["bidirectional", "causal"]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and conventions of one network; config.json holds exactly these fields."""

    takes_8_bits: ClassVar[bool] = False
    """Whether products in 8 bits are known to cost its kind next to nothing (docs/speed.md)."""

    vocab_size: int
    """V, the number of data tokens (the mask id is not counted)."""
    hidden_size: int
    """D, divisible by heads; D / heads even."""
    blocks: int
    heads: int
    cond_size: int
    """C, width of the embedded time and step size."""
    context_length: int = 1024
    """Longest sequence that training showed the network, in tokens."""
    source: Source = "uniform"
    """Where x_0 comes from; `mask` adds one id, V, to the embedding and the head."""
    step_embedding: StepEmbedding = "none"
    """`none`: a DFM teacher; `raw`: the published student; `log2`: ours, zero at the start."""
    schedule_power: float = 1.0
    """n in kappa_t = t ** n, the path the network was trained on."""
    neighbours: int = 0
    """R, the tokens on each side that the joint head sees; 0: there is no joint head."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "blocks", "heads", "cond_size", "context_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(
                    f"Model config: {name} must be a whole number >= 1, got {value!r}."
                )
        if not isinstance(self.neighbours, int) or not 0 <= self.neighbours < self.context_length:
            raise ConfigError(
                f"Model config: neighbours must be a whole number from 0 to the context, "
                f"got {self.neighbours!r}."
            )
        self._check_heads()
        if self.source not in ("uniform", "mask"):
            raise ConfigError(f"Model config: source must be uniform or mask, got {self.source!r}.")
        if self.step_embedding not in ("none", "raw", "log2"):
            raise ConfigError(
                f"Model config: step_embedding must be none, raw or log2, "
                f"got {self.step_embedding!r}."
            )
        if (
            not isinstance(self.schedule_power, int | float)
            or not 1.0 <= self.schedule_power < math.inf
        ):
            raise ConfigError(
                f"Model config: schedule_power must be >= 1, got {self.schedule_power!r}."
            )

    def _check_heads(self) -> None:
        if self.hidden_size % (2 * self.heads):
            raise ConfigError(
                f"Model config: hidden_size={self.hidden_size} must be a multiple of twice "
                f"heads={self.heads} (rotary positions rotate pairs)."
            )

    def rotary(self) -> Rotary:
        """The tables of the network's positions."""
        from fsdfm.model.rotary import Rotary  # here: shapes are known without torch

        return Rotary(self.hidden_size // self.heads)

    @property
    def absorbing(self) -> bool:
        """Whether only masked positions move and are learned (`flow.path.Source.absorbing`)."""
        return self.source == "mask"

    @property
    def left_to_right(self) -> bool:
        """Whether it is a language model, which predicts the next token and no other."""
        return False

    @property
    def embedding_rows(self) -> int:
        """Rows of the embedding and of the head: V, or V + 1 with the mask source."""
        return self.vocab_size + (self.source == "mask")

    @property
    def mask_id(self) -> int | None:
        """The id that is never data, or None with the uniform source."""
        return self.vocab_size if self.source == "mask" else None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values; without a joint head, as before there were any."""
        values = asdict(self)
        return values if self.neighbours else {k: v for k, v in values.items() if k != "neighbours"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: a field is missing, unknown or out of range.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ConfigError(f"Model config: unknown fields {', '.join(unknown)}.")
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"Model config: {str(error).split('__init__() ')[-1]}.") from None


PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 192, "blocks": 4, "heads": 6, "cond_size": 64},
    "small": {"hidden_size": 384, "blocks": 6, "heads": 6, "cond_size": 128},
    "0.17B": {"hidden_size": 768, "blocks": 12, "heads": 12, "cond_size": 128},
    "1.3B": {"hidden_size": 2048, "blocks": 21, "heads": 32, "cond_size": 256},
    "1.7B": {"hidden_size": 2048, "blocks": 28, "heads": 32, "cond_size": 256},
}
"""Shapes by name; the last three are the published ones."""
