"""How long work is told to whoever waits for it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""(what was done, how much is done, how much there is in all); both counts in one unit."""
