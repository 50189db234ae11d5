"""Sides run in turn, A B A B ..., each in a process of its own, and their figures put together.

One process for each side: what one side leaves in caches and in malloc's pools is nothing to the
other. In turn: when the machine is slow for a while, it is slow for all of them.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from fsdfm.bench.figures import Row, median
from fsdfm.bench.jobs import Job
from fsdfm.bench.limits import limits
from fsdfm.bench.sides import OURS, dtype_of
from fsdfm.core.errors import BenchError
from fsdfm.core.progress import Progress
from fsdfm.core.waiting import SPINS, SPINS_NAME, wait_briefly
from fsdfm.model.config import ModelConfig
from fsdfm.model.networks import config_to_dict

PATIENCE_SECONDS = 3600.0
"""How long one run may take."""
LAST_LINES = 3
"""Of a dead worker's stderr, that its error quotes."""
HUGE = str(2**32)
MALLOC: dict[str, dict[str, str]] = {
    "default": {},
    "tuned": {
        "MALLOC_MMAP_THRESHOLD_": HUGE,
        "MALLOC_TRIM_THRESHOLD_": HUGE,
        "MALLOC_TOP_PAD_": str(2**26),
    },
}
"""Settings of glibc's malloc; tuned, it keeps large blocks instead of mapping them anew."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One side to start."""

    task: str
    side: str
    shape: str
    config: ModelConfig
    device: str
    dtype: str
    """Of matrix products, as torch names it: float32, bfloat16 or int8."""
    malloc: str = "default"

    def first_line(self) -> dict[str, Any]:
        """What the worker is told."""
        names = ("task", "side", "device", "dtype")
        return {**{n: getattr(self, n) for n in names}, "config": config_to_dict(self.config)}


def specs_for(
    task: str,
    sides: Sequence[str],
    shape: str,
    config: ModelConfig,
    device: str,
    preferred: torch.dtype,
    malloc: str = "default",
) -> list[Spec]:
    """Sides of one task on one network.

    Args:
        task: sample, distill or pretrain.
        sides: names of them.
        shape: what the network is called.
        config: the network.
        device: where it runs.
        preferred: format of the products of those sides whose name says none.
        malloc: a name in MALLOC.
    """
    dtypes = [str(dtype_of(task, side, preferred)).removeprefix("torch.") for side in sides]
    return [
        Spec(task, side, shape, config, device, dtype, malloc)
        for side, dtype in zip(sides, dtypes, strict=True)
    ]


def machine(device: torch.device, name: str) -> dict[str, Any]:
    """What the figures are measured on; workers have the same threads and torch as this process.

    With its limits, and with its load a minute before: processes that waited for a core.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "machine": name,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": None if load is None else round(load, 1),
        **limits(device),
    }


def say(label: str, done: int, total: int) -> None:
    """Progress as lines on stderr."""
    print(f"  {done}/{total} {label}", file=sys.stderr, flush=True)


def _environment(spec: Spec) -> dict[str, str]:
    """What a side's process finds: our sides wait as `fsdfm` makes them, the others as they do."""
    environment = {**os.environ, **MALLOC[spec.malloc]}
    if spec.side.startswith(OURS):
        wait_briefly(environment)
    elif environment.get(SPINS_NAME) == SPINS:  # it comes from this command
        del environment[SPINS_NAME]
    return environment


class Worker:
    """A process with one side.

    Args:
        spec: the side.
        patience_seconds: it is stopped when an answer takes longer.
    """

    def __init__(self, spec: Spec, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.spec, self.patience_seconds = spec, patience_seconds
        self.loaded_bytes: int | None = None
        self._failed: BenchError | None = None
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fsdfm.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=_environment(spec),
        )
        self._replies: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self._send(spec.first_line())

    def ready(self) -> None:
        """Wait until the side is built; if it cannot be, every question will say why."""
        try:
            self.loaded_bytes = self._receive()["loaded_bytes"]
        except BenchError as error:
            self._failed = error

    def ask(self, do: str, job: Job, seed: int) -> dict[str, Any]:
        """One run.

        Raises:
            BenchError: the worker died, was too slow and was stopped, or has not enough memory.
        """
        if self._failed is not None:
            raise self._failed
        self._send({"do": do, "job": asdict(job), "seed": seed})
        return self._receive()

    def close(self) -> None:
        """Kill the process, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._stderr):
            if pipe is not None:
                _close(pipe)

    def _send(self, record: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(record) + "\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            pass  # it is dead: the answer says so

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._replies.get(timeout=self.patience_seconds)
        except queue.Empty:
            self._process.kill()
            raise BenchError(
                f"{self.spec.side} gave no answer within {self.patience_seconds:g} s and was "
                f"stopped{self._last_words()}"
            ) from None
        if line is None:
            self._replies.put(None)  # and so for every later question
            raise BenchError(f"{self.spec.side} {self._end()}{self._last_words()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise BenchError(f"{self.spec.side}: {reply['error']}")
        return reply

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._replies.put(line)
        self._replies.put(None)

    def _end(self) -> str:
        code = self._process.wait()
        if code >= 0:
            return f"ended with exit code {code}"
        text = f"was killed by {signal.Signals(-code).name}"
        return text + " (out of memory?)" * (-code == signal.SIGKILL)

    def _last_words(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").split("\n")
        words = [line.strip() for line in lines if line.strip()][-LAST_LINES:]
        return f"; it said: {' | '.join(words)}" if words else "; it said nothing"


@contextmanager
def started(
    specs: Sequence[Spec], patience_seconds: float = PATIENCE_SECONDS
) -> Iterator[list[Worker]]:
    """Workers for these sides, built at the same time; none is left in the end."""
    workers: list[Worker] = []
    try:
        for spec in specs:
            workers.append(Worker(spec, patience_seconds))
        for worker in workers:
            worker.ready()
        yield workers
    finally:
        for worker in workers:
            worker.close()


def plan(repeats: Mapping[str, int]) -> list[tuple[str, str]]:
    """What is asked of whom, in order: (request, side).

    Every side warms up, then has its memory measured, then is timed in turn with the others; last,
    an engine's time is split.

    Args:
        repeats: timed runs of each side; one with fewer leaves the later rounds to the others.
    """
    asked = [(do, side) for do in ("warm_up", "memory") for side in repeats]
    for number in range(max(repeats.values())):
        asked += [("time", side) for side, count in repeats.items() if number < count]
    return asked + [("split", side) for side in repeats if side.startswith("engine")]


@dataclass(slots=True)
class _Tally:
    """What one side has answered so far."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def measure(
    workers: Sequence[Worker],
    job: Job,
    repeats: int | Mapping[str, int],
    *,
    peak_tflops: float | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """One job on all sides.

    Args:
        workers: the sides; the first one is what the others' speed-up is over.
        job: what each does.
        repeats: timed runs, of all or of each side by name.
        peak_tflops: of the device in bfloat16, for the fraction of it that such sides reach.
        progress: told after every request.

    Returns:
        A row for each side; one that failed has its error in it, and the others go on.
    """
    sides = {worker.spec.side: worker for worker in workers}
    assert len(sides) == len(workers)
    counts = dict.fromkeys(sides, repeats) if isinstance(repeats, int) else dict(repeats)
    tallies = {side: _Tally() for side in sides}
    asked = plan({side: counts[side] for side in sides})
    for done, (do, side) in enumerate(asked, start=1):
        tally = tallies[side]
        if tally.error is None:
            try:
                _ask(sides[side], do, job, tally)
            except BenchError as error:
                tally.error = str(error)
        if progress is not None:
            progress(f"{side}: {do.replace('_', ' ')}", done, len(asked))
    base = median(next(iter(tallies.values())).seconds)
    return [_row(sides[side], job, tally, base, peak_tflops) for side, tally in tallies.items()]


def measure_aloud(
    workers: Sequence[Worker],
    job: Job,
    repeats: int | Mapping[str, int],
    peak_tflops: float | None = None,
) -> list[Row]:
    """As `measure`, with what is done, and what failed, as lines on stderr."""
    spec = workers[0].spec
    print(f"{spec.task}, {spec.shape}, malloc {spec.malloc}, {job}", file=sys.stderr)
    rows = measure(workers, job, repeats, peak_tflops=peak_tflops, progress=say)
    for row in rows:
        if row.error is not None:
            print(f"error: {row.error}", file=sys.stderr)
    return rows


def _ask(worker: Worker, do: str, job: Job, tally: _Tally) -> None:
    reply = worker.ask(do, job, seed=len(tally.seconds) + 1)
    if do == "time":
        tally.seconds.append(reply["seconds"])
        tally.cpu_seconds.append(reply["cpu_seconds"])
        tally.rates.append(reply["rate"])
    tally.facts.update(reply)


def _row(
    worker: Worker, job: Job, tally: _Tally, base: float | None, peak_tflops: float | None
) -> Row:
    spec = worker.spec
    seconds, flops = median(tally.seconds), tally.facts.get("flops")
    over_floor = of_peak = None
    if flops is not None:
        pairs = zip(tally.seconds, tally.rates, strict=True)
        over_floor = median([each * rate / flops for each, rate in pairs])
        if peak_tflops is not None and seconds is not None and spec.dtype == "bfloat16":
            of_peak = flops / seconds / (peak_tflops * 1e12)
    return Row(
        task=spec.task,
        side=spec.side,
        shape=spec.shape,
        batch=job.batch,
        length=job.length,
        steps=job.steps,
        malloc=spec.malloc,
        dtype=spec.dtype,
        seconds=seconds,
        runs=tally.seconds,
        cpu_seconds=median(tally.cpu_seconds),
        speedup=None if base is None or seconds is None else base / seconds,
        tokens_per_second=None if seconds is None else tally.facts["tokens"] / seconds,
        loaded_bytes=worker.loaded_bytes,
        memory_bytes=tally.facts.get("memory_bytes"),
        over_floor=over_floor,
        of_peak=of_peak,
        split=tally.facts.get("split"),
        error=tally.error,
    )


def _close(pipe: Any) -> None:
    """A pipe to a dead process may still hold a line that nobody will read."""
    with suppress(OSError):
        pipe.close()
