"""One of the two processes of tests/test_parallel.py: trains in every way that is asked there."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from test_train import SETTINGS, Recorder, Toy, batch, distill_objective, make_task

from fsdfm.core.errors import FsdfmError
from fsdfm.train.loop import Run
from fsdfm.train.parallel import ALONE, World, started

STEPS = 50
KINDS = ("pretrain", "distill")
MIXED = ((15, 2), (30, 1), (STEPS, 2))
"""Where a run is stopped, and how many processes it has until then."""
DIES_AT = 20


def train(
    out: Path, kind: str, world: World, until: int = STEPS, each: Callable[[int], None] = id
) -> None:
    """Train up to an update, on from what is there."""
    out.mkdir(exist_ok=True)
    part = world.share(len(batch(0)))
    rows = slice(world.rank * part, (world.rank + 1) * part)
    objective = distill_objective() if kind == "distill" else None
    task = replace(make_task(objective), world=world, batch=lambda i: batch(i)[rows])
    settings = replace(
        SETTINGS, steps=STEPS, log_every=1, evaluate_every=STEPS, checkpoint_every=until
    )

    def advanced(step: int) -> None:
        each(step)
        if until < STEPS and step == until - 1 and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)  # one is told: all stop after this update

    Run(out, settings, task, Recorder(advanced)).train(Toy())


def main(place: Path) -> None:
    torch.set_num_threads(1)
    with started(torch.device("cpu")) as world:
        for kind in KINDS:
            train(place / f"{kind}-two", kind, world)
            for until, processes in MIXED:
                if processes == 2:
                    train(place / f"{kind}-mixed", kind, world, until)
                elif world.first:
                    train(place / f"{kind}-mixed", kind, ALONE, until)
                world.wait()

        def dies(step: int) -> None:
            if world.rank == 1 and step == DIES_AT:
                os.kill(os.getpid(), signal.SIGKILL)

        train(place / "dies", "pretrain", world, each=dies)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except FsdfmError as error:
        sys.exit(f"error: {error}")
