"""What it gives that texts of several times and lengths share calls: seconds of the processor.

    OMP_NUM_THREADS=1 python benchmarks/sharing.py --texts 12

Texts come two between any two calls, as clients would send them, and are written with a batch size
of 1, where none share, and of 8. Rows are kinds of texts: all of 64 tokens in 8 steps; in 4, 8 or
16 steps; and of 24 to 128 tokens too.
"""

from __future__ import annotations

import argparse
import json
import random
import time

import fsdfm
from fsdfm.generate.generator import Generator
from fsdfm.generate.request import Request
from fsdfm.generate.running import Running

STEPS = (4, 8, 16)


def asked(kind: str, count: int) -> list[Request]:
    """Texts of a kind."""
    draw, found = random.Random(0), []
    for seed in range(count):
        steps = 8 if kind == "alike" else draw.choice(STEPS)
        length = draw.randint(24, 128) if kind == "steps and lengths" else 64
        found.append(Request(length=length, steps=steps, seed=seed, end="never"))
    return found


def written(generator: Generator, requests: list[Request], batch_size: int) -> tuple[float, float]:
    """Seconds of the processor, and texts a call."""
    running, waiting = Running(generator, batch_size=batch_size, fair=True), list(requests)
    began, calls, texts = time.process_time(), 0, 0
    while waiting or len(running):
        for request in waiting[:2]:
            running.admit(request)
        del waiting[:2]
        texts, calls = texts + len(running.step()), calls + 1
    return time.process_time() - began, texts / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--texts", type=int, default=24)
    args = parser.parse_args()
    generator = fsdfm.load(args.model)
    written(generator, asked("alike", 1), 1)
    for kind in ("alike", "steps", "steps and lengths"):
        for batch_size in (1, 8):
            seconds, texts = written(generator, asked(kind, args.texts), batch_size)
            row = {"texts": args.texts, "kind": kind, "batch_size": batch_size}
            row |= {"cpu_seconds": round(seconds, 2), "texts_a_call": round(texts, 2)}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
