"""One of the processes of tests/test_parallel.py: trains, and says what it lost."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from test_train import SETTINGS, Recorder, Toy, batch, distill_objective, make_task

from fsdfm.core.errors import FsdfmError
from fsdfm.train.loop import Run
from fsdfm.train.parallel import started


def main(directory: str, kind: str, steps: int, whole: int, die_at: int) -> None:
    torch.set_num_threads(1)
    objective = distill_objective() if kind == "distill" else None
    with started(torch.device("cpu")) as world:

        def dies(step: int) -> None:
            if world.rank == 1 and step == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

        part = world.share(len(batch(0)))
        rows = slice(world.rank * part, (world.rank + 1) * part)
        task = replace(make_task(objective), world=world, batch=lambda i: batch(i)[rows])
        settings = replace(SETTINGS, steps=whole, log_every=1, checkpoint_every=steps)

        def advanced(step: int) -> None:
            dies(step)
            if steps < whole and step == steps - 1:
                os.kill(os.getpid(), signal.SIGTERM)  # stops after this update, and saves

        watcher = Recorder(advanced)
        Run(Path(directory), settings, task, watcher).train(Toy())


if __name__ == "__main__":
    where, kind, *numbers = sys.argv[1:]
    try:
        main(where, kind, *map(int, numbers))
    except FsdfmError as error:
        sys.exit(f"error: {error}")
