"""Whole-file writes: what stands at the path decides how, and nothing half written is left."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fsdfm.core.errors import CheckpointError, DataError
from fsdfm.core.files import digest, file_digest, one_line, replacing, tensor_bytes, write_whole


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_file_is_made_with_the_directories_above_it_and_then_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_whole(path, "é\n")
    assert path.read_bytes() == "é\n".encode()
    path.chmod(0o640)
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert names(path.parent) == {"b.txt"}


@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_stays_one(tmp_path: Path, there: bool) -> None:
    (tmp_path / "disk").mkdir()
    file, link = tmp_path / "disk" / "file", tmp_path / "link"
    link.symlink_to(file)
    (tmp_path / "again").symlink_to(link)
    if there:
        file.write_text("old")
    write_whole(tmp_path / "again", "new")
    assert link.is_symlink() and (tmp_path / "again").is_symlink()
    assert file.read_text() == "new"
    assert names(tmp_path / "disk") == {"file"}


def test_what_a_library_writes_goes_behind_a_link_and_replaces_no_pipe(tmp_path: Path) -> None:
    file, link, pipe = tmp_path / "file", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(file)
    for text in ("first", "second"):
        with replacing(link) as partial:
            partial.write_text(text)
        assert link.is_symlink() and file.read_text() == text
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="is no regular file"), replacing(pipe) as partial:
        partial.write_text("never")
    assert pipe.is_fifo() and names(tmp_path) == {"file", "link", "pipe"}


def test_a_pipe_is_written_through(tmp_path: Path) -> None:
    pipe, found = tmp_path / "pipe", list[bytes]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()), daemon=True)
    reader.start()
    write_whole(pipe, b"through" * 20_000)
    reader.join(timeout=10)
    assert found == [b"through" * 20_000]
    assert pipe.is_fifo() and names(tmp_path) == {"pipe"}


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="needs names of open files")
def test_an_open_pipe_that_has_a_name_is_written_through() -> None:
    reader, writer = os.pipe()
    write_whole(f"/dev/fd/{writer}", b"through")
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        assert file.read() == b"through"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_device_is_written_through_and_its_error_told(tmp_path: Path) -> None:
    device, link = Path("/dev/full"), tmp_path / "link"
    link.symlink_to(device)
    for path in (device, link):
        with pytest.raises(DataError) as caught:
            write_whole(path, b"text")
        assert str(caught.value).startswith(f"Cannot write {path} (No space left on device): ")
        assert "\n" not in str(caught.value)
    assert device.is_char_device()
    assert link.is_symlink()
    write_whole("/dev/null", b"text")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("where", [".", "file/below", "loop"])
def test_what_cannot_be_a_file_is_told_in_one_line(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = names(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        write_whole(tmp_path / where, b"text", error=CheckpointError)
    assert str(caught.value).startswith(f"Cannot write {tmp_path / where} (")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == before


def test_a_full_disk_keeps_the_old_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device"):
        write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == {"file"}


def test_a_digest_is_of_the_bytes_one_after_the_other(tmp_path: Path) -> None:
    expected = hashlib.sha256("né".encode() + b"12").hexdigest()
    assert digest(["n", "é", b"1", memoryview(b"2")]) == expected
    (tmp_path / "file").write_bytes("né12".encode())
    assert file_digest(tmp_path / "file") == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_give_the_bytes_of_their_numbers(dtype: torch.dtype) -> None:
    matrix = torch.tensor([[0.5, 1.5], [-2.0, 3.0]], dtype=dtype)
    found = b"".join(tensor_bytes([matrix.t(), torch.tensor(7.0)]))
    whole = np.array([0.5, -2.0, 1.5, 3.0], "<f4").view("<u4")
    expected = whole if dtype == torch.float32 else (whole >> 16).astype("<u2")
    assert found == expected.tobytes() + np.array(7.0, "<f4").tobytes()


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.EACCES, "Permission denied", "/a/file"), "Permission denied"),
        (OSError("not a\nlocal folder."), "not a"),
        (ValueError("  first line.\nsecond"), "first line"),
        (ValueError("x" * 300), "x" * 200),
        (KeyError(), "KeyError"),
    ],
)
def test_an_error_in_one_line(error: Exception, text: str) -> None:
    assert one_line(error) == text
