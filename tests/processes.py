"""Two processes that work together, of which this is one: starting another takes a while."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch

PATIENCE = timedelta(minutes=3)
"""How long one waits for the other; the code under test would for days."""


@contextlib.contextmanager
def beside(words: Sequence[object]) -> Iterator[subprocess.Popen[str]]:
    """While another process works as the second of two, this one is the first, as by torchrun.

    Args:
        words: of the Python command of the other.

    Yields:
        The other; both have ended well when the block has.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    join = torch.distributed.init_process_group

    def briefly(*args: Any, **options: Any) -> None:
        join(*args, **options | {"timeout": PATIENCE})

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ADDR", "127.0.0.1"), ("PORT", port)):
            patch.setenv(f"MASTER_{name}", value)
        patch.setenv("WORLD_SIZE", "2")
        patch.setattr(torch.distributed, "init_process_group", briefly)
        command = [sys.executable, *map(str, words)]
        rank = {"RANK": "1", "LOCAL_RANK": "1"}
        with subprocess.Popen(
            command, env={**os.environ, **rank}, stderr=subprocess.PIPE, text=True
        ) as other:
            patch.setenv("RANK", "0")
            patch.setenv("LOCAL_RANK", "0")
            try:
                yield other
            except BaseException:
                other.kill()
                raise
        assert other.returncode == 0
