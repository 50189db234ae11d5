"""One writer at a time, and none is kept out by the dead."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fsdfm.core import lock
from fsdfm.core.errors import ConfigError
from fsdfm.core.lock import locked

HOLD = """
import pathlib, sys, time
from fsdfm.core.lock import locked
path = pathlib.Path(sys.argv[1])
with locked(path, path.parent):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_one_is_refused_in_one_line_that_names_the_first(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with locked(path, tmp_path):
        with pytest.raises(ConfigError) as caught, locked(path, tmp_path):
            pass
        said = f"{tmp_path} is being written by process {os.getpid()}: wait for it to end"
        assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
        assert path.exists(), "the refused one leaves it alone"
    assert not path.exists()
    with locked(path, tmp_path):
        pass


def test_an_error_lets_it_go(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path / ".lock", tmp_path):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_process_is_none(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"process {holder.pid}:"), locked(path, tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert path.exists()
    with locked(path, tmp_path):
        assert path.read_text() == str(os.getpid())
    assert not path.exists()


def test_a_file_that_its_owner_removed_meanwhile_is_not_taken_for_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lock.fcntl is not None
    path, real, calls = tmp_path / ".lock", lock.fcntl.flock, list[int]()

    def late(descriptor: int, how: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            path.unlink()  # the last owner, after this file was opened
        real(descriptor, how)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    with locked(path, tmp_path):
        assert len(calls) == 2
        with pytest.raises(ConfigError), locked(path, tmp_path):
            pass


@pytest.mark.parametrize("what", ["no fcntl", "no locks"])
def test_where_there_are_no_locks_nothing_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def missing(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if what == "no fcntl":
        monkeypatch.setattr(lock, "fcntl", None)
    else:
        monkeypatch.setattr(lock.fcntl, "flock", missing)
    started = time.monotonic()
    with locked(tmp_path / ".lock", tmp_path), locked(tmp_path / ".lock", tmp_path):
        pass
    assert time.monotonic() - started < 5
    assert list(tmp_path.iterdir()) == []
