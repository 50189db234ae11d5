"""One side in its own process: `python -m fsdfm.bench.worker`, JSON lines in and out.

The first line says which side to build, and every further line asks for one run of it. Each is
answered by a line: figures, or {"error": ...}.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fsdfm.bench.jobs import Job, Side, synchronise
from fsdfm.bench.limits import matmul_rate
from fsdfm.bench.sides import build_side
from fsdfm.core.device import give_back_memory
from fsdfm.core.errors import FsdfmError
from fsdfm.model.causal import CausalConfig
from fsdfm.model.config import ModelConfig
from fsdfm.model.int8 import beside_int8
from fsdfm.model.networks import config_from_dict

TOY = ModelConfig(64, 64, blocks=1, heads=1, cond_size=64, context_length=16)
TWIN_TOY = CausalConfig(64, 64, 1, 1, 64, 16, "mask", kv_heads=1, head_size=64, mlp_size=64)
"""Networks to try a side with, before any measurement: packages load, libraries take memory."""
PROCESS = Path("/proc/self")
CROWDED_BYTES = 16 * 2**30
"""A GPU cache larger than this is given back after a run, so that the other sides fit."""


def memory_before(device: torch.device) -> dict[str, int] | None:
    """Memory that is in use, in bytes, with the peak reset to it; None where nobody can tell.

    What malloc keeps for later is given back first: else a second run would seem to take nothing.
    """
    gc.collect()
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        return {"now": torch.cuda.memory_allocated(device)}
    give_back_memory()
    try:
        (PROCESS / "clear_refs").write_text("5")
    except OSError:
        return None
    return _status()


def memory_since(before: dict[str, int] | None, device: torch.device) -> int | None:
    """Peak since `memory_before` beyond what was in use then, bytes.

    Pages of libraries that were read from files meanwhile are no working memory.
    """
    if before is None:
        return None
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - before["now"]
    after = _status()
    return after["VmHWM"] - before["VmRSS"] - max(0, after["RssFile"] - before["RssFile"])


def memory_kept(before: dict[str, int] | None, device: torch.device) -> int | None:
    """What is in use now beyond what was in use then, bytes; counted as `memory_since` does."""
    now = memory_before(device)
    if before is None or now is None:
        return None
    if device.type == "cuda":
        return now["now"] - before["now"]
    return now["VmRSS"] - before["VmRSS"] - max(0, now["RssFile"] - before["RssFile"])


def _status() -> dict[str, int]:
    text = (PROCESS / "status").read_text()
    found = re.findall(r"^(VmHWM|VmRSS|RssFile):\s+(\d+) kB", text, re.MULTILINE)
    return {name: 1024 * int(value) for name, value in found}


class Bench:
    """A side and what is asked of it.

    Args:
        spec: task, side, config, device and dtype, as the first line has them.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self.config = config_from_dict(spec["config"])
        self.device, self.dtype = torch.device(spec["device"]), getattr(torch, spec["dtype"])
        build = partial(build_side, spec["task"], spec["side"])
        toy = TWIN_TOY if isinstance(self.config, CausalConfig) else TOY
        build(toy, self.device, self.dtype).run(Job(1, toy.context_length, 1), seed=0)
        before = memory_before(self.device)
        self.side: Side = build(self.config, self.device, self.dtype)
        self.loaded_bytes = memory_kept(before, self.device)

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked: `warm_up`, `memory`, `time` or `split`, with a job and a seed."""
        job, seed = Job(**request["job"]), int(request["seed"])
        do: dict[str, Callable[[Job, int], dict[str, Any]]] = {
            "warm_up": self._warm_up,
            "memory": self._memory,
            "time": self._time,
            "split": self._split,
        }
        return do[request["do"]](job, seed)

    def _warm_up(self, job: Job, seed: int) -> dict[str, Any]:
        self.side.run(self.side.warm_up(job), seed)
        return {}

    def _memory(self, job: Job, seed: int) -> dict[str, Any]:
        before = memory_before(self.device)
        self.side.run(self.side.peak(job), seed)
        return {"memory_bytes": memory_since(before, self.device)}

    def _time(self, job: Job, seed: int) -> dict[str, Any]:
        synchronise(self.device)
        started, cpu_started = time.perf_counter(), time.process_time()
        cost = self.side.run(job, seed)
        synchronise(self.device)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu_started
        dtype = beside_int8() if self.dtype == torch.int8 else self.dtype
        rate = matmul_rate(self.config.hidden_size, self.device, dtype)
        figures = {"seconds": seconds, "cpu_seconds": cpu, "rate": rate}
        return {**figures, "tokens": cost.tokens, "flops": cost.flops}

    def _split(self, job: Job, seed: int) -> dict[str, Any]:
        split = getattr(self.side, "split", None)
        return {"split": None if split is None else split(job, seed)}


def main() -> None:
    """Serve until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    with contextlib.suppress(OSError):  # if memory runs out, this process goes, and not another
        (PROCESS / "oom_score_adj").write_text("1000")

    def reply(record: dict[str, Any]) -> None:
        replies.write(json.dumps(record) + "\n")
        replies.flush()

    try:
        bench = Bench(json.loads(sys.stdin.readline()))
        reply({"loaded_bytes": bench.loaded_bytes})
        for line in sys.stdin:
            reply(_answer(bench, json.loads(line)))
    except FsdfmError as error:
        reply({"error": str(error)})


def _answer(bench: Bench, request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request; a GPU that is too small for it ends nothing but the request."""
    try:
        return bench.answer(request)
    except torch.OutOfMemoryError:
        return {"error": "the GPU has not enough memory"}
    finally:
        if torch.cuda.is_available() and torch.cuda.memory_reserved() > CROWDED_BYTES:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
