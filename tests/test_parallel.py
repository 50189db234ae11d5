"""Several processes train as one."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from parallel_run import DIES_AT, KINDS, MIXED, STEPS, TAKEN_OVER, train
from safetensors.torch import load_file

from fsdfm.train.parallel import ALONE

SCRIPT = Path(__file__).with_name("parallel_run.py")


@dataclass
class Four:
    """What four processes left and said."""

    place: Path
    stderr: list[str]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Four:
    """All trainings of several processes, which start once: starting costs more than training."""
    out = tmp_path_factory.mktemp("parallel")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    subprocess.run([sys.executable, str(SCRIPT), str(out), str(port)], timeout=300, check=True)
    return Four(out, [(out / f"stderr-{rank}").read_text() for rank in range(4)])


def losses(out: Path) -> list[float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def bound(out: Path) -> float:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    (found,) = [line["elbo_nats_per_token"] for line in lines if "elbo_nats_per_token" in line]
    return float(found)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same trainings of one process."""
    out = tmp_path_factory.mktemp("one")
    for kind in KINDS:
        train(out / kind, kind, ALONE)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_losses_of_one(four: Four, one: Path, kind: str) -> None:
    expected = losses(one / kind)
    assert len(expected) == STEPS
    assert losses(four.place / f"{kind}-two") == pytest.approx(expected, rel=1e-5), four.stderr
    assert bound(four.place / f"{kind}-two") == pytest.approx(bound(one / kind), rel=1e-5)


@pytest.mark.parametrize("kind", TAKEN_OVER)
def test_a_run_goes_on_from_two_processes_to_one_to_four_to_two(
    four: Four, one: Path, kind: str
) -> None:
    found = losses(four.place / f"{kind}-mixed")
    assert len(found) == MIXED, four.stderr
    assert found == pytest.approx(losses(one / kind)[:MIXED], rel=1e-5)


def test_a_sharded_run_leaves_the_averages_of_an_unsharded_one(four: Four, one: Path) -> None:
    for kind in (kind for kind in KINDS if kind.startswith("fsdp")):
        ours, theirs = (
            load_file(out / "checkpoint.safetensors")
            for out in (four.place / f"{kind}-two", one / kind)
        )
        assert ours.keys() == theirs.keys(), kind
        # AdamW makes whole steps of gradients that are nearly zero, so single weights may differ.
        for name in (name for name in ours if name.startswith("ema.")):
            assert torch.dist(ours[name], theirs[name]) < 1e-3 * theirs[name].norm(), (kind, name)


def test_one_process_that_torchrun_started_may_be_sharded(four: Four, one: Path) -> None:
    assert losses(four.place / "fsdp-pretrain-lone") == pytest.approx(
        losses(one / "fsdp-pretrain"), rel=1e-5
    ), four.stderr


def test_a_process_that_dies_ends_the_other_with_a_message(four: Four) -> None:
    assert "error: Another process of this run ended" in four.stderr[0], four.stderr
    assert len(losses(four.place / "dies")) == DIES_AT
