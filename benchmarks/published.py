"""What the published recipe needs: its divergence from a known law, over the updates.

    python benchmarks/published.py --out runs/published

distils the Markov language's teacher (benchmarks/markov.py) by the recipe of FS-DFM: RK-4 targets
from an average of decay 0.9995, raw h through freshly made fusers, step weights 1 / h, generalized
KL on the smallest step, batches of 96; drawn with its own step rule on the even grid. Only the
learning rate is the language's own, as 1e-5 after 10,000 updates of warm-up is for far larger
networks and runs (--learning-rate, --warmup-steps).

Rows: the teacher; the student before its first update; then its average and its last weights after
some numbers of updates. Figures: divergence of the samples' pooled 3-grams from the true law,
thousandths of a nat, +- 2 standard errors.

Run the same command again to go on; give other settings another --out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import study
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fsdfm.core.files import write_whole
from fsdfm.flow.loss import generalized_kl
from fsdfm.flow.path import UniformSource
from fsdfm.flow.schedule import Polynomial
from fsdfm.flow.step import PUBLISHED
from fsdfm.flow.target import rk4_target
from fsdfm.model.student import student_from_teacher
from fsdfm.model.transformer import Transformer
from fsdfm.recipes.settings import RECIPES
from fsdfm.train.loop import Run, Task
from fsdfm.train.objective import Distill, published_weights
from fsdfm.train.settings import TrainSettings

SAVED_EVERY = 40
"""Updates between two checkpoints; snapshots lie on its multiples."""
PAPER = study.Recipe(sampler="published", power=1.0)
"""How all rows are drawn."""


class Snapshots(study.Watch):
    """Keeps the average and the last weights after some updates.

    Args:
        directory: where to.
        model: the network in training.
        wanted: after how many updates.
    """

    def __init__(self, directory: Path, model: Transformer, wanted: list[int]) -> None:
        super().__init__("published")
        self.directory, self.model, self.wanted = directory, model, wanted

    def advanced(self, step: int, steps: int, loss: float | None) -> None:
        """See `Watcher`; the average was seen just before: each snapshot is a checkpoint."""
        super().advanced(step, steps, loss)
        if step in self.wanted and self.ema is not None:
            for name, network in (("average", self.ema), ("last weights", self.model)):
                tensors = {k: v.detach().contiguous() for k, v in network.state_dict().items()}
                save_file(tensors, self.directory / f"{step} {name}.safetensors")


def settings_of(args: argparse.Namespace) -> TrainSettings:
    """The recipe's numbers, for as long as the last snapshot needs."""
    recipe = RECIPES["published"]
    return TrainSettings(
        steps=max(args.updates),
        batch_size=recipe.batch_size,
        learning_rate=args.learning_rate,
        warmup_steps=args.warmup_steps,
        ema_decay=recipe.ema_decay,
        ema_warmup=recipe.ema_warmup,
        seed=args.seed,
        evaluate_every=1_000_000,
        checkpoint_every=SAVED_EVERY,
    )


def student_of(teacher: Transformer, seed: int) -> Transformer:
    """Before its first update."""
    torch.manual_seed(seed)
    return student_from_teacher(teacher, "raw")


def train(args: argparse.Namespace, language: study.Chain, directory: Path) -> None:
    """Leaves a file for every snapshot."""
    settings, source = settings_of(args), UniformSource(language.chain.symbols)
    model = student_of(language.teacher, args.seed)
    objective = Distill(
        source, Polynomial(), rk4_target, PUBLISHED, published_weights(), generalized_kl
    )

    def batch(index: int) -> Tensor:
        seed = 1_000_003 * (args.seed + 1) + index
        return language.chain.draw(settings.batch_size, language.length, seed)

    cpu = torch.device("cpu")
    task = Task(objective, source, Polynomial(), batch, language.validation(), cpu, torch.float32)
    watch = Snapshots(directory, model, args.updates)
    if not Run(directory, settings, task, watch).train(model):
        raise SystemExit(study.STOPPED)


def judged(model: Transformer, args: argparse.Namespace, language: study.Chain) -> list[str]:
    """A cell for every budget."""
    cells = []
    for steps in args.budgets:
        x = study.drawn(language, model, steps, 1.0, PAPER, 0, args.samples)
        cells.append(study.thousandths(language.judge(x)).text)
    return cells


def rows_of(args: argparse.Namespace, language: study.Chain, directory: Path) -> dict[str, Any]:
    """Cells by row, of what there is; those in rows.json are kept."""
    path = directory / "rows.json"
    rows: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def row(name: str, model: Transformer) -> None:
        if name not in rows:
            rows[name] = judged(model, args, language)
            write_whole(path, json.dumps(rows, indent=1) + "\n")

    row("teacher", language.teacher)
    row("update 0", student_of(language.teacher, args.seed))
    for step in args.updates:
        for kind in ("average", "last weights"):
            file = directory / f"{step} {kind}.safetensors"
            if file.exists():
                model = student_of(language.teacher, args.seed)
                model.load_state_dict(load_file(file))
                row(f"{step:,} updates, {kind}", model)
    return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--updates", type=int, nargs="+", default=[360, 2000, 5000, 10_000])
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--budgets", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher-run", type=Path, help="run of benchmarks/markov.py")
    parser.add_argument("--teacher-steps", type=int, default=4000, help="of one trained here")
    parser.add_argument("--only-table", action="store_true", help="of the snapshots so far")
    args = parser.parse_args()
    if any(step % SAVED_EVERY for step in args.updates):
        parser.error(f"--updates are multiples of {SAVED_EVERY}.")
    return args


def main() -> None:
    args = parse()
    args.language, args.source = "markov", "uniform"
    language = study.Chain(args)
    directory = args.out / f"published {args.seed}"
    directory.mkdir(parents=True, exist_ok=True)
    if not args.only_table:
        train(args, language, directory)
    rows = rows_of(args, language, directory)
    lines = [f"| | {' | '.join(map(str, args.budgets))} |", "|---" * (1 + len(args.budgets)) + "|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    write_whole(directory / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
