"""What clients send, as requests.

A body has OpenAI's names and, beside them, the fields of `Request`; both are options, so that
ranges, choices and helps are written once (see `fsdfm.core.options`).
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from fsdfm.core.errors import ConfigError
from fsdfm.core.options import AT_LEAST_1, Option, Range, check, option, options
from fsdfm.generate.generator import Generator
from fsdfm.generate.layout import lay_out
from fsdfm.generate.request import LARGEST_SEED, Request
from fsdfm.generate.template import Gap
from fsdfm.serve.settings import Limits

DEFAULT_TOKENS = 128
"""Tokens that are written where nobody says how many."""
ALIASES = {
    "num_denoising_steps": "steps",
    "max_denoising_steps": "steps",
    "num_inference_steps": "steps",
    "max_completion_tokens": "max_tokens",
    "input": "text",
}
"""Other servers' names for the same."""
IGNORED = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier")
"""What says nothing about the text."""
NEUTRAL: Mapping[str, Sequence[Any]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
}
"""What is not done here, with the values that ask for nothing."""
SHAPED = (
    "template",
    "prompt",
    "suffix",
    "text",
    "span",
    "strength",
    "length",
    "stop",
    "id",
    "seed",
)
"""Fields of a request that an endpoint says in its own way, or not at all."""
STEERING = tuple(field.name for field in fields(Request) if field.name not in SHAPED)
"""Fields of a request that every endpoint takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """What every endpoint takes."""

    model: str | None = option(None, unset="the first one", form="NAME")
    """Which of the models writes."""
    n: int = option(1, within=AT_LEAST_1)
    """Texts for each prompt; they take the seeds after each other."""
    seed: int | None = option(None, within=Range(0, LARGEST_SEED), unset="a random one, told")
    """The same request and seed give the same text."""
    stop: Any = None
    """A string, or several: the text ends before the first of them."""
    stream: bool = False
    """Send the text while it settles."""
    stream_options: Any = None
    """{"include_usage": true} sends a last chunk with the usage."""
    diffusing: Any = False
    """While streaming, also send the draft after every call ("tokens": with the text by token)."""
    timeout: float | None = option(None, within=Range(0, above=True), unset="the server's deadline")
    """Seconds after which the request is given up."""
    logit_bias: Any = None
    """Token ids that are not written, as {"ID": -100}; other values cannot be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion(Common):
    """Text that goes on from a prompt, up to a suffix; or what fills the gaps of a template."""

    prompt: Any = None
    """Text that comes first, or several, each with a text of its own."""
    suffix: str | None = None
    """Text that comes after what is written."""
    max_tokens: int | None = option(None, within=AT_LEAST_1, unset=f"{DEFAULT_TOKENS}")
    """Tokens that are written."""
    length: int | None = option(None, within=AT_LEAST_1, unset="prompt, max_tokens and suffix")
    """Tokens of the text, with what is given of it."""
    template: str | None = None
    """Text with gaps, instead of a prompt: [[12]] is 12 tokens, [[3-8]] from 3 to 8, [[?]] as many
    as fit best. The answer is the whole text."""
    initial: str | None = None
    """A draft, instead of a prompt, of which the share strength is written anew."""
    strength: float = option(1.0, within=Range(0, 1, above=True))
    """Share of the draft's tokens that is written anew."""
    echo: bool = False
    """Whether the answer is the whole text, with what was given."""
    logprobs: int | None = option(None, within=Range(0, 1), unset="none")
    """0 or 1: with the log-probability of each token that was written."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat(Common):
    """The next turn of a conversation, written as a plain transcript."""

    messages: Any = None
    """Turns, each with a role (system, user, assistant) and a content."""
    max_tokens: int | None = option(None, within=AT_LEAST_1, unset=f"{DEFAULT_TOKENS}")
    """Tokens that are written."""
    logprobs: bool = False
    """Whether with the log-probability of each token that was written."""
    top_logprobs: int = option(0, within=Range(0, 0))
    """Those of other tokens are not known."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit(Common):
    """A text of which a span, or a share, is written anew; the rest is kept to the byte."""

    text: str | None = None
    """The text."""
    span: tuple[int, ...] | None = option(None, unset="all of the text", form="A B")
    """Characters that are written anew, from A up to B."""
    strength: float = option(1.0, within=Range(0, 1, above=True))
    """Share of the span's tokens that is written anew: below 1 a rewrite of a draft."""
    logprobs: int | None = option(None, within=Range(0, 1), unset="none")
    """0 or 1: with the log-probability of each token that was written."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True)
class Asked:
    """A body, understood."""

    body: Common
    model: str
    requests: list[Request]
    """n for each prompt."""
    view: str
    """What of a text is the answer: what was written, the same without space before it (turn), or
    all of it (whole)."""


def body_options(kind: type[Common]) -> dict[str, Option]:
    """Every field that a body may have."""
    return {**options(kind), **{name: options(Request)[name] for name in STEERING}}


def understood(
    kind: type[Common], values: Any, models: Mapping[str, Generator], limits: Limits
) -> Asked:
    """The requests of a body.

    Args:
        kind: of the endpoint.
        values: as JSON has them.
        models: that there are.
        limits: that are kept to.

    Raises:
        ConfigError: a body that is none, a value that cannot be, or more than is allowed.
        LookupError: no such model.
    """
    own, steering = _parts(kind, values)
    body = kind(**own)
    name = next(iter(models)) if body.model is None else body.model
    if name not in models:
        raise LookupError(f"There is no model {name!r}: choose {', '.join(models)}.")
    given, view = _given(body, models[name])
    if body.logit_bias:
        steering["ban_ids"] = (*steering.get("ban_ids", ()), *_banned(body.logit_bias))
    seed = random.randrange(LARGEST_SEED // 2) if body.seed is None else body.seed
    best_of = Request(**{k: v for k, v in steering.items() if k == "best_of"}).best_of
    if (texts := len(given) * body.n * best_of) > limits.max_texts:
        raise ConfigError(f"{texts} texts are more than {limits.max_texts}: ask for fewer.", "n")
    for each in given:
        _check_length("The text has", "max_tokens", each.get("length") or 0, limits)
    stops = _strings(body.stop, "stop") + (("\nUser:",) if isinstance(body, Chat) else ())
    shared = {**steering, "stop": stops} if stops else steering
    requests = [
        Request.from_dict({**shared, **each, "seed": seed + k * best_of})
        for each in given
        for k in range(body.n)
    ]
    for request in requests[:: body.n]:  # the others of a prompt differ in their seeds alone
        _check_limits(request, limits)
        if request.length is None:
            _check_longest(body, request, models[name], limits)
    return Asked(body, name, requests, view)


def _parts(kind: type[Common], values: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the endpoint, and those of `Request` that every one takes."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"The body must be an object, got {type(values).__name__}.")
    allowed = body_options(kind)
    found: dict[str, Any] = {}
    for key, value in values.items():
        said = str(key)
        name = said if said in allowed else ALIASES.get(said, said)
        if value is None or name in IGNORED:
            continue
        if name in NEUTRAL and name not in allowed:
            if value not in NEUTRAL[name]:
                raise ConfigError(f"{name} is not done here: leave it out.", name)
            continue
        if name not in allowed:
            near = difflib.get_close_matches(said, [*allowed, *ALIASES], n=1)
            raise ConfigError(
                f"There is no {said!r}" + (f": did you mean {near[0]}?" if near else "."), said
            )
        if name in found:
            raise ConfigError(f"{name} is said twice, once as {said}: leave one out.", name)
        _check_type(name, allowed[name], value)
        found[name] = value
    return (
        {name: value for name, value in found.items() if name not in STEERING},
        {name: value for name, value in found.items() if name in STEERING},
    )


def _check_type(name: str, found: Option, value: Any) -> None:
    """Text and flags are what they are; numbers are checked with their range."""
    if found.item is str and found.item is found.kind and not isinstance(value, str):
        raise ConfigError(f"{name} must be text, got {value!r}.", name)
    if found.item is bool and not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, got {value!r}.", name)
    if found.item is not found.kind and not isinstance(value, list):
        raise ConfigError(f"{name} must be a list, got {value!r}.", name)
    number = found.item in (int, float) and found.item is found.kind
    if number and isinstance(value, bool | str) and not (value and value == found.rule.also):
        raise ConfigError(f"{name} must be a number, got {value!r}.", name)
    if name == "diffusing" and not (isinstance(value, bool) or value == "tokens"):
        raise ConfigError(f"diffusing must be true, false or tokens, got {value!r}.", name)
    if name == "stream_options" and not (
        isinstance(value, Mapping) and isinstance(value.get("include_usage", False), bool)
    ):
        raise ConfigError('stream_options must be as {"include_usage": true}.', name)


def _given(body: Common, generator: Generator) -> tuple[list[dict[str, Any]], str]:
    """What is given of each text, and what of it is the answer."""
    if isinstance(body, Chat):
        prompt = transcript(body.messages)
        return [_ended(prompt, None, body.max_tokens, generator)], "turn"
    if isinstance(body, Edit):
        if body.text is None:
            raise ConfigError("An edit needs a text.", "text")
        return [{"text": body.text, "span": body.span, "strength": body.strength}], "whole"
    assert isinstance(body, Completion)
    if body.template is not None or body.initial is not None:
        for name in ("prompt", "suffix", "max_tokens", "length"):
            if getattr(body, name) is not None:
                of = "template" if body.template is not None else "initial"
                raise ConfigError(f"{of} and {name} exclude each other: leave one out.", of, name)
        whole = {"template": body.template, "text": body.initial}
        return [whole | {"strength": body.strength}], "whole"
    if body.strength != 1.0:
        raise ConfigError("strength is of a draft: give initial too.", "strength", "initial")
    prompts = _strings("" if body.prompt is None else body.prompt, "prompt", empty=True)
    if body.length is not None and body.max_tokens is not None:
        raise ConfigError(
            "length and max_tokens exclude each other: leave one out.", "length", "max_tokens"
        )
    ends = {"prompt": None, "suffix": body.suffix or None, "length": body.length}
    found = [
        ends | {"prompt": prompt or None}
        if body.length is not None
        else _ended(prompt, body.suffix, body.max_tokens, generator)
        for prompt in prompts
    ]
    return found, "whole" if body.echo else "written"


def _ended(
    prompt: str, suffix: str | None, tokens: int | None, generator: Generator
) -> dict[str, Any]:
    """A prompt and a suffix with tokens between them; those that fit, if nobody says how many."""
    given = sum(len(generator.tokenizer.encode(text)) for text in (prompt, suffix) if text)
    context = generator.config.context_length
    if tokens is None:
        tokens = max(1, min(DEFAULT_TOKENS, context - given))
    return {"prompt": prompt or None, "suffix": suffix or None, "length": given + tokens}


def transcript(messages: Any) -> str:
    """A conversation as plain text, up to where the next answer begins.

    Raises:
        ConfigError: messages that are none.
    """
    names = {"system": "", "developer": "", "user": "User: ", "assistant": "Assistant: "}
    if not isinstance(messages, list) or not messages:
        raise ConfigError("messages must be a list of turns, each {role, content}.", "messages")
    turns = []
    for message in messages:
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(message, Mapping) or not isinstance(role, str) or role not in names:
            raise ConfigError(
                f"messages must have roles of {', '.join(names)}, got {role!r}.", "messages"
            )
        content = message.get("content")
        if isinstance(content, list):
            parts = [p.get("text") for p in content if isinstance(p, Mapping)]
            content = "".join(p for p in parts if isinstance(p, str))
            if len(parts) != len(message["content"]) or not all(isinstance(p, str) for p in parts):
                content = None
        if not isinstance(content, str):
            raise ConfigError("messages must have text as their content.", "messages")
        turns.append(names[role] + content)
    return "\n\n".join([*turns, "Assistant:"])


def _strings(value: Any, name: str, *, empty: bool = False) -> tuple[str, ...]:
    if value is None:
        return ()
    found = tuple(value) if isinstance(value, list) else (value,)
    if not found or not all(isinstance(each, str) and (each or empty) for each in found):
        raise ConfigError(f"{name} must be a text, or a list of texts.", name)
    return found


def _banned(bias: Any) -> list[int]:
    try:
        if any(value > -100 for value in bias.values()):
            raise ValueError
        return [int(token) for token in bias]
    except (AttributeError, TypeError, ValueError):
        raise ConfigError(
            'logit_bias must be as {"ID": -100}, which bans a token; other values cannot be.',
            "logit_bias",
        ) from None


def _check_longest(body: Common, request: Request, generator: Generator, limits: Limits) -> None:
    """Refuse a template, a draft or an edit that may become longer than is allowed."""
    name = next(n for n in ("template", "initial", "text") if getattr(body, n, None) is not None)
    layout = lay_out(request, generator)
    pairs = zip(layout.pieces, layout.sizes, strict=True)
    tokens = sum(piece.high if isinstance(piece, Gap) else size for piece, size in pairs)
    tokens = min(tokens, generator.config.context_length)
    _check_length(f"{name} may have", name, tokens, limits)


def _check_length(says: str, name: str, tokens: int, limits: Limits) -> None:
    if tokens > limits.max_length:
        raise ConfigError(
            f"{says} {tokens} tokens, more than {limits.max_length}: ask for fewer.", name
        )


def _check_limits(request: Request, limits: Limits) -> None:
    for name in ("stop", "ban", "require"):
        if (count := len(getattr(request, name))) > limits.max_words:
            raise ConfigError(
                f"{name} has {count} strings, more than {limits.max_words}: give fewer.", name
            )
    if isinstance(request.steps, int) and request.steps > limits.max_steps:
        raise ConfigError(
            f"steps={request.steps} is more than {limits.max_steps}: take fewer.", "steps"
        )
