"""The files of a model directory: found, read, and brought into place as one.

A save is staged in full inside the directory, committed by one rename, and then moved into place
file by file. Whoever dies in between leaves a directory that loads: before the rename the old
model, after it the new one, because a reader prefers a committed file to the one beside it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fsdfm.core.errors import CheckpointError
from fsdfm.core.files import one_line

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TOKENIZER, GENERATION = "tokenizer.json", "generation.json"
FILES = (WEIGHTS, CONFIG, TOKENIZER, GENERATION)

STAGED, COMMITTED = ".saving", ".saved"
BUNDLED = "bundled"


def commit(
    directory: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str],
    texts: Mapping[str, str],
) -> None:
    """Stage weights and texts, then bring them into place as one.

    Args:
        directory: made if missing.
        tensors: the weights, on the CPU.
        metadata: of the weights' file.
        texts: contents by name, of all FILES but the weights.

    Raises:
        CheckpointError: something cannot be written; what was there before stays.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _move_committed(directory)
        staged = directory / STAGED
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        save_file(tensors, staged / WEIGHTS, metadata)
        for name, text in texts.items():
            (staged / name).write_text(text, encoding="utf-8")
        # The library makes the weights readable by their owner alone; follow the umask instead.
        shutil.copymode(staged / CONFIG, staged / WEIGHTS)
        for path in (*(staged / name for name in FILES), staged):
            _sync(path)
        staged.rename(directory / COMMITTED)
        _sync(directory)
        _move_committed(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(directory / STAGED, ignore_errors=True)
        raise CheckpointError(f"Cannot save a model in {directory}: {one_line(error)}.") from error


def resolve(name: str | Path) -> Path:
    """A local directory, else the package's own model (`bundled`), else a copy from the Hub.

    Raises:
        CheckpointError: there is neither.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if str(name) == BUNDLED and not path.exists():
        return bundled()
    if path.exists():
        raise CheckpointError(f"{path} is a file: give the directory of a model.")
    # A first part that exists here makes it a mistyped path, not a name on the Hub.
    looks_remote = isinstance(name, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)
    if not looks_remote or path.parent.exists():
        raise CheckpointError(f"There is no model directory {path}.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(FILES)))
    except Exception as error:  # HTTP, offline, authorisation: the library has many trees
        raise CheckpointError(
            f"There is no directory {path}, and the Hugging Face Hub does not give it: "
            f"{one_line(error)}."
        ) from error


def bundled() -> Path:
    """The directory of the model that comes with the package.

    Raises:
        CheckpointError: there is none.
    """
    directory = Path(str(resources.files("fsdfm") / "assets" / BUNDLED))
    if not directory.is_dir():
        raise CheckpointError(
            "This installation came without its bundled model: reinstall fsdfm, or name the "
            "directory of a model."
        )
    return directory


def find(directory: Path, name: str) -> Path:
    """Where a file of the model lies: a committed save that was not moved yet comes first."""
    committed = directory / COMMITTED / name
    return committed if committed.exists() else directory / name


def _move_committed(directory: Path) -> None:
    """Bring a committed save into place; does nothing without one."""
    committed = directory / COMMITTED
    if not committed.is_dir():
        return
    for name in FILES:
        if (committed / name).exists():
            os.replace(committed / name, directory / name)
    committed.rmdir()
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is missing, unreadable or something else.
    """
    try:
        values = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {one_line(error)}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object.")
    return values


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        CheckpointError: it is missing or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"Cannot read {path}: {one_line(error)}.") from error
