"""Several processes that work together, without torchrun, which takes as long to start as they."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

PATIENCE_SECONDS = 300


def together(
    words: Sequence[object], count: int = 2, environment: Mapping[str, str] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """What they say, with all that torchrun tells its processes.

    Args:
        words: of a Python command, each process's.
        count: processes.
        environment: besides this process's.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, *map(str, words)]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    with contextlib.ExitStack() as stack:
        started = []
        for rank in map(str, range(count)):
            own = {**os.environ, **(environment or {}), **where, "RANK": rank, "LOCAL_RANK": rank}
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, env=own, stdout=pipe, stderr=pipe, text=True)
            started.append(stack.enter_context(process))
            stack.callback(process.kill)
        said = [process.communicate(timeout=PATIENCE_SECONDS) for process in started]
    return [
        subprocess.CompletedProcess(command, process.returncode, *words)
        for process, words in zip(started, said, strict=True)
    ]
