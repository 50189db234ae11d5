"""Processes of a training are killed at random moments; does the run end with the same weights?

    python benchmarks/kills.py --kills 20

Trains a small network with torchrun twice: undisturbed, and with a SIGKILL to a process at random,
so many times. The run is cut into as many equal parts as there are kills: each falls a random
moment after the metrics have reached a random update of its part; a quarter of the kills fall
before, while the processes start. Then the same command goes on. Prints where each kill fell, and
compares every tensor of the two checkpoints and the exported models. Ends with code 1 if any bit
differs or if fewer kills fell. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from fsdfm.text.packing import prepare
from fsdfm.text.settings import PrepareSettings

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "red", "bird"]


def made(place: Path) -> Path:
    """Some text, prepared."""
    draw = random.Random(0)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=60))}) for _ in range(200)]
    (place / "text.jsonl").write_text("\n".join(lines) + "\n")
    settings = PrepareSettings(vocab_size=280, validation_fraction=0.1)
    prepare([place / "text.jsonl"], place / "data", settings=settings)
    return place / "data"


def start(data: Path, out: Path, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    """The run, from where it is."""
    flags = {
        "--data": data,
        "--out": out,
        "--steps": args.steps,
        "--batch-size": 2 * args.processes,
        "--context-length": 16,
        "--preset": "tiny",
        "--device": "cpu",
        "--checkpoint-every": 7,
        "--log-every": 3,
        "--evaluate-every": 50,
        "--validation-sequences": 4,
        "--sharding": args.sharding,
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = [*torchrun, "--nproc-per-node", args.processes, "-m", "fsdfm", "pretrain"]
    words += [word for pair in flags.items() for word in pair]
    said = (out.parent / f"{out.name}.log").open("ab")
    return subprocess.Popen([*map(str, words)], stdout=said, stderr=said)


def workers(run: subprocess.Popen[bytes]) -> list[int]:
    """The processes that torchrun started."""
    try:
        return [
            int(x) for x in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        ]
    except OSError:
        return []


def updates(out: Path) -> int:
    """How far the metrics are."""
    try:
        return int(json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    except (OSError, ValueError, LookupError):
        return 0


def changed(out: Path) -> int:
    """When the metrics were last written, 0 if never."""
    try:
        return (out / "metrics.jsonl").stat().st_mtime_ns
    except OSError:
        return 0


def disturbed(data: Path, out: Path, args: argparse.Namespace) -> int:
    """Run to the end through all kills; gives how many fell."""
    draw, fallen = random.Random(args.seed), 0
    while True:
        run = start(data, out, args)
        before, early = changed(out), draw.random() < 0.25
        reached = int(args.steps * (fallen + draw.random()) / max(1, args.kills))

        def there(before: int = before, reached: int = reached) -> bool:
            """The run has written what is new, and is far enough."""
            return changed(out) != before and updates(out) >= reached

        while (
            fallen < args.kills
            and run.poll() is None
            and not (len(workers(run)) == args.processes and (early or there()))
        ):
            time.sleep(0.02)
        if fallen < args.kills:
            moment, place = draw.uniform(0.0, args.within), draw.randrange(args.processes)
            try:
                run.wait(timeout=moment)
            except subprocess.TimeoutExpired:
                os.kill(workers(run)[place], signal.SIGKILL)
                fallen += 1
                when = "a start" if early else f"update {reached}"
                print(f"kill {fallen}: process {place}, {moment:.2f} s after {when}, ", end="")
                print(f"at update {updates(out)} or soon after", flush=True)
        if run.wait() == 0:
            return fallen


def same(one: Path, two: Path) -> bool:
    """Whether all tensors are."""
    a, b = load_file(one), load_file(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--sharding", default="none", help="none or fsdp")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--within", type=float, default=0.5, help="seconds at most")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        data = made(place)
        if start(data, place / "whole", args).wait():
            sys.exit((place / "whole.log").read_text())
        fallen = disturbed(data, place / "killed", args)
        names = ("checkpoint.safetensors", "model.safetensors")
        equal = all(same(place / "whole" / name, place / "killed" / name) for name in names)
        print(f"{fallen} kills; weights, averages and moments equal: {equal}")
        sys.exit(not equal or fallen < args.kills)


if __name__ == "__main__":
    main()
