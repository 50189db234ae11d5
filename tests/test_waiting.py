"""Threads that wait give up their core soon, unless the environment says how they wait."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fsdfm.bench import harness
from fsdfm.bench.harness import Spec
from fsdfm.bench.jobs import ADAPTED
from fsdfm.core.waiting import SPINS, SPINS_NAME, wait_briefly


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {SPINS_NAME: SPINS}),
        ({SPINS_NAME: "7"}, {SPINS_NAME: "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_what_the_environment_says_stays(before: dict[str, str], after: dict[str, str]) -> None:
    environment = dict(before)
    wait_briefly(environment)
    assert environment == after


SEEN = """
import json, os, sys
from fsdfm.cli import main
def run(argv):
    print(json.dumps([os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules]))
main._run = lambda words: run(words) or 0
sys.exit(main.main(["generate"]))
"""


def test_a_command_says_so_before_torch_is_there() -> None:
    env = {k: v for k, v in os.environ.items() if k not in (SPINS_NAME, "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", SEEN], env=env, capture_output=True, check=True)
    assert json.loads(done.stdout) == [SPINS, False]


@pytest.mark.parametrize(
    ("side", "said"), [("engine-joint", SPINS), ("ours", SPINS), ("reference-bf16", None)]
)
def test_rivals_wait_as_they_do_by_themselves(
    side: str, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv(SPINS_NAME, SPINS)  # as `fsdfm bench` has it
    spec = Spec("sample", side, "adapted", ADAPTED, "cpu", "float32", "default")
    assert harness._environment(spec).get(SPINS_NAME) == said
