"""Which recipe makes the best few-step student? One teacher, one protocol, equal compute.

    python benchmarks/study.py --out runs/known
    python benchmarks/study.py --out runs/prose --teacher TEACHER --data DATA --samples 24 \
        --judges smollm2 gemma3 --reference ngram4=NGRAM.jsonl --reference ar=AR.jsonl

Without --teacher the language is a Markov chain whose law is known, with a teacher trained here.
Every recipe gets the same search (learning rate, average, grid) on its own seeds; then the table's
seeds, with the start, the last weights and the average as rows (src/fsdfm/study/protocol.py).
References are texts of plain language models (fsdfm baseline). Run the same command again to go on;
several at once with other --recipes once the teacher is there, and a last time for the tables of
all; give other settings another --out.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from fsdfm.core.errors import FsdfmError
from fsdfm.core.files import write_whole
from fsdfm.study.languages import Language, Prose
from fsdfm.study.protocol import Protocol, Study
from fsdfm.study.recipes import RECIPES
from fsdfm.study.tables import picture, tables
from fsdfm.study.training import known_law

USUAL = Protocol()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--teacher", type=Path, help="model directory (prose)")
    parser.add_argument("--data", type=Path, help="prepared data (prose)")
    parser.add_argument("--judges", nargs="+", default=["smollm2", "gemma3"])
    parser.add_argument("--reference", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--teacher-run", type=Path, help="finished run of the known law's teacher")
    parser.add_argument("--teacher-steps", type=int, default=4000, help="of one trained here")
    parser.add_argument("--source", choices=("uniform", "mask"), default="uniform")
    parser.add_argument("--budget", type=float, default=USUAL.budget)
    parser.add_argument("--search-budget", type=float, default=USUAL.search_budget)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(USUAL.seeds))
    parser.add_argument("--calls", type=int, nargs="+", default=list(USUAL.calls))
    parser.add_argument("--many", type=int, default=USUAL.many)
    parser.add_argument("--samples", type=int, default=USUAL.samples)
    parser.add_argument("--search-samples", type=int, default=USUAL.search_samples)
    args = parser.parse_args()
    if args.teacher is not None and args.data is None:
        parser.error("--teacher needs --data.")
    return args


def language_of(args: argparse.Namespace) -> Language:
    """The known law, or prose where a teacher is given."""
    if args.teacher is None:
        run = args.teacher_run or args.out / "teacher"
        steps = None if args.teacher_run else args.teacher_steps
        return known_law(run, args.source, steps)
    references = {name: Path(file) for name, _, file in (r.partition("=") for r in args.reference)}
    return Prose(args.teacher, args.data, args.judges, references)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse()
    protocol = Protocol(
        budget=args.budget,
        search_budget=args.search_budget,
        seeds=args.seeds,
        calls=args.calls,
        many=args.many,
        samples=args.samples,
        search_samples=args.search_samples,
    )
    try:
        study = Study(args.out, language_of(args), protocol)
        for name in args.recipes:
            study.students(name)
        study.teacher(sorted({1.0, *(float(row["power"]) for row in study.rows)}))
    except FsdfmError as error:
        raise SystemExit(str(error)) from None
    text = tables(study)
    write_whole(args.out / "tables.md", text)
    picture(study, args.out / "figure.png")
    print(text)


if __name__ == "__main__":
    main()
