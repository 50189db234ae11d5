"""One writer at a time: a lock that its owner's death lets go."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from fsdfm.core.errors import ConfigError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None


@contextlib.contextmanager
def locked(path: Path, place: Path) -> Iterator[None]:
    """Hold a lock while the block runs.

    The system holds the lock, not the file: whoever is killed leaves the file and no lock. Where
    the system or the file system has none, nothing is locked.

    Args:
        path: the lock's file; made, and gone afterwards.
        place: what is locked, for the message.

    Raises:
        ConfigError: somebody else holds it.
        OSError: the file cannot be made.
    """
    if fcntl is None:
        yield
        return
    descriptor = _taken(path, place)
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)  # while it is still held
        os.close(descriptor)


def _taken(path: Path, place: Path) -> int:
    """A descriptor of the file at the path, with its lock."""
    assert fcntl is not None
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 20).decode(errors="replace")
            os.close(descriptor)
            who = f"process {owner}" if owner.isdecimal() else "another process"
            raise ConfigError(
                f"{place} is being written by {who}: wait for it to end, or choose another out.",
                "out",
            ) from None
        except OSError:  # a file system without locks
            return descriptor
        # Its last owner may have removed the file between the two calls: then this is no lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        os.close(descriptor)
