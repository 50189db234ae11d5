"""The endpoints: bodies in, texts or streams of them out."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi import Request as Http
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from fsdfm.core.errors import FsdfmError
from fsdfm.generate.generator import Generator
from fsdfm.serve.batcher import Batcher, Begun, Done, Moved, Refused, Submission, Update, quiet
from fsdfm.serve.bodies import Chat, Common, Completion, Edit, understood
from fsdfm.serve.guard import Guard, Problem, json_body, plain, problem, told
from fsdfm.serve.metrics import Metrics
from fsdfm.serve.pages import page_of
from fsdfm.serve.schema import operation
from fsdfm.serve.settings import ServeSettings
from fsdfm.serve.shapes import Answer

log = logging.getLogger("fsdfm.serve")

PING = 15.0
"""Seconds of silence after which a stream says that it lives."""
ENDPOINTS: Mapping[str, tuple[str, type[Common]]] = {
    "/v1/completions": ("completions", Completion),
    "/v1/chat/completions": ("chat", Chat),
    "/v1/edit/completions": ("edit", Edit),
}
BEHIND = 64
"""Updates that wait for a client before drafts are left out."""
GONE = 499
"""Status, for the log, of a client that left."""


class Gone(Exception):
    """The client left."""


@dataclass(slots=True)
class _Asking:
    """One request of a client on its way."""

    http: Http
    endpoint: str
    answer: Answer
    submission: Submission
    queue: asyncio.Queue[Update]

    @property
    def waited(self) -> float:
        """Seconds before its first call."""
        began = self.submission.began
        return (time.monotonic() if began is None else began) - self.submission.arrived

    @property
    def complete(self) -> bool:
        """Whether every text is finished."""
        return len(self.answer.done) == len(self.submission.requests)


class Service:
    """What the endpoints do.

    Args:
        models: by name; the first is for requests that name none.
        settings: of the server.
    """

    def __init__(self, models: Mapping[str, Generator], settings: ServeSettings) -> None:
        self.models, self.settings = models, settings
        self.metrics = Metrics()
        self.batcher = Batcher(
            models,
            batch_size=settings.batch_size,
            queue=settings.queue,
            on_call=self.metrics.called,
        )
        self.metrics.watch(lambda: self.batcher.waiting, lambda: self.batcher.running)
        self.created = int(time.time())

    def listed(self) -> dict[str, Any]:
        """The models, as OpenAI lists them."""
        return {"object": "list", "data": [self.described(name) for name in self.models]}

    def described(self, name: str) -> dict[str, Any]:
        """A model.

        Raises:
            Problem: there is none of this name.
        """
        if name not in self.models:
            raise Problem(404, f"There is no model {name!r}.", code="model_not_found")
        generator = self.models[name]
        found = {"id": name, "object": "model", "created": self.created, "owned_by": "fsdfm"}
        context = generator.config.context_length
        return found | {"context_length": context, "defaults": generator.defaults}

    def health(self) -> dict[str, Any]:
        """Whether it works, and how much."""
        counts = {"waiting": self.batcher.waiting, "running": self.batcher.running}
        if not self.batcher.alive:
            raise Problem(503, "The server stops.")
        return {"status": "ok", "models": list(self.models), **counts}

    async def handle(self, http: Http, endpoint: str, kind: type[Common]) -> Response:
        """Answer a request to write texts."""
        began = time.monotonic()
        try:
            asking = await self._ask(http, endpoint, kind)
            updates = self._updates(asking)
            if asking.answer.asked.body.stream:
                return await self._streamed(asking, updates)
            async with contextlib.aclosing(updates):
                async for update in updates:
                    self._take(asking, update)
            response = plain(asking.answer.whole(asking.waited))
            self._count(asking, 200)
            return response
        except (Gone, ClientDisconnect):
            status = GONE
            response = Response(status_code=GONE)
        except Exception as error:
            found = problem(error)
            status, response = found.status, found.response()
        self.metrics.requests.labels(endpoint, status).inc()
        log.info("%s %d %.2fs", endpoint, status, time.monotonic() - began)
        return response

    async def _ask(self, http: Http, endpoint: str, kind: type[Common]) -> _Asking:
        """Read a body and put its requests into the queue.

        Raises:
            Problem, FsdfmError, LookupError, Refused: it cannot be done.
        """
        values = await json_body(http)
        if self.settings.log_prompts:
            log.info("%s %s", endpoint, json.dumps(values))
        asked = await asyncio.to_thread(understood, kind, values, self.models, self.settings)
        body, queue = asked.body, asyncio.Queue[Update]()
        loop = asyncio.get_running_loop()

        def tell(update: Update) -> None:
            # Of a client that reads too slowly, drafts are left out; later ones say as much.
            if not (isinstance(update, Moved) and queue.qsize() >= BEHIND):
                queue.put_nowait(update)

        watch = {False: "settled", True: "draft"}.get(body.diffusing, "tokens")
        seconds = min(self.settings.deadline, body.timeout or self.settings.deadline)
        submission = Submission(
            asked.model,
            asked.requests,
            quiet(lambda update: loop.call_soon_threadsafe(tell, update)),
            deadline=time.monotonic() + seconds,
            watch=watch if body.stream else "result",
        )
        answer = Answer(asked, self.models[asked.model])
        self.batcher.submit(submission)
        return _Asking(http, endpoint, answer, submission, queue)

    async def _updates(self, asking: _Asking) -> AsyncGenerator[Update | None]:
        """What the batcher tells, until all is done; None after some silence.

        Raises:
            Gone: the client left; then, as at any end, nothing more is written for it.
            FsdfmError, Refused: what the batcher could not do.
        """
        left = asyncio.create_task(_left(asking.http))
        coming: asyncio.Task[Update] | None = None
        try:
            while not asking.complete:
                coming = coming or asyncio.create_task(asking.queue.get())
                done, _ = await asyncio.wait(
                    {left, coming}, timeout=PING, return_when=asyncio.FIRST_COMPLETED
                )
                if left in done:
                    raise Gone
                if coming not in done:
                    yield None
                    continue
                update, coming = coming.result(), None
                if isinstance(update, FsdfmError | Refused):
                    raise update
                yield update
        finally:
            self.batcher.cancel(asking.submission)
            left.cancel()
            if coming is not None:
                coming.cancel()

    def _take(self, asking: _Asking, update: Update | None) -> None:
        if isinstance(update, Begun):
            asking.answer.given[update.index] = update.given
        elif isinstance(update, Done):
            asking.answer.done[update.index] = update

    async def _streamed(
        self, asking: _Asking, updates: AsyncGenerator[Update | None]
    ) -> StreamingResponse:
        """A stream, once it is known that the request can be done."""
        try:
            first = None
            while first is None:
                first = await anext(updates)
        except BaseException:
            await updates.aclose()
            raise
        return StreamingResponse(
            self._events(asking, first, updates),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    async def _events(
        self, asking: _Asking, first: Update, updates: AsyncGenerator[Update | None]
    ) -> AsyncIterator[bytes]:
        status = GONE
        try:
            for chunk in self._chunks(asking, first):
                yield _event(chunk)
            async for update in updates:
                if update is None:
                    yield b": still writing\n\n"
                    continue
                for chunk in self._chunks(asking, update):
                    yield _event(chunk)
            yield b"data: [DONE]\n\n"
            status = 200
        except Gone:
            return
        except Exception as error:
            found = problem(error)
            status = found.status
            yield _event(found.record())
        finally:
            await updates.aclose()
            self._count(asking, status)

    def _chunks(self, asking: _Asking, update: Update) -> Iterator[dict[str, Any]]:
        """What a client is sent of an update."""
        self._take(asking, update)
        answer = asking.answer
        if isinstance(update, Begun) and answer.chat:
            yield answer.chunk(update.index, "")
        if isinstance(update, Moved):
            if update.draft is not None:
                yield answer.frame(update)
            if text := answer.fresh(update):
                yield answer.chunk(update.index, text)
        if isinstance(update, Done):
            chunk = answer.last(update)
            if asking.complete:
                chunk["timings"] = answer.timings(asking.waited)
            yield chunk
            if asking.complete and (answer.asked.body.stream_options or {}).get("include_usage"):
                yield {**chunk, "choices": [], "usage": answer.usage()}

    def _count(self, asking: _Asking, status: int) -> None:
        answer, arrived = asking.answer, asking.submission.arrived
        usage, seconds = answer.usage(), time.monotonic() - arrived
        self.metrics.requests.labels(asking.endpoint, status).inc()
        self.metrics.tokens.inc(usage["completion_tokens"])
        self.metrics.prompt_tokens.inc(usage["prompt_tokens"])
        self.metrics.seconds.observe(seconds)
        self.metrics.first.observe(asking.waited)
        log.info(
            "%s %d model=%s texts=%d tokens=%d %.2fs",
            asking.endpoint,
            status,
            answer.asked.model,
            len(asking.submission.requests),
            usage["completion_tokens"],
            seconds,
        )


def create_app(
    models: Mapping[str, Generator],
    settings: ServeSettings | None = None,
    *,
    hosts: Collection[str] | None = None,
) -> FastAPI:
    """The server as an ASGI application; its thread ends with its lifespan.

    Args:
        models: by name; the first is for requests that name none.
        settings: where it listens is not read here.
        hosts: names that it answers to, see `Guard`.
    """
    settings = settings or ServeSettings()
    service = Service(models, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.batcher.close, settings.drain)

    version = importlib.metadata.version("fsdfm")
    app = FastAPI(title="fsdfm", version=version, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    for kind in (Problem, HTTPException, Exception):
        app.add_exception_handler(kind, told)
    _write_routes(app, service)
    _look_routes(app, service)
    app.add_middleware(Guard, api_key=settings.api_key, max_body=settings.max_body, hosts=hosts)
    if settings.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origin),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    return app


def _write_routes(app: FastAPI, service: Service) -> None:
    for path, (name, kind) in ENDPOINTS.items():
        app.add_api_route(
            path,
            _route(service, name, kind),
            methods=["POST"],
            name=name,
            summary=kind.__doc__,
            openapi_extra=operation(kind),
            response_model=None,
        )


def _route(service: Service, name: str, kind: type[Common]) -> Any:
    async def endpoint(http: Http) -> Response:
        return await service.handle(http, name, kind)

    return endpoint


def _look_routes(app: FastAPI, service: Service) -> None:
    pages = {name: page_of(f"{name}.html") for name in ("page", "docs")}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return pages["page"]

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return pages["docs"]

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204)

    @app.get("/v1/models", summary="The models.")
    async def models() -> dict[str, Any]:
        return service.listed()

    none: dict[int | str, dict[str, Any]] = {404: {"description": "No such model."}}

    @app.get("/v1/models/{name:path}", summary="A model.", responses=none)
    async def model(name: str) -> dict[str, Any]:
        return service.described(name)

    @app.get("/health", summary="Whether it works, and how much.")
    async def health() -> dict[str, Any]:
        return service.health()

    @app.get("/metrics", summary="Counters, as Prometheus reads them.")
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)


def _event(content: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(content)}\n\n".encode()


async def _left(http: Http) -> None:
    """Returns when the client has left."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
