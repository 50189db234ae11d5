"""What an evaluation needs of whatever writes texts; it knows no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from fsdfm.text.tokenizer import Tokenizer


class Sample(Protocol):
    """One text and what it cost; `fsdfm.generate.results.Sample` says what each figure means."""

    @property
    def text(self) -> str: ...
    @property
    def token_ids(self) -> list[int]: ...
    @property
    def tokens(self) -> int: ...
    @property
    def nfe(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def tokens_per_second(self) -> float: ...


class TextSource(Protocol):
    """A model that is judged by its texts, and by its bound on given ones."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the token ids."""
        ...

    @property
    def context_length(self) -> int:
        """Tokens of its longest text."""
        ...

    @property
    def defaults(self) -> Mapping[str, Any]:
        """All sampling options, with its own values where it has some."""
        ...

    @property
    def joint(self) -> bool:
        """Whether `draws` above 1 can be asked for."""
        ...

    @property
    def ancestors(self) -> tuple[str, ...]:
        """Names of the models that it descends from."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """What its texts depend on besides the options: weights_sha256, tokenizer, source, device,
        dtype and the like."""
        ...

    @property
    def bound_facts(self) -> dict[str, Any]:
        """What its bound depends on."""
        ...

    def generate(self, **options: Any) -> Sequence[Sample]:
        """Texts, as `Generator.generate` is told."""
        ...

    def fill(
        self, token_ids: list[list[int]], frozen: list[list[bool]], **options: Any
    ) -> Sequence[Sample]:
        """The positions that are not frozen, as `Generator.fill` is told."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids as text."""
        ...

    def check(self, **options: Any) -> None:
        """Raises ConfigError where texts with these options cannot be made."""
        ...

    def bound_nats(self, ids: Sequence[int], seed: int, number: int) -> float:
        """Upper bound on the negative log-likelihood of a text, nats a token.

        Args:
            ids: its tokens.
            seed: of all the texts.
            number: of this one, which makes its noise its own.
        """
        ...


Load = Callable[[str | None, torch.device, str | None], TextSource]
"""(directory or name, None for the bundled model; where it runs; number format) -> the model."""
