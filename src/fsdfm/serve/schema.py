"""The OpenAPI description of the server, from its options."""

from __future__ import annotations

from dataclasses import MISSING
from typing import Any

from fsdfm.core.options import Option
from fsdfm.serve.bodies import ALIASES, IGNORED, NEUTRAL, Common, body_options

TEXTS: dict[str, Any] = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]
}
TURN: dict[str, Any] = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "prompt": TEXTS,
    "stop": TEXTS,
    "messages": {"type": "array", "items": TURN, "minItems": 1},
    "stream_options": {"type": "object", "properties": {"include_usage": {"type": "boolean"}}},
    "diffusing": {"enum": [False, True, "tokens"]},
    "logit_bias": {"type": "object", "additionalProperties": {"type": "number", "maximum": -100}},
}
"""Of options that have no single type."""
NEEDED = ("messages", "text")
"""What an endpoint cannot do without; null leaves any other field out, as some clients do."""
TYPES = {int: "integer", float: "number", str: "string", bool: "boolean"}
ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def body_schema(kind: type[Common]) -> dict[str, Any]:
    """JSON schema of a body."""
    found = {name: _schema(name, each) for name, each in body_options(kind).items()}
    for alias, name in ALIASES.items():
        if name in found:
            found[alias] = found[name] | {"description": f"The same as {name}."}
    for name, values in NEUTRAL.items():
        said = {
            "enum": [*values, None],
            "description": "Not done here: only what asks for nothing is taken.",
        }
        found.setdefault(name, said)
    for name in IGNORED:
        found.setdefault(name, {"description": "Says nothing about the text."})
    return {
        "type": "object",
        "title": kind.__name__,
        "description": kind.__doc__,
        "properties": found,
        "additionalProperties": {"type": "null"},
    }


def operation(kind: type[Common], *, stream: bool = True) -> dict[str, Any]:
    """What FastAPI is told of an endpoint beside its name."""
    problem = {"content": {"application/json": {"schema": ERROR}}}
    told = {
        400: "The request cannot be done.",
        401: "No key, or a wrong one.",
        403: "The header Host has another name.",
        404: "No such model.",
        413: "The body is too large.",
        415: "The body is not sent as JSON.",
        429: "Too many requests wait: come again after Retry-After seconds.",
        500: "A bug of the server.",
        503: "The server stops, or lacks memory.",
        504: "The deadline has passed.",
    }
    answer: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if stream:
        answer["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": body_schema(kind)}},
        },
        "responses": {"200": {"description": "The texts.", "content": answer}}
        | {str(code): {"description": text, **problem} for code, text in told.items()},
    }


def _schema(name: str, option: Option) -> dict[str, Any]:
    """JSON schema of an option."""
    found = dict(SHAPES[name]) if name in SHAPES else _typed(option)
    if name not in NEEDED:
        found = _or_null(found)
    if option.help:
        found["description"] = option.help
    if option.rule.unset:
        found["description"] = f"{found.get('description', '')} (default: {option.rule.unset})"
    if option.default not in (None, MISSING, ()):
        found["default"] = option.default
    return found


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    found = dict(schema)
    if "anyOf" in found:
        found["anyOf"] = [*found["anyOf"], {"type": "null"}]
    if "enum" in found:
        found["enum"] = [*found["enum"], None]
    if "type" in found:
        found["type"] = [found["type"], "null"]
    return found


def _typed(option: Option) -> dict[str, Any]:
    one: dict[str, Any] = {"type": TYPES[option.item]}
    within = option.rule.within
    if option.choices is not None:
        one["enum"] = list(option.choices)
    elif option.item in (int, float):
        if within.low > -float("inf"):
            one["exclusiveMinimum" if within.above else "minimum"] = within.low
        if within.high < float("inf"):
            one["maximum"] = within.high
    if option.item is not option.kind:
        if option.item is str:
            one["minLength"] = 1
        return {"type": "array", "items": one}
    if option.rule.also:
        return {"anyOf": [one, {"enum": [option.rule.also]}]}
    return one
