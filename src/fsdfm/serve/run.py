"""The server as a process: it listens, and finishes what it has when it is told to stop."""

from __future__ import annotations

import contextlib
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping

import uvicorn

from fsdfm.core.errors import ConfigError
from fsdfm.core.files import one_line
from fsdfm.generate.generator import Generator
from fsdfm.serve.app import create_app
from fsdfm.serve.settings import LOOPBACK, ServeSettings

KEEP_ALIVE = 75
"""Seconds that an idle connection is kept: longer than clients and balancers keep theirs, for who
closes first may do so just as the other sends."""


class Server(uvicorn.Server):
    """Stops on a signal as uvicorn does, but does not send the signal on afterwards."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """See uvicorn."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        wanted = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(
    models: Mapping[str, Generator],
    settings: ServeSettings,
    listening: Callable[[str], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; then what was taken on is finished.

    Args:
        models: by name.
        settings: of the server.
        listening: told the address once it can be used.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    sock = _listen(settings)
    config = uvicorn.Config(
        create_app(models, settings, hosts=own_names(settings, sock.getsockname()[0])),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=round(settings.drain),
    )
    if listening is not None:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        listening(f"http://{host}:{sock.getsockname()[1]}")
    with sock:
        Server(config).run(sockets=[sock])


def own_names(settings: ServeSettings, address: str) -> tuple[str, ...] | None:
    """What clients may call the server; None: anything.

    A browser lets a page of another site in here if the name of that site leads to this machine.
    What listens on loopback without a key must see to that itself.

    Args:
        settings: of the server.
        address: that it listens on.
    """
    if settings.api_key is not None or not ipaddress.ip_address(address).is_loopback:
        return None
    return (*LOOPBACK, settings.host.lower())


def _listen(settings: ServeSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    sock = socket.socket(family)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((settings.host, settings.port))
        sock.listen(2048)
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"Cannot listen on host={settings.host} with port={settings.port} "
            f"({one_line(error)}): choose others.",
            "host",
            "port",
        ) from None
    return sock
