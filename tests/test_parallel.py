"""Several processes train as one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from parallel_run import DIES_AT, KINDS, STEPS, train

from fsdfm.train.parallel import ALONE

SCRIPT = Path(__file__).with_name("parallel_run.py")


@dataclass
class Two:
    """What two processes left and said."""

    place: Path
    stderr: list[str]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    """All trainings of two processes, which start once: starting costs more than training."""
    out = tmp_path_factory.mktemp("parallel")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(out)],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    return Two(out, [process.communicate(timeout=300)[1] for process in started])


def losses(out: Path) -> list[float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_losses_of_one_also_on_from_each_other(
    two: Two, tmp_path: Path, kind: str
) -> None:
    train(tmp_path / "one", kind, ALONE)
    expected = losses(tmp_path / "one")
    assert len(expected) == STEPS, two.stderr
    assert losses(two.place / f"{kind}-two") == pytest.approx(expected, rel=1e-5), two.stderr
    assert losses(two.place / f"{kind}-mixed") == pytest.approx(expected, rel=1e-5), two.stderr


def test_a_process_that_dies_ends_the_other_with_a_message(two: Two) -> None:
    assert "error: Another process of this run ended" in two.stderr[0], two.stderr
    assert len(losses(two.place / "dies")) == DIES_AT
