"""What is possible at few calls, on a language whose law is known?

    python benchmarks/markov.py --out runs/markov

Rows: the exact posterior, which a perfect network would be, drawn position by position; the best
that a student trained for consistency with it could do (perfect student); its exact conditionals
in 8 groups a call, which cost what joint draws cost with a perfect head; and the trained teacher.
Students are in benchmarks/study.py, joint heads in benchmarks/joint.py. Run the same command again
to go on; give other settings another --out.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from pathlib import Path

from torch import Tensor

from fsdfm.core.errors import FsdfmError
from fsdfm.core.files import write_whole
from fsdfm.study.chain import ExactConditionals, ExactPosterior, path_gap, perfect_student
from fsdfm.study.languages import KnownLaw
from fsdfm.study.limits import Drawer, drawer, limits, limits_table
from fsdfm.study.training import known_law


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--calls", type=int, nargs="+", default=[1, 2, 4, 8, 64, 1024])
    parser.add_argument("--powers", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--teacher-run", type=Path, help="finished run of the teacher")
    parser.add_argument("--teacher-steps", type=int, default=4000, help="of one trained here")
    return parser.parse_args()


def perfect(language: KnownLaw) -> Drawer:
    """Many small steps for every position: affordable at up to 8 calls."""

    def draw(grid: Tensor, samples: int, start: Tensor | None = None) -> Tensor:
        return perfect_student(language.chain, grid, samples, language.length, seed=0)

    return draw


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse()
    try:
        steps = None if args.teacher_run else args.teacher_steps
        language = known_law(args.teacher_run or args.out / "teacher", steps=steps)
    except FsdfmError as error:
        raise SystemExit(str(error)) from None
    chain = language.chain
    gap = path_gap(language.teacher, chain, language.length, seed=5)
    print(f"Entropy of the chain: {chain.entropy(language.length):.4f} nats a token.")
    print(f"KL(exact posterior || teacher) on the path: {gap:.4f} nats a position.")
    drawers = {
        "exact posterior, each alone": lambda: drawer(language, ExactPosterior(chain)),
        "exact conditionals, 8 groups": lambda: drawer(language, ExactConditionals(chain), 8),
        "teacher, each alone": lambda: drawer(language, language.teacher),
    }
    settings = list(itertools.product(args.calls, args.powers))
    rows = limits(args.out, language, drawers, settings, args.samples)
    few = [each for each in settings if each[0] <= 8]
    best = {"perfect student": lambda: perfect(language)}
    rows += limits(args.out, language, best, few, args.samples // 2)
    text = limits_table(rows, language)
    write_whole(args.out / "table.md", text)
    print(text)


if __name__ == "__main__":
    main()
