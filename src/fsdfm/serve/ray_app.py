"""The same server on many machines: replicas behind Ray Serve, as many as the load needs.

    serve run fsdfm.serve.ray_app:build model=student max_replicas=8 gpus=1

Each replica is a server of its own, with its own queue and thread; a text depends on its request
and seed alone, so it does not matter which replica writes it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fastapi import FastAPI
from ray import serve

from fsdfm.core.device import keep_few_plans
from fsdfm.core.errors import ConfigError
from fsdfm.core.options import AT_LEAST_1, NOT_NEGATIVE, check, option
from fsdfm.serve.app import create_app
from fsdfm.serve.models import loaded, named
from fsdfm.serve.settings import ServeSettings

ELSEWHERE = ("host", "port")
"""Settings of the server that are Ray's to know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """What each replica serves, with what, and how many there are."""

    model: tuple[str, ...] = option((), form="DIR")
    """Model directories, or org/name on the Hugging Face Hub; without any, the bundled model."""
    device: str | None = option(None, unset="cuda, else mps, else cpu")
    """cpu, cuda or mps."""
    precision: str | None = option(None, unset="what is fast here")
    """Of the matrix products."""
    min_replicas: int = option(1, within=AT_LEAST_1)
    """Fewest replicas."""
    max_replicas: int = option(1, within=AT_LEAST_1)
    """Most replicas."""
    cpus: float = option(1.0, within=NOT_NEGATIVE)
    """Cores that a replica reserves; its products take as many threads."""
    gpus: float = option(0.0, within=NOT_NEGATIVE)
    """GPUs that a replica reserves."""

    def __post_init__(self) -> None:
        check(self)
        if self.max_replicas < self.min_replicas:
            raise ConfigError(
                f"max_replicas={self.max_replicas} is less than min_replicas={self.min_replicas}.",
                "max_replicas",
                "min_replicas",
            )


def build(args: Mapping[str, Any] | None = None) -> Any:
    """The application, for `serve run` and `serve.run`.

    Args:
        args: fields of `Replicas` and of `ServeSettings` but host and port; a model's name, or
            several in a list or apart by commas. Numbers may be text, as the command line has them.
            The key may also be in FSDFM_API_KEY.

    Raises:
        ConfigError: a name that is no field, or a value that cannot be.
    """
    replicas, settings = _understood(dict(args or {}))
    places, threads = named(replicas.model), max(1, round(replicas.cpus))
    chosen = {"device": replicas.device, "precision": replicas.precision}

    def server() -> FastAPI:  # in each replica
        import torch

        keep_few_plans()
        torch.set_num_threads(threads)
        return create_app(loaded(places, **chosen), settings)

    deployment = serve.deployment(serve.ingress(server)())
    return deployment.options(
        name="fsdfm",
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        autoscaling_config={
            "min_replicas": replicas.min_replicas,
            "max_replicas": replicas.max_replicas,
            "target_ongoing_requests": settings.batch_size,
        },
        # The replica's own queue says when it is full (429); Ray's would keep requests waiting.
        max_ongoing_requests=2 * settings.queue,
        graceful_shutdown_timeout_s=settings.drain,
    ).bind()


def _understood(args: dict[str, Any]) -> tuple[Replicas, ServeSettings]:
    own = {f.name for f in fields(Replicas)}
    servers = {f.name for f in fields(ServeSettings)} - {*ELSEWHERE}
    for name, value in args.items():
        if name not in own | servers:
            raise ConfigError(f"There is no {name!r}: choose {', '.join(sorted(own | servers))}.")
        args[name] = _value(name, value)
    key = os.environ.get("FSDFM_API_KEY") or None
    given = {"api_key": key} | {name: args[name] for name in args if name in servers}
    return Replicas(**{n: v for n, v in args.items() if n in own}), ServeSettings(**given)


def _value(name: str, value: Any) -> Any:
    """Text as the command line of Ray has it; several in a list or apart by commas."""
    if name in ("model", "cors_origin"):
        return tuple(value.split(",")) if isinstance(value, str) else value
    if name in ("device", "precision", "api_key") or not isinstance(value, str):
        return value
    if name == "log_prompts":
        return value.lower() in ("1", "true", "yes")
    try:
        return float(value) if "." in value else int(value)
    except ValueError:
        raise ConfigError(f"{name} must be a number, got {value!r}.", name) from None
