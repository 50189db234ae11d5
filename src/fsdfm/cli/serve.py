"""`fsdfm serve`: an HTTP server that OpenAI's clients speak with, and a page to watch it write."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from fsdfm.cli.console import note, status
from fsdfm.cli.flags import Flags, parse
from fsdfm.core.errors import ConfigError
from fsdfm.core.options import check, option
from fsdfm.core.registry import Names
from fsdfm.serve.models import loaded, named
from fsdfm.serve.settings import LOOPBACK, ServeSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class _Own:
    """What is served."""

    model: tuple[str, ...] = option((), form="DIR")
    """Model or run directory, or org/name on the Hugging Face Hub; without any, the bundled model.
    Clients name a directory by its last part, and the first is for those who name none."""
    device: str | None = option(None, form="DEVICE", unset="cuda, else mps, else cpu")
    """cpu, cuda, cuda:N or mps."""
    precision: str | None = option(
        None,
        choices=Names("fsdfm.generate.precision.PRECISIONS"),
        unset="what is fast here",
    )
    """Of the matrix products. By default int8 for adapted models on CPUs with VNNI and no AMX, else
    bfloat16 where it is fast, else float32."""

    def __post_init__(self) -> None:
        check(self)


ABOUT = """\
Serve models over HTTP, in the shapes that OpenAI's clients speak: /v1/completions,
/v1/chat/completions, /v1/edit/completions, /v1/models; /health, /metrics, /docs; and a page at / to
watch a text settle."""
KEY = "FSDFM_API_KEY"


def run(argv: Sequence[str]) -> None:
    """Serve until it is told to stop."""
    groups = Flags(of=_Own, repeated=("model",)), Flags(of=ServeSettings, repeated=("cors_origin",))
    own, given = parse("serve", ABOUT, argv, *groups)
    settings = ServeSettings(**given)
    if settings.api_key is None and os.environ.get(KEY):
        settings = dataclasses.replace(settings, api_key=os.environ[KEY])
    try:
        from fsdfm.serve.run import serve
    except ImportError as error:
        raise ConfigError(
            f"Serving needs {error.name}: pip install 'fsdfm[serve]' brings it."
        ) from None
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if settings.log_prompts:
        logging.getLogger("fsdfm.serve").setLevel(logging.DEBUG)
    from fsdfm.core.device import keep_few_plans

    keep_few_plans()
    asked = _Own(**own)
    places = named(asked.model)
    with status(f"Loading {', '.join(places)}"):
        models = loaded(places, device=asked.device, precision=asked.precision)
    if settings.host not in LOOPBACK and settings.api_key is None:
        note(f"Everybody who reaches {settings.host} may use it: api_key is not set.")
    serve(models, settings, lambda address: note(f"Serving {', '.join(models)} at {address}"))
