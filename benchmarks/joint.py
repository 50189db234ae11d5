"""Do joint draws have the right law, with any number of calls? Heads compared on a known law.

    python benchmarks/joint.py --out runs/joint

trains joint heads on one teacher of the known law and draws with each at every budget, on the even
grid and on late ones. Beside them: true samples (the floor of the figures), the teacher, and exact
conditionals drawn in as many groups (the cost of the groups themselves). Run the same command again
to go on; several at once with other --heads or --seed, once the teacher is there; give other
settings another --out.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from dataclasses import replace
from pathlib import Path

import torch

from fsdfm.core.errors import FsdfmError
from fsdfm.core.files import write_whole
from fsdfm.flow.path import SOURCES
from fsdfm.flow.schedule import Polynomial
from fsdfm.model.student import student_from_teacher
from fsdfm.study.chain import ExactConditionals
from fsdfm.study.languages import KnownLaw
from fsdfm.study.limits import (
    Drawer,
    drawer,
    kept_marginals,
    limits,
    limits_table,
    marginals_table,
)
from fsdfm.study.training import Watch, known_law, task_of, trained, weights_sha256
from fsdfm.train.checkpoint import load_average
from fsdfm.train.objective import Joint

GROUPS = 8
HEADS = {"fixed seams": "fixed", "random seams": "random"}
"""Of groups, in training and in sampling."""
TEACHER, EXACT = "teacher", "exact conditionals"


def head(name: str, args: argparse.Namespace, language: KnownLaw) -> Drawer:
    """Draws with one joint head, trained now or before."""
    seams, run = HEADS[name], args.out / f"{name} {args.seed}"
    torch.manual_seed(args.seed)
    model = student_from_teacher(language.teacher, "none", 3)
    settings = replace(
        language.settings,
        steps=args.updates,
        learning_rate=args.learning_rate,
        warmup_steps=50,
        ema_decay=0.99,
        seed=args.seed,
        checkpoint_every=100,
    )
    objective = Joint(language.source, Polynomial(), seams=seams)
    task = task_of(objective, language.source, language, args.seed)
    facts = {"seams": seams, "teacher": weights_sha256(language.teacher)}
    trained(run, settings, task, Watch(name, run, model), facts)
    load_average(run / "checkpoint.safetensors", model)
    return drawer(language, model.eval(), GROUPS, seams)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    names = [EXACT, TEACHER, *HEADS]
    parser.add_argument("--heads", nargs="*", choices=names, default=names)
    parser.add_argument("--calls", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--powers", type=float, nargs="+", default=[1.0, 2.0, 8.0])
    parser.add_argument(
        "--source", choices=SOURCES, default="uniform", help="where the path starts"
    )
    parser.add_argument("--updates", type=int, default=600, help="of a head, of 256 texts")
    parser.add_argument("--learning-rate", type=float, default=6e-3)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher-run", type=Path, help="finished run of the teacher")
    parser.add_argument("--teacher-steps", type=int, default=4000, help="of one trained here")
    return parser.parse_args()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse()
    try:
        steps = None if args.teacher_run else args.teacher_steps
        language = known_law(args.teacher_run or args.out / "teacher", args.source, steps)
        exact = ExactConditionals(language.chain, language.source)
        drawers = {
            EXACT: lambda: drawer(language, exact, GROUPS),
            TEACHER: lambda: drawer(language, language.teacher),
        }
        for name in HEADS:
            drawers[name] = lambda name=name: head(name, args, language)  # type: ignore[misc]
        # A head's rows are those of its seed.
        chosen = {f"{n} {args.seed}" if n in HEADS else n: drawers[n] for n in args.heads}
        settings = list(itertools.product(args.calls, args.powers))
        rows = limits(args.out, language, chosen, settings, args.samples)
        kept = kept_marginals(language, {n: make() for n, make in chosen.items()}, args.samples)
    except FsdfmError as error:
        raise SystemExit(str(error)) from None
    text = limits_table(rows, language) + "\n" + marginals_table(kept)
    write_whole(args.out / "table.md", text)
    print(text)


if __name__ == "__main__":
    main()
