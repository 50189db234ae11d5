"""`fsdfm bench`: a short look at speed and memory on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fsdfm.bench.figures import Row
from fsdfm.bench.harness import machine, measure, plan, specs_for, started
from fsdfm.bench.jobs import Job, sampling, shape
from fsdfm.bench.settings import BenchSettings
from fsdfm.bench.sides import sides_for, users_dtype
from fsdfm.core.device import hardware, pick_device, preferred_dtype
from fsdfm.core.errors import ConfigError
from fsdfm.core.progress import Progress

TASKS = ("sample", "distill", "pretrain")
"""Of a short look; benchmarks/training.py has the joint head's training too."""
TRAINING_BATCH, TRAINING_LENGTH = 4, 256


def bench(args: BenchSettings, progress: Progress) -> tuple[dict[str, Any], list[Row]]:
    """Measure the sides of TASKS.

    Args:
        args: what is measured.
        progress: told (what was done, requests done, requests in all).

    Returns:
        The machine, and a row for each side.

    Raises:
        ConfigError: a value out of range, no such model, or no such device.
        CheckpointError: a directory that holds no model.
    """
    name = args.shape if args.model is None else args.model.resolve().name
    config = shape(args.shape if args.model is None else str(args.model))
    device = pick_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "mps":
        raise ConfigError("bench runs on cuda or cpu: say device=cpu.", "device")
    if args.length > config.context_length:
        raise ConfigError(
            f"length must be at most {config.context_length}, got {args.length}.", "length"
        )
    dtype = preferred_dtype(device)
    jobs = {task: Job(TRAINING_BATCH, min(TRAINING_LENGTH, args.length), 1) for task in TASKS}
    said = sampling(args.shape if args.model is None else str(args.model))
    jobs["sample"] = Job(args.batch_size, args.length, args.steps, sampling=said)
    sides = {task: sides_for(task, dtype, device) for task in jobs}
    totals = {task: len(plan(dict.fromkeys(sides[task], args.repeats))) for task in jobs}
    facts = machine(device, hardware(device))  # before the sides are there
    rows: list[Row] = []
    before = 0
    for task, job in jobs.items():
        specs = specs_for(
            task, sides[task], name, config, str(device), users_dtype(task, device, config)
        )
        tell = _part(progress, task, before, sum(totals.values()))
        with started(specs) as workers:
            rows += measure(workers, job, args.repeats, progress=tell)
        before += totals[task]
    return facts, rows


def _part(
    progress: Progress, task: str, before: int, total: int
) -> Callable[[str, int, int], None]:
    """Progress of one task, as part of all."""

    def tell(label: str, done: int, _: int) -> None:
        progress(f"{task}, {label}", before + done, total)

    return tell
