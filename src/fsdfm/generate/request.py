"""What is asked for and what comes back: one request type for Python, files, flags and a server."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal

from fsdfm.core.errors import ConfigError
from fsdfm.core.options import Range, check, known, option, options, said
from fsdfm.generate.options import SamplingOptions

LARGEST_SEED = 2**32 - 1
"""The noise is seeded with 32 bits; a larger seed would repeat a smaller one."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""What no text has, and UTF-8 cannot say."""
ENDS = ("trim", "keep", "never")
LONGEST, MOST_TRIES = 10_000_000, 1_000
"""Tokens of a text, and texts for one result: more are a slip, and would fill the memory."""
OURS = "the model's own"
"""Who decides on what a request leaves open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One text that is wanted.

    What is given of it is one of: nothing; a template; a prompt, a suffix, or both; a text of which
    a span, or a share, is written anew.

    Raises:
        ConfigError: a value of another type or out of range, or two that exclude each other.
    """

    template: str | None = option(None, unset="none", form="TEXT")
    """Text with gaps: [[12]] is 12 tokens, [[3-8]] from 3 to 8, [[?]] as many as fit best; \\[[ is
    a literal [[."""
    prompt: str | None = option(None, unset="none", form="TEXT")
    """Text that comes first, as it is."""
    suffix: str | None = option(None, unset="none", form="TEXT")
    """Text that comes last, as it is."""
    text: str | None = option(None, unset="none", form="TEXT")
    """A text to write anew: its span, or all of it."""
    span: tuple[int, ...] | None = option(None, unset="all of the text", form="A B")
    """Characters of the text that are written anew, from A up to B; the rest is kept."""
    strength: float = option(1.0, within=Range(0, 1, above=True))
    """Share of the text's tokens that is written anew: 1 all, below 1 a rewrite of a draft."""
    length: int | None = option(None, within=Range(1, LONGEST), unset="1024, or the context")
    """Tokens of the text, with what is given of it; more than the context is made in windows."""
    seed: int = option(0, within=Range(0, LARGEST_SEED))
    """Of its random numbers: the same request and seed give the same text."""
    end: str | None = option(
        None, choices=ENDS, unset="trim, but keep where nothing of the text is given"
    )
    """At the end of a document: stop there (trim), go on with another (keep), or have none."""
    stop: tuple[str, ...] = option((), form="TEXT")
    """The text ends before the first of these in what was written after the last given part."""
    ban: tuple[str, ...] = option((), form="TEXT")
    """Words or phrases that are not written."""
    ban_ids: tuple[int, ...] = option((), within=Range(0), unset="none", form="ID")
    """Token ids that are not written."""
    require: tuple[str, ...] = option((), form="TEXT")
    """Words or phrases that are written."""
    best_of: int = option(1, within=Range(1, MOST_TRIES), form="N")
    """Texts that are made, of seed, seed + 1, ...; the one the model finds likeliest is kept."""
    id: str | None = option(None, unset="its number", form="TEXT")
    """What the result is called."""

    steps: int | Literal["auto"] | None = said(SamplingOptions, "steps", unset=OURS, also="auto")
    step: str | None = said(SamplingOptions, "step", unset=OURS)
    movers: str | None = said(SamplingOptions, "movers", unset=OURS)
    grid: str | None = said(SamplingOptions, "grid", unset=OURS)
    draws: int | None = said(SamplingOptions, "draws", unset=OURS)
    seams: str | None = said(SamplingOptions, "seams", unset=OURS)
    temperature: float | None = said(SamplingOptions, "temperature", unset=OURS)
    top_p: float | None = said(SamplingOptions, "top_p", unset=OURS)
    top_k: int | None = said(SamplingOptions, "top_k", unset=OURS)
    min_p: float | None = said(SamplingOptions, "min_p", unset=OURS)
    repetition_penalty: float | None = said(SamplingOptions, "repetition_penalty", unset=OURS)

    def __post_init__(self) -> None:
        _check_types(self)
        check(self)
        _check_parts(self)
        if self.seed + self.best_of - 1 > LARGEST_SEED:
            raise ConfigError(
                f"seed must be at most {LARGEST_SEED}, and text k of best_of takes seed + k: "
                f"got seed={self.seed} with best_of={self.best_of}.",
                "seed",
                "best_of",
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Request:
        """A request from JSON: names are the fields, null is as absence.

        Raises:
            ConfigError: not an object, a name that is no field, or a value that cannot be.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"A request is an object, got {type(values).__name__}.")
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, n=1)
                instead = f"did you mean {near[0]}?" if near else f"choose {', '.join(names)}."
                raise ConfigError(f"A request has no {name!r}: {instead}")
        return cls(**{name: value for name, value in values.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads: the fields that are not at their defaults."""
        found = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.default is MISSING or value != field.default:
                found[field.name] = list(value) if isinstance(value, tuple) else value
        return found

    def sampling(self, defaults: Mapping[str, Any]) -> SamplingOptions:
        """How it is drawn.

        Args:
            defaults: those of the model, for what is not said; also for the bound of steps "auto".
        """
        names = known(SamplingOptions)
        own = {name: value for name, value in defaults.items() if name in names}
        given = {name: getattr(self, name) for name in names}
        wins = {n: v for n, v in given.items() if v is not None and v != "auto"}
        return SamplingOptions(**own | wins)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of a request."""

    id: str | None
    """Of its request."""
    text: str
    """All of it: what was given, to the byte, and what was written."""
    spans: list[tuple[int, int]]
    """What was written, as characters of the text, from the first up to the second, ascending; one
    for each gap, also where nothing was left of it."""
    token_ids: list[int]
    """The text's tokens; given parts are encoded each on its own."""
    logprobs: list[float | None]
    """Of each token, nats: log p of the model as it was drawn last, before temperature and other
    controls; None where it was given."""
    finish: str
    """Why the text ends: end, of a document; stop, one of its strings; length; or cancelled."""
    tokens: int
    """Tokens that were written, before trimming."""
    calls: int
    """Model calls that it took part in, also those of texts and lengths that were not taken."""
    seed: int
    """Of this text."""
    seconds: float
    """From its first call to its end."""

    @property
    def written(self) -> bool:
        """Whether anything was, before the end."""
        return any(x is not None for x in self.logprobs)

    @property
    def score(self) -> float:
        """Mean of the log-probabilities, nats a token; 0 where nothing was written."""
        found = [x for x in self.logprobs if x is not None]
        return math.fsum(found) / len(found) if found else 0.0

    def record(self, *, logprobs: bool = False) -> dict[str, Any]:
        """As files and pipes have it: nfe for its calls, and its id where it has one.

        Args:
            logprobs: whether with token_ids and logprobs.
        """
        found: dict[str, Any] = {} if self.id is None else {"id": self.id}
        found |= {"text": self.text, "tokens": self.tokens, "nfe": self.calls, "seed": self.seed}
        found |= {"seconds": self.seconds}
        found |= {"tokens_per_second": self.tokens / self.seconds if self.seconds else 0.0}
        found |= {"spans": [list(span) for span in self.spans], "finish": self.finish}
        return found | (
            {"token_ids": self.token_ids, "logprobs": self.logprobs} if logprobs else {}
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return asdict(self) | {"spans": [list(span) for span in self.spans]}


def _check_types(request: Request) -> None:
    """Text is text: what JSON has instead is refused by name."""
    for name, found in options(Request).items():
        value = getattr(request, name)
        several = found.item is not found.kind and isinstance(value, list | tuple)
        for each in value if several else (value,):
            if found.item is str and each is not None and not isinstance(each, str):
                raise ConfigError(f"{name} must be text, got {each!r}.", name)
            if isinstance(each, str) and (half := SURROGATE.search(each)):
                raise ConfigError(
                    f"{name} has half of a surrogate pair as its character {half.start()}: use "
                    "UTF-8.",
                    name,
                )
            if found.item is str and several and not each:
                raise ConfigError(f"{name} has an empty text: leave it out.", name)


def _check_parts(request: Request) -> None:
    """What is given of the text must be said in one way."""
    given = [n for n in ("template", "text") if getattr(request, n) is not None]
    given += [n for n in ("prompt", "suffix") if getattr(request, n) is not None][:1]
    if len(given) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} exclude each other: give one.", *given[:2])
    if given in (["template"], ["text"]) and request.length is not None:
        raise ConfigError(f"length says nothing about a {given[0]}: leave it out.", "length")
    for name in ("span", "strength"):
        changed = getattr(request, name) != options(Request)[name].default
        if changed and request.text is None:
            raise ConfigError(f"{name} is of a text to write anew: give text too.", name, "text")
    if request.text is None:
        return
    if not request.text:
        raise ConfigError("text is empty: there is nothing to write anew.", "text")
    if request.span is None:
        return
    size = len(request.text)
    if len(request.span) != 2 or not 0 <= request.span[0] < request.span[1] <= size:
        raise ConfigError(
            f"span must be two numbers A < B within the text's {size} characters, "
            f"got {':'.join(map(str, request.span))}.",
            "span",
        )
