"""What generating can be told, written once.

Flags of the command line, known names of generation.json and keyword arguments come from here.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypedDict

from fsdfm.core.errors import ConfigError
from fsdfm.core.options import AT_LEAST_0, AT_LEAST_1, Range, check, known, option
from fsdfm.core.registry import Names

if TYPE_CHECKING:
    from fsdfm.flow.controls import Bans, Controls

GREEDY_BELOW = 1e-6
"""Temperatures under this count as 0: logits divided by them overflow float32."""
BATCH = 8
"""Sequences that share a call at most, unless said otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How a text is drawn; generation.json may name these, and a caller wins over it."""

    steps: int = option(8, within=Range(1, 1_000_000), form="N")
    """The budget in model calls; any number from 1."""
    step: str = option("exact", choices=Names("fsdfm.flow.step.STEP_RULES"))
    """Step rule of the sampler."""
    movers: str = option("independent", choices=Names("fsdfm.flow.step.MOVERS"))
    """How the positions that move in a step are chosen."""
    grid: str = option("even", choices=Names("fsdfm.flow.grid.GRIDS"))
    """Times of the model calls: evenly spaced (even), long steps first (late), or nearly all in the
    first (latest, for joint heads)."""
    draws: int = option(1, within=Range(1, 2**31 - 1), form="K")
    """Groups in which the positions of a call are drawn, each knowing the ones before: more are
    better and slower (models with a joint head)."""
    seams: str = option("fixed", choices=Names("fsdfm.flow.posterior.SEAMS"))
    """Where the blocks of K positions begin: at the multiples of K, or anywhere, another place in
    every call (random); for models that were trained so."""
    temperature: float = option(1.0, within=Range(0, 1000))
    """Divides the logits: below 1 safer, above 1 wilder, 0 the likeliest token."""
    top_p: float = option(1.0, within=Range(0, 1, above=True))
    """Draw only the likeliest tokens that together have this mass."""
    top_k: int = option(0, within=Range(0, 2**31 - 1), form="K")
    """Draw only the K likeliest tokens; 0: any."""
    min_p: float = option(0.0, within=Range(0, 1))
    """Draw only tokens at least this likely, as a share of the likeliest one's probability."""
    repetition_penalty: float = option(1.0, within=Range(1, 1000))
    """Divides the odds of tokens that the text has already: 1 leaves them."""

    def __post_init__(self) -> None:
        check(self)

    def controls(self, bans: Bans | None = None) -> Controls:
        """What is made of the model's rows before a token is drawn.

        Args:
            bans: tokens that positions may not take.
        """
        from fsdfm.flow.controls import Controls  # here: flags are read without torch

        return Controls(
            temperature=0.0 if self.temperature < GREEDY_BELOW else self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            bans=bans,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """Which texts are wanted."""

    length: int | None = option(None, within=AT_LEAST_1, unset="1024, or the context")
    """Tokens of a text, with its prompt."""
    num_samples: int = option(1, within=AT_LEAST_1)
    """Texts to generate."""
    seed: int = option(0, within=AT_LEAST_0)
    """Seed of the first text; each text takes the next one."""
    prompt: str | None = option(None, unset="none", form="TEXT")
    """Text that every sample starts with."""
    batch_size: int = option(1, within=AT_LEAST_1)
    """Texts made together; more than 1 pays on a GPU only."""

    def __post_init__(self) -> None:
        check(self)


class Options(TypedDict, total=False):
    """The same as keyword arguments, for type checkers (a test holds them equal)."""

    steps: int | None
    step: str | None
    movers: str | None
    grid: str | None
    draws: int | None
    seams: str | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    length: int | None
    num_samples: int | None
    seed: int | None
    prompt: str | None
    batch_size: int | None


DEFAULTS: Mapping[str, Any] = asdict(SamplingOptions())
"""What generation.json may name; these hold where neither it nor the caller says otherwise."""


def split(
    options: Mapping[str, Any], defaults: Mapping[str, Any]
) -> tuple[SamplingOptions, RequestOptions]:
    """Options of a request; None, like absence, takes the default.

    Args:
        options: keyword arguments.
        defaults: of the sampling options, those of a model over DEFAULTS.

    Raises:
        ConfigError: a name that is no option, or a value that cannot be.
    """
    sampling, request = known(SamplingOptions), known(RequestOptions)
    for name in options:
        if name not in sampling | request:
            names = list(Options.__annotations__)
            near = difflib.get_close_matches(name, names, n=1)
            instead = f"did you mean {near[0]}?" if near else f"choose {', '.join(names)}."
            raise ConfigError(f"There is no option {name!r}: {instead}")
    given = {name: value for name, value in options.items() if value is not None}
    own = {name: value for name, value in defaults.items() if name in sampling}
    return (
        SamplingOptions(**own | {n: v for n, v in given.items() if n in sampling}),
        RequestOptions(**{n: v for n, v in given.items() if n in request}),
    )
