"""How the server is set up, written once."""

from __future__ import annotations

from dataclasses import dataclass

from fsdfm.core.errors import ConfigError
from fsdfm.core.options import AT_LEAST_1, POSITIVE, Range, check, option
from fsdfm.generate.options import BATCH

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request may ask for, and how many there may be."""

    batch_size: int = option(BATCH, within=AT_LEAST_1)
    """Sequences that share a call, at most; 1 rounds every text as if it were alone."""
    queue: int = option(256, within=AT_LEAST_1, form="N")
    """Texts that wait or are written, at most; what comes then is told to come again (429)."""
    deadline: float = option(300.0, within=POSITIVE, form="SECONDS")
    """Seconds after which a request is given up."""
    max_body: int = option(1 << 20, within=AT_LEAST_1, form="BYTES")
    """Bytes of a request, at most."""
    max_texts: int = option(64, within=AT_LEAST_1, form="N")
    """Texts of one request, at most: prompts times n times best_of."""
    max_words: int = option(64, within=AT_LEAST_1, form="N")
    """Strings of each of stop, ban and require, at most."""
    max_length: int = option(8192, within=AT_LEAST_1, form="TOKENS")
    """Tokens of a text, at most, with what is given of it."""
    max_steps: int = option(1024, within=AT_LEAST_1, form="N")
    """Steps of a text, at most."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings(Limits):
    """Where the server listens, to whom, and what it tells."""

    host: str = option("127.0.0.1", form="ADDRESS")
    """Where to listen; 0.0.0.0 is every network, and then give an API key."""
    port: int = option(8000, within=Range(0, 65535))
    """Where to listen; 0 takes a free one."""
    api_key: str | None = option(None, form="KEY", unset="FSDFM_API_KEY, else none is asked for")
    """What clients must send as their key (Authorization: Bearer KEY)."""
    cors_origin: tuple[str, ...] = option((), form="ORIGIN")
    """Web sites whose pages may use the server, beside its own."""
    drain: float = option(60.0, within=POSITIVE, form="SECONDS")
    """Seconds that requests on their way have when the server is told to stop."""
    log_prompts: bool = False
    """Log what is asked for, too; texts are private, so it is off."""

    def __post_init__(self) -> None:
        check(self)
        if self.api_key is not None and not self.api_key.isascii():
            raise ConfigError("api_key must be ASCII, as a header is.", "api_key")
        if self.api_key == "":
            raise ConfigError("api_key is empty: give one, or leave it out.", "api_key")
