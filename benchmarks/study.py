"""Which recipe distils the best student? One teacher, many students, equal compute.

    python benchmarks/study.py --out runs/study --teacher TEACHER --data DATA
    python benchmarks/study.py --out runs/study --language markov
    python benchmarks/study.py --out runs/study --language markov --source mask

trains every recipe of RECIPES (or those named by --recipes) from one teacher, with the project's
own objectives and loop, judges its samples at few steps, and writes a table and a picture:

  prose   perplexity by the offline judge over that of the teacher's 1,024 steps, at the teacher's
          entropy (of each text's own token histogram)
  markov  the chain of benchmarks/markov.py, whose law is known: the divergence of the samples'
          3-grams from it, at temperature 1

Equal compute: a forward pass of one sequence is 1, its backward pass 2; every recipe makes as many
updates as --budget allows (1 of it is one batch forward).

At matched entropy: ln perplexity is linear in the entropy between the two temperatures; beyond
them the line is drawn on, and the cell is marked with *. Intervals: 95 %, from the errors of both
perplexities over samples; that of the interpolation is not in them.

Models and samples that exist are kept: run the same command again to go on, and several at once
with other --recipes or --seed (on the Markov language once the teacher is there). --samples and
--first-sample draw another set of samples, with a table of its own. Another --budget, --teacher or
changed recipe needs another --out.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import markov
import numpy as np
import torch
from torch import Tensor

from fsdfm.core.device import pick_device, preferred_dtype
from fsdfm.core.files import write_whole
from fsdfm.eval.judge import load_judge
from fsdfm.eval.metrics import histogram_entropy_nats
from fsdfm.flow.grid import Late
from fsdfm.flow.loss import POSITION_LOSSES, cross_entropy, kl
from fsdfm.flow.path import SOURCES, make_source
from fsdfm.flow.posterior import Grouped, Sampled, Sequences
from fsdfm.flow.sampler import Drawing, Noise, sample
from fsdfm.flow.schedule import Polynomial
from fsdfm.flow.step import STEP_RULES
from fsdfm.flow.target import TARGETS
from fsdfm.model.config import ModelConfig
from fsdfm.model.engine import Engine
from fsdfm.model.io.pretrained import load_pretrained
from fsdfm.model.student import student_from_teacher
from fsdfm.model.transformer import Transformer
from fsdfm.text.store import TokenStore
from fsdfm.text.tokenizer import Tokenizer
from fsdfm.train.checkpoint import load_average
from fsdfm.train.loop import Run, Task
from fsdfm.train.objective import (
    Distill,
    Joint,
    Objective,
    Pretrain,
    even_weights,
    published_weights,
)
from fsdfm.train.settings import TrainSettings

TARGET_EVALUATIONS = {"rk4": 4, "rk2": 2, "semigroup": 2}
JOINT_HEAD_COST = 0.6
"""Of an update of the joint head and the output layer, the body fixed, in whole updates (at the
bundled shape: 5,800 against 10,100 tokens/s)."""
STOPPED = "Stopped: run the same command again to go on."
MANY = 1024
"""Steps of the teacher that students are compared with."""


def reverse_kl(target: Tensor, logits: Tensor) -> Tensor:
    """KL(softmax(logits) || target), nats, (N,)."""
    log_p = logits.log_softmax(-1)
    return (log_p.exp() * (log_p - target.clamp_min(1e-30).log())).sum(-1)


def jensen_shannon(target: Tensor, logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence, nats, (N,)."""
    p = logits.softmax(-1)
    middle = ((p + target) / 2).clamp_min(1e-30).log()
    ours = (p * (p.clamp_min(1e-30).log() - middle)).sum(-1)
    return (ours + (target * (target.clamp_min(1e-30).log() - middle)).sum(-1)) / 2


def total_variation(target: Tensor, logits: Tensor) -> Tensor:
    """Half of the summed differences, (N,)."""
    return (logits.softmax(-1) - target).abs().sum(-1) / 2


DIVERGENCES = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "total_variation": total_variation,
}


@dataclass(frozen=True)
class Recipe:
    """One way to make a student."""

    target: str = "rk4"
    rule: str = "published"
    """Of the jumps inside the target."""
    share: float = 0.25
    """Of rows at the smallest step: path loss. The others are even, or 1/h where share is 0."""
    embedding: str = "log2"
    divergence: str = "kl"
    path_loss: str = "cross_entropy"
    ema: float = 0.998
    learning_rate: float = 1.0
    """Times the language's own."""
    scratch: bool = False
    """Fresh weights instead of the teacher's."""
    neighbours: int = 0
    """R of a joint head, trained by its own path loss; 0: none."""
    draws: int = 1
    """Groups in which the sampler draws the movers of a call."""
    sampler: str = "exact"
    power: float = 2.0
    """Of the grid that the samples are drawn on; 1 is even."""

    def weights(self) -> Tensor:
        """Chance of h = 1, 1/2, ..., 1/1024."""
        return even_weights(self.share) if self.share else published_weights()

    def updates(self, budget: int) -> int:
        """As many as `budget` batches forward pay for."""
        small = float(self.weights()[-1])
        cost = 3.0 + (1.0 - small) * TARGET_EVALUATIONS[self.target]
        return round(budget / (cost * (JOINT_HEAD_COST if self.neighbours else 1.0)))


JOINT = Recipe(
    share=1.0, learning_rate=6.0, embedding="none", neighbours=3, draws=8, ema=0.99, power=8.0
)
"""Positions drawn together see each other. Its sampling is varied below, with the same weights."""

RECIPES = {
    # The faithful run of the published recipe; its sampler too.
    "published": Recipe(
        share=0.0,
        embedding="raw",
        path_loss="generalized_kl",
        ema=0.9995,
        sampler="published",
        power=1.0,
    ),
    "published, cross-entropy": Recipe(share=0.0, embedding="raw", sampler="published", power=1.0),
    "rk4": Recipe(),
    # One factor at a time.
    "target rk2": Recipe("rk2"),
    "target semigroup": Recipe("semigroup", "exact"),
    "jumps exact": Recipe(rule="exact"),
    "embedding raw": Recipe(embedding="raw"),
    "weights 1/h": Recipe(share=0.0),
    "share .5": Recipe(share=0.5),
    "share .75": Recipe(share=0.75),
    "ema .99": Recipe(ema=0.99),
    "ema .9995": Recipe(ema=0.9995),
    "reverse kl": Recipe(divergence="reverse_kl"),
    "jensen-shannon": Recipe(divergence="jensen_shannon"),
    "total variation": Recipe(divergence="total_variation"),
    "scratch": Recipe(scratch=True),
    "rate x 3": Recipe(learning_rate=3.0),
    # Without distillation.
    "path only": Recipe(share=1.0, embedding="none", learning_rate=3.0),
    # Positions drawn together see each other.
    "joint head": JOINT,
    "joint head, 32 draws": replace(JOINT, draws=32),
    "joint head, late grid": replace(JOINT, power=2.0),
    "joint head, even grid": replace(JOINT, power=1.0),
    "joint head, power 4": replace(JOINT, power=4.0),
    "joint head, power 16": replace(JOINT, power=16.0),
    "joint head, drawn alone": replace(JOINT, draws=1),
    "joint head, reach 1": replace(JOINT, neighbours=1),
    "joint head, reach 6": replace(JOINT, neighbours=6),
    "share .5, rate x 3": Recipe(share=0.5, learning_rate=3.0),
    "semigroup, share .5, rate x 3": Recipe("semigroup", "exact", share=0.5, learning_rate=3.0),
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """A figure, its interval, and how the table says it."""

    middle: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Summary:
    """What the table and the picture show."""

    title: str
    axis: str
    goal: float
    """Of the teacher's many steps."""
    cells: dict[tuple[str, int, int], Cell]
    """By student, seed and steps."""

    def table(self, budgets: list[int]) -> str:
        """In Markdown."""
        lines = [
            self.title,
            "",
            f"| student | seed | {' | '.join(f'{n} steps' for n in budgets)} |",
            "|---|---" + "|---" * len(budgets) + "|",
        ]
        for name, seed in dict.fromkeys((name, seed) for name, seed, _ in self.cells):
            found = [self.cells.get((name, seed, steps)) for steps in budgets]
            cells = " | ".join("" if cell is None else cell.text for cell in found)
            lines.append(f"| {name} | {seed} | {cells} |")
        return "\n".join(lines)

    def picture(self, path: Path) -> None:
        """A line a student: those of SHOWN in colour with intervals, the others in grey."""
        from matplotlib.figure import Figure
        from matplotlib.ticker import StrMethodFormatter

        figure = Figure(figsize=(7.5, 4.6), dpi=130, layout="constrained")
        axes = figure.add_subplot()
        labels = set()
        for name, seed in dict.fromkeys((name, seed) for name, seed, _ in self.cells):
            line = [(n, c) for (a, b, n), c in self.cells.items() if (a, b) == (name, seed)]
            line.sort(key=lambda point: point[0])
            steps, cells = zip(*line, strict=True)
            middles = [cell.middle for cell in cells]
            if name not in SHOWN:
                label = None if "others" in labels else "other recipes"
                axes.plot(steps, middles, color="0.75", linewidth=0.8, zorder=1, label=label)
                labels.add("others")
                continue
            below = [cell.middle - cell.low for cell in cells]
            above = [cell.high - cell.middle for cell in cells]
            colour = f"C{list(SHOWN).index(name)}"
            label = None if name in labels else SHOWN[name]
            axes.errorbar(
                steps, middles, (below, above), marker="o", capsize=3, color=colour, label=label
            )
            labels.add(name)
        axes.axhline(self.goal, color="black", linestyle=":", label=f"the teacher in {MANY} calls")
        budgets = sorted({steps for _, _, steps in self.cells})
        axes.set_xscale("log", base=2)
        axes.set_xticks(budgets, [str(n) for n in budgets])
        axes.set_yscale("log")
        plain = StrMethodFormatter("{x:g}")
        axes.yaxis.set_major_formatter(plain)
        if axes.get_ylim()[1] < 10.0 * axes.get_ylim()[0]:
            axes.yaxis.set_minor_formatter(plain)
        axes.set_xlabel("model calls (NFE)")
        axes.set_ylabel(self.axis)
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
        axes.legend(fontsize=8)
        figure.savefig(path, metadata={"Software": None})


SHOWN = {
    "published": "the published recipe",
    "rk4": "RK-4, log2 h, even weights",
    "joint head": "joint head",
    "teacher": "the teacher",
}
"""Students that the picture names."""


class Language(Protocol):
    """Where text, teacher and truth come from."""

    teacher: Transformer
    settings: TrainSettings
    length: int
    samples: int
    """Of a row, unless --samples says otherwise."""

    def batch(self, index: int) -> Tensor:
        """Text, int64, (batch, length)."""
        ...

    def validation(self) -> Tensor:
        """Other text."""
        ...

    temperatures: list[float]
    """The same."""

    def judge(self, x: Tensor) -> Row:
        """Nats a token and entropy of some samples; all that the table needs."""
        ...

    def summary(self, rows: list[Row]) -> Summary | None:
        """Of all students, at few steps; None while what they are compared with is missing."""
        ...


class Prose:
    """Packed text, and an offline language model as the judge."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.store, found = TokenStore.open(args.data), load_pretrained(args.teacher)
        self.teacher, self.length = found.model, 256
        self.tokenizer = Tokenizer.from_json(found.tokenizer_json)
        self.sample_length, self.judge_name = 1024, args.judge
        self.samples, self.temperatures = 8, [0.9, 1.1]
        self.settings = TrainSettings(
            steps=1,
            batch_size=16,
            learning_rate=3e-4,
            warmup_steps=30,
            ema_warmup=False,
            seed=args.seed,
            evaluate_every=1000,
            checkpoint_every=100,
        )
        self._judge: Any = None

    def batch(self, index: int) -> Tensor:
        size, seed = self.settings.batch_size, self.settings.seed
        return self.store.train.batch(index, batch_size=size, length=self.length, seed=seed)

    def validation(self) -> Tensor:
        return torch.stack([self.store.validation.block(i, self.length) for i in range(16)])

    def judge(self, x: Tensor) -> Row:
        """See `Language`."""
        if self._judge is None:
            cpu = torch.device("cpu")
            self._judge = load_judge(self.judge_name, device=cpu, dtype=preferred_dtype(cpu))
        texts = [self.tokenizer.decode(row.tolist()) for row in x]
        scores = [judged.score for judged in self._judge.judge(texts)]
        entropy = float(np.mean([histogram_entropy_nats(row.tolist()) for row in x]))
        nats, tokens = [s.nats for s in scores], [s.tokens for s in scores]
        se = standard_error(nats, tokens)
        return {"nats": sum(nats) / sum(tokens), "nats_se": se, "entropy": entropy}

    def summary(self, rows: list[Row]) -> Summary | None:
        """See `Language`: ratios to the teacher's many steps at its entropy."""
        return ratios(rows)


class Chain:
    """The Markov language of benchmarks/markov.py, whose true likelihood is known."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.chain = markov.Chain.random(4, 0.3, 0.1, 0)
        self.length = self.sample_length = 12
        self.samples, self.temperatures = 4096, [1.0]
        config = ModelConfig(4, 64, 2, 4, 64, context_length=self.length, source=args.source)
        torch.manual_seed(0)
        self.teacher = Transformer(config)
        self.settings = TrainSettings(
            steps=1,
            batch_size=256,
            learning_rate=1e-3,
            ema_warmup=False,
            seed=args.seed,
            evaluate_every=100_000,
            checkpoint_every=500,
        )
        run = args.teacher_run or args.out / place_of(args) / "teacher"
        if args.teacher_run is None:
            self._pretrain(run, args.teacher_steps)
        load_average(run / "checkpoint.safetensors", self.teacher)

    def _pretrain(self, run: Path, steps: int) -> None:
        """As benchmarks/markov.py does."""
        run.mkdir(parents=True, exist_ok=True)
        config, schedule, cpu = self.teacher.config, Polynomial(), torch.device("cpu")
        source = make_source(config.source, config.vocab_size)
        objective = Pretrain(source, schedule, cross_entropy)
        first = partial(self._batch, seed=0)  # one teacher, whichever --seed comes first
        task = Task(objective, source, schedule, first, self.validation(), cpu, torch.float32)
        settings = replace(self.settings, steps=steps, learning_rate=2e-3, ema_decay=0.999, seed=0)
        if not Run(run, settings, task, Watch("teacher")).train(self.teacher):
            raise SystemExit(STOPPED)

    def batch(self, index: int) -> Tensor:
        return self._batch(index, self.settings.seed)

    def _batch(self, index: int, seed: int) -> Tensor:
        seed = 1_000_003 * (seed + 1) + index
        return self.chain.draw(self.settings.batch_size, self.length, seed)

    def validation(self) -> Tensor:
        return self.chain.draw(128, self.length, seed=17)

    def judge(self, x: Tensor) -> Row:
        """See `Language`."""
        found = markov.figures(x, self.chain)
        return {"nats": found.pop("nll"), "nats_se": found.pop("nll_se"), **found}

    def summary(self, rows: list[Row]) -> Summary | None:
        """See `Language`: divergence from the true law, which needs no matched entropy."""
        goals = [r for r in rows if r["model"] == "teacher" and r["steps"] == MANY]
        if not goals:
            return None
        goal = thousandths(goals[0])
        floor = thousandths(self.judge(self.chain.draw(goals[0]["samples"], self.length, seed=18)))
        cells = {
            (r["model"], r["seed"], r["steps"]): thousandths(r)
            for r in rows
            if r["temperature"] == 1.0 and r["steps"] != MANY
        }
        return Summary(
            "Divergence of the 3-grams from the true law, in thousandths of a nat (for 3 tokens), "
            f"+- 2 standard errors. Teacher at {MANY} steps: {goal.text}; as many true samples: "
            f"{floor.text}.",
            "KL of 3-grams from the truth, thousandths of a nat",
            goal.middle,
            cells,
        )


def thousandths(row: Row) -> Cell:
    """The divergence of a row."""
    kl, error = 1000.0 * row["kl"], 2000.0 * row["kl_se"]
    return Cell(kl, max(kl - error, 0.01), kl + error, f"{kl:.1f} +- {error:.1f}")


def place_of(args: argparse.Namespace) -> str:
    """Where results of a language and source lie, below --out."""
    return args.language if args.source == "uniform" else f"{args.language}, {args.source}"


LANGUAGES: dict[str, Callable[[argparse.Namespace], Prose | Chain]] = {
    "prose": Prose,
    "markov": Chain,
}


def drawn(
    language: Prose | Chain,
    model: Transformer,
    steps: int,
    temperature: float,
    recipe: Recipe,
    first: int,
    count: int,
) -> Tensor:
    """Samples of one model in one setting, int64, (count, L): the same noise for all models."""
    source = make_source(model.config.source, model.config.vocab_size)
    noises: list[Noise]
    sampled: Sampled
    if isinstance(language, Prose):
        noises = [Noise([1_000_000 + first + i]) for i in range(count)]
        sampled = Engine(model.eval(), preferred_dtype(torch.device("cpu")))
    else:
        noises = [markov.OneStream(count, first)]
        sampled = Sequences(model.eval())
    posterior = Grouped(sampled, recipe.draws)
    drawing = Drawing(STEP_RULES[recipe.sampler], posterior=posterior, temperature=temperature)
    grid = Late(recipe.power)(steps)
    rows = []
    for noise in noises:
        x_0 = noise.start(source, language.sample_length)
        *_, last = sample(sampled, x_0, grid, noise, source, drawing=drawing)
        rows.append(last.x)
    return torch.cat(rows)


class Watch:
    """Prints the loss now and then, and keeps the average."""

    ema: Transformer | None = None

    def __init__(self, name: str) -> None:
        self.name, self.started = name, time.perf_counter()

    def advanced(self, step: int, steps: int, loss: float | None) -> None:
        if loss is not None and step % 50 == 0:
            seconds = time.perf_counter() - self.started
            print(f"{self.name}: {step}/{steps} loss {loss:.4f} ({seconds:.0f} s)", flush=True)

    def evaluated(self, record: dict[str, Any], ema: Transformer) -> None:
        print(f"{self.name}: step {record['step']} ELBO {record['elbo_nats_per_token']:.4f}")

    def saved(self, ema: Transformer) -> None:
        self.ema = ema


def student(
    name: str, recipe: Recipe, language: Prose | Chain, args: argparse.Namespace
) -> Transformer:
    """The averaged network of one recipe, trained now or before."""
    trained = name
    if recipe.neighbours:  # most variants differ in sampling alone
        trained = "joint head"
        if recipe.neighbours != JOINT.neighbours:
            trained += f", reach {recipe.neighbours}"
    directory = args.out / place_of(args) / f"{trained} {args.seed}".replace("/", ":")
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    start = Transformer(language.teacher.config) if recipe.scratch else language.teacher
    if recipe.embedding == "none" and not recipe.neighbours:
        model = copy.deepcopy(start)
    else:
        model = student_from_teacher(start, recipe.embedding, recipe.neighbours)  # type: ignore[arg-type]
    source = make_source(model.config.source, model.config.vocab_size)
    settings = replace(
        language.settings,
        steps=recipe.updates(args.budget),
        learning_rate=language.settings.learning_rate * recipe.learning_rate,
        ema_decay=recipe.ema,
    )
    objective: Objective = Distill(
        source,
        Polynomial(),
        TARGETS[recipe.target],
        STEP_RULES[recipe.rule],
        recipe.weights(),
        POSITION_LOSSES[recipe.path_loss],
        DIVERGENCES[recipe.divergence],
    )
    if recipe.neighbours:
        objective = Joint(source, Polynomial())
    prose = isinstance(language, Prose)
    dtype = preferred_dtype(pick_device("cpu")) if prose else torch.float32
    device = torch.device("cpu")
    task = Task(
        objective, source, Polynomial(), language.batch, language.validation(), device, dtype
    )
    watch = Watch(name)
    if not Run(directory, settings, task, watch).train(model):
        raise SystemExit(STOPPED)
    if watch.ema is None:
        load_average(directory / "checkpoint.safetensors", model)
        return model.eval()
    return watch.ema


def judged(
    rows: list[Row],
    facts: Row,
    language: Prose | Chain,
    model: Callable[[], Transformer],
    recipe: Recipe,
    path: Path,
) -> None:
    """One row of results.jsonl, unless it is there."""
    if any(same_facts(facts, row) for row in rows):
        return
    x = drawn(
        language,
        model(),
        facts["steps"],
        facts["temperature"],
        recipe,
        facts["first_sample"],
        facts["samples"],
    )
    row = facts | language.judge(x)
    rows.append(row)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def same_facts(facts: Row, row: Row) -> bool:
    """Whether a row says what it would say now; what it does not name is at its default."""
    row = {"first_sample": 0, **row}
    if "recipe" in row:
        known = {name: row["recipe"][name] for name in asdict(Recipe()) if name in row["recipe"]}
        row = row | {"recipe": asdict(Recipe(**known))}
    return facts.items() <= row.items()


def standard_error(nats: list[float], tokens: list[int]) -> float:
    """Of pooled nats a token, over samples (linearised)."""
    total, count = sum(tokens), len(nats)
    mean = sum(nats) / total
    residuals = [n - mean * t for n, t in zip(nats, tokens, strict=True)]
    return math.sqrt(count / max(1, count - 1) * sum(r * r for r in residuals)) / total


def at_entropy(swept: list[Row], entropy: float) -> tuple[float, bool]:
    """Nats at an entropy on the line through the two nearest rows; whether it lies between them."""
    if len(swept) == 1:
        return swept[0]["nats"], False
    low, high = sorted(sorted(swept, key=lambda r: abs(r["entropy"] - entropy))[:2], key=entropy_of)
    span = high["entropy"] - low["entropy"]
    if span <= 0.0:
        return low["nats"], False
    w = (entropy - low["entropy"]) / span
    return (1 - w) * low["nats"] + w * high["nats"], 0.0 <= w <= 1.0


def entropy_of(row: Row) -> float:
    """For sorting."""
    return float(row["entropy"])


def ratios(rows: list[Row]) -> Summary | None:
    """Perplexities over that of the teacher's many steps, at its entropy."""
    goals = [r for r in rows if r["model"] == "teacher" and r["steps"] == MANY]
    if not goals:
        return None
    goal, cells = goals[0], {}
    for name, seed, steps in dict.fromkeys((r["model"], r["seed"], r["steps"]) for r in rows):
        if steps == MANY:
            continue
        swept = [r for r in rows if (r["model"], r["seed"], r["steps"]) == (name, seed, steps)]
        nats, inside = at_entropy(swept, goal["entropy"])
        error = 1.96 * math.hypot(max(r["nats_se"] for r in swept), goal["nats_se"])
        low, middle, high = (math.exp(nats - goal["nats"] + k * error) for k in (-1, 0, 1))
        text = f"{middle:.2f} ({low:.2f}-{high:.2f}){'' if inside else '*'}"
        cells[name, seed, steps] = Cell(middle, low, high, text)
    return Summary(
        f"Teacher at {MANY} steps: perplexity {math.exp(goal['nats']):.4g}, entropy "
        f"{goal['entropy']:.3f}. Ratios to it, at its entropy (* beyond the temperatures drawn):",
        f"perplexity over the teacher's in {MANY} steps, at its entropy",
        1.0,
        cells,
    )


def read(path: Path) -> list[Row]:
    """Rows so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--language", choices=LANGUAGES, default="prose")
    parser.add_argument("--teacher", type=Path, help="model directory (prose)")
    parser.add_argument("--data", type=Path, help="prepared data (prose)")
    parser.add_argument("--judge", default="smollm2")
    parser.add_argument(
        "--teacher-run", type=Path, help="run of benchmarks/markov.py (markov); else trained here"
    )
    parser.add_argument("--teacher-steps", type=int, default=4000, help="of one trained here")
    parser.add_argument("--source", choices=SOURCES, default="uniform", help="x_0 (markov)")
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES))
    parser.add_argument(
        "--teacher-budgets", nargs="*", choices=("few", "many"), default=["few", "many"]
    )
    parser.add_argument("--budget", type=int, default=1800, help="batches forward")
    parser.add_argument("--budgets", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument(
        "--temperatures", type=float, nargs="+", help="default: .9 1.1 (prose), 1 (markov)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, help="of a row: 8 (prose), 4096 (markov)")
    parser.add_argument("--first-sample", type=int, default=0)
    args = parser.parse_args()
    if args.source != "uniform" and (args.teacher_run or args.language == "prose"):
        parser.error("--source is for the Markov language, with a teacher trained here.")
    return args


def main() -> None:
    args = parse()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    language = LANGUAGES[args.language](args)
    where = args.out / place_of(args)
    where.mkdir(parents=True, exist_ok=True)
    path = where / "results.jsonl"
    rows = read(path)
    settings = list(itertools.product(args.budgets, args.temperatures or language.temperatures))
    drawn_set = {"first_sample": args.first_sample, "samples": args.samples or language.samples}
    for name in args.recipes:
        recipe = RECIPES[name]
        make = partial(student, name, recipe, language, args)
        kept: list[Transformer] = []

        def model(make: Any = make, kept: list[Transformer] = kept) -> Transformer:
            if not kept:
                kept.append(make())
            return kept[0]

        for steps, temperature in settings:
            facts = {"model": name, "seed": args.seed, "steps": steps, "temperature": temperature}
            facts |= {"budget": args.budget, "recipe": asdict(recipe), **drawn_set}
            judged(rows, facts, language, model, recipe, path)
    for budgets, grid in (("few", Recipe()), ("many", Recipe(power=1.0))):
        if budgets in args.teacher_budgets:
            for steps, temperature in settings if budgets == "few" else [(MANY, 1.0)]:
                facts = {"model": "teacher", "seed": 0, "steps": steps, "temperature": temperature}
                judged(rows, facts | drawn_set, language, lambda: language.teacher, grid, path)
    shown = [row for row in rows if drawn_set.items() <= ({"first_sample": 0} | row).items()]
    summary = language.summary(shown)
    if summary is None:
        print(f"No table: the teacher's {MANY} steps are not judged (--teacher-budgets many).")
        return
    table = summary.table(args.budgets)
    usual = drawn_set == {"first_sample": 0, "samples": language.samples}
    suffix = "" if usual else f" {args.first_sample} {drawn_set['samples']}"
    write_whole(where / f"table{suffix}.md", table + "\n")
    if importlib.util.find_spec("matplotlib"):
        summary.picture(where / f"figure{suffix}.png")
    print("\n" + table)


if __name__ == "__main__":
    main()
