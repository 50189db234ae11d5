"""What the published recipe needs: its divergence from a known law, over the updates.

    python benchmarks/published.py --out runs/published

distils the known law's teacher by the recipe of FS-DFM to the letter: RK-4 targets from an average
of decay 0.9995, raw h through freshly made fusers, step weights 1 / h, generalized KL on the
smallest step, batches of 96; drawn with its own step rule on the even grid. Only the learning rate
is the language's own, as 1e-5 after 10,000 updates of warm-up is for far larger networks and runs.

With --recipe step-aware the same curve of ours: log2 h that starts silent, steps of all sizes seen
alike, cross-entropy, the exact rule.

Rows: the teacher on the same grid by both rules; the student before its first update; then its
average and its last weights after some updates. Run the same command again to go on; --only-table
judges what there is. Give other settings another --out.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

from fsdfm.core.errors import FsdfmError
from fsdfm.core.files import write_whole
from fsdfm.recipes.settings import RECIPES as SHIPPED
from fsdfm.study.curve import SAVED_EVERY, Curve, curve_table
from fsdfm.study.recipes import RECIPES
from fsdfm.study.training import known_law


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", choices=("published", "step-aware"), default="published")
    parser.add_argument("--updates", type=int, nargs="+", default=[360, 2000, 5000, 10_000])
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--calls", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher-run", type=Path, help="finished run of the known law's teacher")
    parser.add_argument("--teacher-steps", type=int, default=4000, help="of one trained here")
    parser.add_argument("--only-table", action="store_true", help="of the snapshots so far")
    return parser.parse_args()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse()
    shipped = SHIPPED["published"]
    try:
        steps = None if args.teacher_run else args.teacher_steps
        language = known_law(args.teacher_run or args.out / "markov" / "teacher", steps=steps)
        language.settings = replace(
            language.settings,
            steps=max(args.updates),
            batch_size=shipped.batch_size,
            learning_rate=args.learning_rate,
            warmup_steps=args.warmup_steps,
            ema_decay=shipped.ema_decay,
            ema_warmup=shipped.ema_warmup,
            seed=args.seed,
            checkpoint_every=SAVED_EVERY,
        )
        run = args.out / f"{args.recipe} {args.seed}"
        curve = Curve(language, RECIPES[args.recipe], run, args.updates)
        if not args.only_table:
            curve.train()
        text = curve_table(curve.rows(args.calls, args.samples), args.calls)
    except FsdfmError as error:
        raise SystemExit(str(error)) from None
    write_whole(run / "table.md", text)
    print(text)


if __name__ == "__main__":
    main()
