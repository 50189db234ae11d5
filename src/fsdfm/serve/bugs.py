"""What the log is told of a bug: where it is, but not its message, which may quote a text."""

from __future__ import annotations

import logging
import traceback

log = logging.getLogger("fsdfm.serve")


def note_bug(words: str, error: BaseException) -> None:
    """Log where an error came from; its message at level DEBUG only.

    Args:
        words: what did not work.
        error: why.
    """
    frames = "".join(traceback.format_tb(error.__traceback__)).rstrip()
    log.error("%s %s at\n%s", words, type(error).__name__, frames)
    log.debug("It said: %s", error)
