"""Several processes train as one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("parallel_run.py")
STEPS = 50


def train(out: Path, kind: str, processes: int, steps: int = STEPS, die_at: int = -1) -> list[str]:
    """Run to a step; gives what each process said on stderr."""
    out.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, str(SCRIPT), str(out), kind, str(steps), str(STEPS), str(die_at)]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    started = [
        subprocess.Popen(
            words,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    return [process.communicate(timeout=300)[1] for process in started]


def losses(out: Path) -> list[float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("kind", ["pretrain", "distill"])
def test_two_processes_have_the_losses_of_one_also_on_from_each_other(
    tmp_path: Path, kind: str
) -> None:
    train(tmp_path / "one", kind, 1)
    expected = losses(tmp_path / "one")
    assert len(expected) == STEPS
    train(tmp_path / "two", kind, 2)
    assert losses(tmp_path / "two") == pytest.approx(expected, rel=1e-5)
    for steps, processes in ((15, 2), (30, 1), (STEPS, 2)):
        train(tmp_path / "mixed", kind, processes, steps)
        assert len(losses(tmp_path / "mixed")) == steps
    assert losses(tmp_path / "mixed") == pytest.approx(expected, rel=1e-5)


def test_a_process_that_dies_ends_the_other_with_a_message(tmp_path: Path) -> None:
    said = train(tmp_path / "two", "pretrain", 2, die_at=20)
    assert "error: Another process of this run ended" in said[0]
