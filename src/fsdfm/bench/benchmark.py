"""`fsdfm bench`: a short look at speed and memory on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from tyro.conf import arg

from fsdfm.bench.figures import Row
from fsdfm.bench.harness import Progress, machine, measure, plan, specs_for, started
from fsdfm.bench.sides import SIDES, Job, shape, sides_for
from fsdfm.core.device import hardware, pick_device, preferred_dtype
from fsdfm.core.errors import ConfigError

TRAINING_BATCH, TRAINING_LENGTH = 4, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchArgs:
    """Measure speed and memory on this machine, beside reference implementations.

    Each side runs in a process of its own, in turn with the others. Sampling is compared with the
    published sampler as the formulas have it, and with an autoregressive GPT-2 of the same size;
    distillation and pretraining with plain loops. Weights are random: they do not change the speed.
    """

    shape: Literal["bundled", "tiny", "small", "0.17B", "1.3B", "1.7B"] = "bundled"
    """Network: that of the bundled model, or a preset."""
    steps: int = 8
    """Model calls of the samplers."""
    length: int = 1024
    """Tokens of a text; training takes at most 256."""
    batch_size: int = 1
    """Texts made together."""
    repeats: int = 3
    """Timed runs of each side; the median is shown."""
    device: Annotated[
        str | None, arg(metavar="DEVICE", help_behavior_hint="(default: cuda, else cpu)")
    ] = None
    """cuda, cuda:N or cpu."""
    json: bool = False
    """Print one JSON object with the machine and all figures."""

    def checked(self) -> BenchArgs:
        """The arguments.

        Raises:
            ConfigError: a value out of range.
        """
        for name in ("steps", "length", "batch_size", "repeats"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} must be at least 1, got {getattr(self, name)}.")
        return self


def bench(args: BenchArgs, progress: Progress) -> tuple[dict[str, Any], list[Row]]:
    """Measure all sides of all tasks.

    Args:
        args: what is measured.
        progress: told (what was done, requests done, requests in all).

    Returns:
        The machine, and a row for each side.

    Raises:
        ConfigError: a value out of range, or no such device.
    """
    args, config = args.checked(), shape(args.shape)
    device = pick_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "mps":
        raise ConfigError("bench runs on cuda or cpu: say --device cpu.")
    if args.length > config.context_length:
        raise ConfigError(f"--length must be at most {config.context_length}, got {args.length}.")
    dtype = preferred_dtype(device)
    jobs = {task: Job(TRAINING_BATCH, min(TRAINING_LENGTH, args.length), 1) for task in SIDES}
    jobs["sample"] = Job(args.batch_size, args.length, args.steps)
    sides = {task: sides_for(task, dtype) for task in jobs}
    totals = {task: len(plan(dict.fromkeys(sides[task], args.repeats))) for task in jobs}
    rows: list[Row] = []
    before = 0
    for task, job in jobs.items():
        specs = specs_for(task, sides[task], args.shape, config, str(device), dtype)
        tell = _part(progress, task, before, sum(totals.values()))
        with started(specs) as workers:
            rows += measure(workers, job, args.repeats, progress=tell)
        before += totals[task]
    return machine(device, hardware(device)), rows


def _part(
    progress: Progress, task: str, before: int, total: int
) -> Callable[[str, int, int], None]:
    """Progress of one task, as part of all."""

    def tell(label: str, done: int, _: int) -> None:
        progress(f"{task}, {label}", before + done, total)

    return tell
