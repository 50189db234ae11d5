"""Whole-file writes, digests, and errors of libraries in one line."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fsdfm.core.errors import DataError, FsdfmError

if TYPE_CHECKING:
    from torch import Tensor

LONGEST_MESSAGE = 200
"""Characters that are kept of a library's message."""


def write_whole(
    path: str | Path, data: str | bytes, *, error: type[FsdfmError] = DataError
) -> None:
    """Write a file that is either the old one or the whole new one.

    A symbolic link stays one: the file that it names is written. What is there and no regular file
    (a device, a pipe) is written through, never replaced.

    Args:
        path: the file; missing directories above it are made.
        data: its contents; text becomes UTF-8.
        error: what to raise.

    Raises:
        FsdfmError: of that kind; no space, no permission, a reader that went away. Nothing half
            written is left behind.
    """
    data = data.encode() if isinstance(data, str) else data
    try:
        file = Path(path)
        if file.is_file() or not (file.exists() or real(path).is_symlink()):
            _replace(file, data)
        else:  # a device, a pipe; or what cannot be opened: a directory, links in a circle
            with open(path, "wb") as stream:
                stream.write(data)
    except OSError as reason:
        raise error(
            f"Cannot write {path} ({one_line(reason)}): free some space or choose another place, "
            "then run the same command again."
        ) from None


def real(path: str | Path) -> Path:
    """The file that a path names, behind all symbolic links; it need not exist."""
    return Path(os.path.realpath(path))


def _replace(path: Path, data: bytes) -> None:
    """Write beside a regular file, then rename over it."""
    real(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place to write a file that becomes `path` when the block ends well, and goes if it fails.

    For files that a library writes; `write_whole` is for all others.

    Args:
        path: a regular file or nothing yet, or a symbolic link to one, which stays a link; its
            directory is there.

    Raises:
        OSError: the file cannot be made, or not be put in place; or what is there is a device, a
            pipe or a directory, which is left alone.
    """
    path = real(path)
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no regular file")
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, partial)
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def is_taken(directory: Path) -> bool:
    """Whether something stands where a new directory should be made; an empty one does not count.

    Raises:
        OSError: it cannot be looked into.
    """
    if not directory.is_dir():
        return directory.exists()
    return any(directory.iterdir())


def digest(parts: Iterable[str | bytes | memoryview]) -> str:
    """SHA-256 of the parts one after the other (text as UTF-8), in hexadecimal."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_bytes(tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    """The bytes of tensors in order, whatever their number format; one at a time on the CPU."""
    import torch

    for tensor in tensors:
        yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def one_line(error: BaseException) -> str:
    """What went wrong, for a message of ours.

    Args:
        error: of the system or of a library.

    Returns:
        The system's words for an OSError that has them; else the first line of its message, at most
        200 characters, without its full stop; else its kind.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first = str(error).strip().partition("\n")[0]
    return first[:LONGEST_MESSAGE].rstrip(". ") or type(error).__name__
