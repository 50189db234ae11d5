"""Speed and memory of one update of training, beside plain loops.

    python benchmarks/training.py --out runs/training
    python benchmarks/training.py --out runs/training --distill adapted-8x256 \
        --pretrain adapted-8x256 --joint adapted-8x256

A case is HIDDENxBLOCKSxVOCABULARYxBATCHxLENGTH, or SHAPE-BATCHxLENGTH with a shape of `fsdfm bench`
or a model directory. Distillation is the published recipe on all sides:
RK-4 targets, published jumps, step sizes with weights 1 / h, generalized KL at the smallest. The
reference computes every branch for every row, and calls the teacher, as the published loop does.
Pretraining is cross-entropy; so is the training of a joint head, whose body has no gradient: there
the plain side draws times evenly, knows half of the data, and passes every row through the heads,
where ours draws both as `fsdfm distill` does, and passes the rows that count. An update is loss,
backward, clip, AdamW and moving average; "extra memory" is its peak beyond weights, average and
optimizer. See benchmarks/sampling.py for the rest.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fsdfm.bench.figures import Row, report, write_report
from fsdfm.bench.harness import MALLOC, machine, measure_aloud, specs_for, started
from fsdfm.bench.jobs import Job, shape
from fsdfm.bench.sides import sides_for
from fsdfm.core.device import hardware, pick_device, preferred_dtype
from fsdfm.core.errors import FsdfmError
from fsdfm.model.config import ModelConfig

HEAD_WIDTH, COND_SIZE = 64, 128
DISTILL = ["256x6x8192x8x256", "256x6x50257x4x1024"]
PRETRAIN = [
    f"{hidden}x{blocks}x8192x{batch}x{length}"
    for hidden, blocks in ((192, 4), (256, 6), (384, 6), (512, 6), (640, 8))
    for batch, length in ((8, 256), (2, 1024))
]


JOINT = ["adapted-8x256"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--distill", nargs="*", default=DISTILL, metavar="CASE")
    parser.add_argument("--pretrain", nargs="*", default=PRETRAIN, metavar="CASE")
    parser.add_argument("--joint", nargs="*", default=JOINT, metavar="CASE")
    parser.add_argument("--updates", type=int, default=2, help="in one timed run")
    parser.add_argument("--malloc", nargs="+", choices=MALLOC, default=["default"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peak-tflops", type=float)
    parser.add_argument("--patience", type=float, default=3600.0, help="seconds for one run")
    parser.add_argument("--device", default=None)
    return parser.parse_args()


def case(text: str, updates: int) -> tuple[ModelConfig, Job]:
    """Network and job of a case."""
    name, _, job = text.rpartition("-")
    if name:
        batch, length = (int(word) for word in job.split("x"))
        return shape(name), Job(batch, length, updates)
    hidden, blocks, vocab_size, batch, length = (int(word) for word in text.split("x"))
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        blocks=blocks,
        heads=max(1, hidden // HEAD_WIDTH),
        cond_size=COND_SIZE,
        context_length=length,
        step_embedding="log2",
    )
    return config, Job(batch, length, updates)


def main() -> int:
    args = parse()
    device = pick_device(args.device)
    dtype = preferred_dtype(device)
    args.out.mkdir(parents=True, exist_ok=True)
    facts = machine(device, hardware(device))
    rows: list[Row] = []
    asked = {"distill": args.distill, "pretrain": args.pretrain, "joint": args.joint}
    for task, cases in asked.items():
        sides = sides_for(task, dtype)
        for text in cases:
            config, job = case(text, args.updates)
            for malloc in args.malloc:
                specs = specs_for(task, sides, text, config, str(device), dtype, malloc)
                with started(specs, args.patience) as workers:
                    rows += measure_aloud(workers, job, args.repeats, args.peak_tflops)
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
