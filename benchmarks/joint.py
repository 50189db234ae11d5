"""Do joint draws have the right law, with any number of calls? Heads compared on a known law.

    python benchmarks/joint.py --out runs/joint

trains joint heads on one teacher of the Markov language (benchmarks/markov.py) and draws with each
at every budget, on the even grid and on late ones. Beside them: true samples (the floor of the
figures), the teacher, and exact conditionals drawn in as many groups (the cost of the groups
themselves). Figures, thousandths of a nat (of 3 tokens), plug-in:

  pooled   divergence of all windows' 3-grams together from the true law, +- 2 standard errors
  windows  the mean over windows of the divergence of each one's own 3-grams; its floor is high,
           as each has a tenth of the samples, but errors of several windows cannot cancel
  worst    the window that is farthest off

Run the same command again to go on; several at once with
other --heads or --seed, once the teacher is there.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import markov
import study
import torch
from torch import Tensor
from torch.nn import functional as F

from fsdfm.flow.grid import Late
from fsdfm.flow.path import UniformSource
from fsdfm.flow.posterior import FlowModel, Grouped, Sequences
from fsdfm.flow.sampler import Drawing, sample
from fsdfm.flow.schedule import Polynomial
from fsdfm.model.student import student_from_teacher
from fsdfm.model.transformer import Transformer
from fsdfm.train.checkpoint import load_average
from fsdfm.train.loop import Run, Task
from fsdfm.train.objective import Joint

GROUPS = 8


@dataclass(frozen=True)
class Head:
    """How a joint head is trained, and how its groups lie in training and sampling."""

    seams: str
    updates: int = 600
    """Of 256 texts."""


HEADS = {
    "fixed seams": Head("fixed"),
    "random seams": Head("random"),
}
TEACHER, EXACT = "teacher", "exact"
"""No heads: the body alone, and the chain's own conditionals, at random seams."""
Row = dict[str, Any]


class ExactConditionals(markov.ExactPosterior):
    """p(x_1[i] given x_t and the tokens drawn so far) of a chain: a FlowModel with a joint head.

    A hidden row is its sequence's state and its time.
    """

    def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """States (B, L), times (B,) -> (B, L, L + 1), float64."""
        rows = torch.cat((x_t.double(), t.double()[:, None]), 1)
        return rows[:, None].expand(-1, x_t.shape[1], -1)

    def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
        """ln p of rows (N, L + 1) at positions (N,), (N, V)."""
        x_t, t = rows[:, :-1].long(), rows[:, -1]
        sequence = at // x.shape[1]
        told, x = known[sequence], x[sequence]
        seen = torch.where(
            told[..., None], F.one_hot(x, self.chain.symbols).double(), self._channel(x_t, t)
        )
        return self.marginals(seen)[torch.arange(len(at)), at % x.shape[1]].log()


def trained(name: str, args: argparse.Namespace, language: study.Chain) -> Transformer:
    """The averaged network of one head, trained now or before."""
    head = HEADS[name]
    directory = args.out / f"{name} {args.seed}"
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    model = student_from_teacher(language.teacher, "none", 3)
    source, schedule = UniformSource(language.chain.symbols), Polynomial()
    settings = replace(
        language.settings,
        steps=round(head.updates * args.training),
        learning_rate=args.learning_rate,
        warmup_steps=50,
        ema_decay=0.99,
        checkpoint_every=100,
    )
    objective = Joint(source, schedule, seams=head.seams)
    cpu, validation = torch.device("cpu"), language.validation()
    task = Task(objective, source, schedule, language.batch, validation, cpu, torch.float32)
    watch, started = study.Watch(name), time.process_time()
    if not Run(directory, settings, task, watch).train(model):
        raise SystemExit(study.STOPPED)
    print(f"{name}: {time.process_time() - started:.0f} s of CPU", flush=True)
    if watch.ema is None:
        load_average(directory / "checkpoint.safetensors", model)
        return model.eval()
    return watch.ema


def drawn(model: FlowModel, seams: str, row: Row, length: int, symbols: int) -> Tensor:
    """Samples of a row's setting, int64, (n, L)."""
    source, noise = UniformSource(symbols), markov.OneStream(row["samples"], 5)
    sampled = Sequences(model)
    drawing = Drawing(posterior=Grouped(sampled, GROUPS, seams))
    grid = Late(row["power"])(row["steps"])
    *_, last = sample(sampled, noise.start(source, length), grid, noise, source, drawing=drawing)
    return last.x


def figures(x: Tensor, chain: markov.Chain) -> Row:
    """Pooled and by window."""
    found, law = markov.figures(x, chain), chain.trigrams.flatten()
    counts = [
        markov.trigram_counts(each, chain.symbols).sum(0) for each in x.unfold(1, 3, 1).unbind(1)
    ]
    windows = [1000.0 * markov.trigram_figures(each, law)[1] for each in counts]
    return {
        "kl": 1000.0 * found["kl"],
        "kl_se": 1000.0 * found["kl_se"],
        "nll": found["nll"],
        "windows": windows,
    }


def text_of(row: Row) -> str:
    """A cell."""
    windows = row["windows"]
    mean = sum(windows) / len(windows)
    return f"{row['kl']:.1f} +- {2 * row['kl_se']:.1f}; {mean:.0f}; {max(windows):.0f}"


def model_of(name: str, args: argparse.Namespace, language: study.Chain) -> FlowModel:
    """What draws the rows of a name."""
    if name == EXACT:
        return ExactConditionals(language.chain)
    return language.teacher.eval() if name == TEACHER else trained(name, args, language)


def rows_of(args: argparse.Namespace, language: study.Chain) -> list[Row]:
    """Every setting of the heads asked for; what results.jsonl holds is kept."""
    path = args.out / "results.jsonl"
    rows = study.read(path)
    for name in args.heads:
        kept: list[FlowModel] = []
        for power in args.powers:
            for steps in args.budgets:
                seed = args.seed if name in HEADS else 0
                facts = {"head": name, "seed": seed, "steps": steps, "power": power}
                facts |= {"samples": args.samples, "training": args.training}
                if any(facts.items() <= row.items() for row in rows):
                    continue
                if not kept:
                    kept.append(model_of(name, args, language))
                seams = HEADS[name].seams if name in HEADS else "random"
                x = drawn(kept[0], seams, facts, language.length, language.chain.symbols)
                rows.append(facts | figures(x, language.chain))
                with path.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(
                    f"{name} {args.seed}, {steps} calls, {power:g}: {text_of(rows[-1])}", flush=True
                )
    return rows


def table(rows: list[Row], budgets: list[int]) -> str:
    """In Markdown: pooled; mean of the windows; worst window."""
    lines = [f"| head | seed | grid | {' | '.join(map(str, budgets))} |"]
    lines.append("|---" * (3 + len(budgets)) + "|")
    found = {(r["head"], r["seed"], r["power"], r["steps"]): r for r in rows}
    for name, seed, power in dict.fromkeys(key[:3] for key in found):
        cells = [found.get((name, seed, power, steps)) for steps in budgets]
        texts = " | ".join("" if row is None else text_of(row) for row in cells)
        lines.append(f"| {name} | {seed} | {power:g} | {texts} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    names = [EXACT, TEACHER, *HEADS]
    parser.add_argument("--heads", nargs="*", choices=names, default=names)
    parser.add_argument("--budgets", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--powers", type=float, nargs="+", default=[1.0, 2.0, 8.0])
    parser.add_argument("--training", type=float, default=1.0, help="times the heads' updates")
    parser.add_argument("--learning-rate", type=float, default=6e-3)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher-run", type=Path, help="run of benchmarks/markov.py")
    parser.add_argument("--teacher-steps", type=int, default=4000, help="of one trained here")
    return parser.parse_args()


def main() -> None:
    args = parse()
    args.language, args.source = "markov", "uniform"
    args.out.mkdir(parents=True, exist_ok=True)
    language = study.Chain(args)
    rows = rows_of(args, language)
    true = figures(language.chain.draw(args.samples, language.length, seed=18), language.chain)
    print(f"As many true samples: {text_of(true)}\n\n{table(rows, args.budgets)}")


if __name__ == "__main__":
    main()
