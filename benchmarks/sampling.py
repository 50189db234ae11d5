"""Speed and memory of sampling, beside the published sampler and an autoregressive model.

    python benchmarks/sampling.py --out runs/sampling
    python benchmarks/sampling.py --shapes 0.17B --batches 1 --sides reference-bf16 engine \
        --repeats 3 engine=7 --malloc default tuned --out runs/sampling

Every side runs in a process of its own, with weights of one shape and one setting of malloc, in
turn with the others; the figures are medians. The first side of --sides is what speed-ups are over.
OUT/results.json and results.md are written after every job: what is done survives an interruption,
and the next run starts anew. A side that dies has a line on stderr and a row that says so; the
others go on, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fsdfm.bench.figures import Row, report, write_report
from fsdfm.bench.harness import MALLOC, machine, measure_aloud, specs_for, started
from fsdfm.bench.jobs import Job, sampling, shape
from fsdfm.bench.settings import SHAPES
from fsdfm.bench.sides import SIDES, missing, runnable, sides_for, users_dtype
from fsdfm.core.device import hardware, pick_device, preferred_dtype
from fsdfm.core.errors import FsdfmError
from fsdfm.flow.step import STEP_RULES


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["tiny", "0.17B"],
        help=f"{', '.join(SHAPES)}, or model directories, whose weights are not read",
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, nargs="+", default=[8])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rule", choices=STEP_RULES, default="published")
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES["sample"], help="default: those that fit the device"
    )
    parser.add_argument("--malloc", nargs="+", choices=MALLOC, default=["default"])
    parser.add_argument(
        "--repeats", nargs="+", default=["3"], metavar="N | SIDE=N", help="timed runs"
    )
    parser.add_argument(
        "--many", type=int, help="also time the engine at so many steps (1024), at batch 1"
    )
    parser.add_argument("--peak-tflops", type=float, help="of the device: 989 for an H100 in bf16")
    parser.add_argument("--patience", type=float, default=3600.0, help="seconds for one run")
    parser.add_argument("--device", default=None)
    return parser.parse_args()


def repeats_of(words: list[str], sides: list[str]) -> dict[str, int]:
    """Timed runs of each side: "3" is for all of them, "engine=7" for one."""
    found = dict.fromkeys(sides, 3)
    for word in sorted(words, key=lambda word: "=" in word):
        side, _, count = word.rpartition("=")
        if side and side not in sides:
            raise SystemExit(f"error: no side {side!r}: {', '.join(sides)}.")
        found.update(dict.fromkeys([side] if side else sides, int(count)))
    return {side: found[side] for side in sides}


def main() -> int:
    args = parse()
    device = pick_device(args.device)
    if (left_out := missing()) is not None:
        print(left_out, file=sys.stderr)
    sides = runnable(args.sides or sides_for("sample", preferred_dtype(device), device), device)
    repeats = repeats_of(args.repeats, sides)
    args.out.mkdir(parents=True, exist_ok=True)
    facts = machine(device, hardware(device))
    rows: list[Row] = []
    for name in args.shapes:
        for malloc in args.malloc:
            config = shape(name)
            dtype = users_dtype("sample", device, config)
            specs = specs_for("sample", sides, name, config, str(device), dtype, malloc)
            with started(specs, args.patience) as workers:
                for batch in args.batches:
                    for steps in args.steps:
                        job = Job(batch, args.length, steps, args.rule, sampling(name))
                        rows += measure_aloud(workers, job, repeats, args.peak_tflops)
                        write_report(args.out, facts, rows)
                engines = [worker for worker in workers if worker.spec.side == "engine"]
                if args.many and engines:
                    job = Job(1, args.length, args.many, args.rule)
                    rows += measure_aloud(engines, job, {"engine": 1}, args.peak_tflops)
                    write_report(args.out, facts, rows)
    print(report(facts, rows))
    return int(any(row.error is not None for row in rows))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FsdfmError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
