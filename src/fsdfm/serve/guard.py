"""What stands before the endpoints: the key, the size of a body, and errors in one shape."""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from fastapi import Request as Http
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from fsdfm.core.errors import ConfigError, FsdfmError
from fsdfm.serve.batcher import Refused
from fsdfm.serve.bugs import note_bug

Message = MutableMapping[str, Any]
App = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]
OPEN = ("/", "/docs", "/openapi.json", "/health", "/favicon.ico")
"""What is shown to everybody: it says nothing of what is asked or written."""
TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
LONGEST = 600
"""Characters of a message: it may quote what was sent."""


class Problem(Exception):
    """What a client is told instead of an answer.

    Args:
        status: of HTTP.
        message: one line.
        param: which field it is about.
        code: a word for programs.
        retry_after: seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def record(self) -> dict[str, Any]:
        """As OpenAI has it."""
        kind = TYPES.get(self.status, "invalid_request_error")
        message = " ".join(str(self)[:LONGEST].split())
        error = {"message": message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        """As a response."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        # Escapes: a message may quote half of a character.
        content = json.dumps(self.record())
        return Response(content, self.status, headers, media_type="application/json")


def problem(error: BaseException) -> Problem:
    """What a client is told of an error."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, Refused):
        code = {429: "queue_full", 504: "deadline"}.get(error.status)
        return Problem(error.status, str(error), code=code, retry_after=error.retry_after)
    if isinstance(error, ConfigError):
        return Problem(400, str(error), param=error.fields[0] if error.fields else None)
    if isinstance(error, FsdfmError):
        return Problem(400, str(error))
    if isinstance(error, LookupError) and type(error) is LookupError:
        return Problem(404, str(error), param="model", code="model_not_found")
    if isinstance(error, HTTPException):
        said = {404: "There is no such page.", 405: "This page takes another method."}
        return Problem(error.status_code, said.get(error.status_code, str(error.detail)))
    if isinstance(error, RecursionError):
        return Problem(400, "The body has too many brackets in each other.")
    note_bug("A request failed:", error)
    return Problem(500, "The server could not do this request; its log says why.")


async def told(_: Http, error: Exception) -> Response:
    """For FastAPI: an error as a response."""
    return problem(error).response()


async def json_body(http: Http) -> Any:
    """The body of a request.

    Raises:
        Problem: it is not JSON.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Problem(415, "The body must be JSON: send Content-Type: application/json.")
    data = await http.body()
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"The body is no JSON: {error}.", code="invalid_json") from None


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no number")


class Guard:
    """ASGI middleware that lets in what has the key and is not too large.

    Args:
        app: what is guarded.
        api_key: that is asked for; None: none.
        max_body: bytes.
        hosts: what it may be called in the header Host, with any port; None: anything. A page of
            another site, whose name leads here all of a sudden, says that name.
    """

    def __init__(
        self, app: App, *, api_key: str | None, max_body: int, hosts: Collection[str] | None = None
    ) -> None:
        self.app, self.max_body, self.hosts = app, max_body, hosts
        self._key = None if api_key is None else api_key.encode()

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if not self._meant(headers):
            refusal = Problem(
                403,
                "The header Host is not localhost: use that name, or give the server an api_key.",
            )
            await refusal.response()(scope, receive, send)
            return
        if not self._let_in(scope, headers):
            refusal = Problem(401, "The API key is missing or wrong.", code="invalid_api_key")
            await refusal.response()(scope, receive, send)
            return
        try:
            await self.app(scope, self._bounded(headers, receive), send)
        except Problem as error:  # raised while the body was read, before anything was sent
            await error.response()(scope, receive, send)

    def _meant(self, headers: dict[bytes, bytes]) -> bool:
        """Whether it is for this server, by the name that the client knows it by."""
        host = headers.get(b"host")  # browsers always send it
        if self.hosts is None or host is None:
            return True
        name = re.sub(r":\d*$", "", host.decode("latin-1"))
        return name.removeprefix("[").removesuffix("]").lower() in self.hosts

    def _let_in(self, scope: Message, headers: dict[bytes, bytes]) -> bool:
        preflight = scope["method"] == "OPTIONS"  # has no key, and does nothing
        if self._key is None or scope["path"] in OPEN or preflight:
            return True
        word, _, key = headers.get(b"authorization", b"").partition(b" ")
        return hmac.compare_digest(key.strip(), self._key) and word.lower() == b"bearer"

    def _bounded(
        self, headers: dict[bytes, bytes], receive: Callable[[], Awaitable[Message]]
    ) -> Callable[[], Awaitable[Message]]:
        size = 0
        length = headers.get(b"content-length", b"")
        said = int(length) if length.isdigit() else 0

        async def bounded() -> Message:
            nonlocal size
            if said > self.max_body:
                raise self._too_large()
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_body:
                raise self._too_large()
            return message

        return bounded

    def _too_large(self) -> Problem:
        return Problem(413, f"The body is larger than {self.max_body} bytes.", code="too_large")


def plain(content: Any, status: int = 200) -> Response:
    """An object as a response."""
    return JSONResponse(content, status)
