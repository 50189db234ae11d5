"""How long work is told to whoever waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Progress = Callable[[str, int, int], None]
"""(what was done, how much is done, how much there is in all); both counts in one unit."""

Work = Callable[[str], AbstractContextManager[Progress]]
"""What is about to be done -> who is told of it while it is done."""


@contextmanager
def untold(first: str) -> Iterator[Progress]:
    """Work that nobody is told of."""
    yield lambda label, done, total: None
