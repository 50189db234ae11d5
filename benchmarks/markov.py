"""A language whose true likelihood is known: does the sampler converge, does distillation work?

    python benchmarks/markov.py --out runs/markov

Text is a stationary second-order Markov chain over a few symbols. A teacher is pretrained on it and
students are distilled from it by the project's own loop; samples at every budget are then judged by
the chain itself. The chain's exact posterior stands beside them as one more model: what a perfect
network would sample at that budget, so its rows show the cost of independent draws alone. The row
`perfect student` is the best that a student trained for consistency with it could do.

Three figures stand beside each other, since each of the first two alone can be cheated:

  nll      nats a token of the samples under the true chain; data has the chain's entropy
  entropy  entropy of the samples' pooled 3-grams, nats for 3 tokens (plug-in)
  kl       divergence of the samples' pooled 3-grams (plug-in) from the true 3-gram law, nats

Each has a standard error over samples (bootstrap for entropy and kl). The row of true samples, as
many as any model drew, shows the bias of the plug-in. Lower temperatures trade entropy for nll, so
a second table compares few steps with many at the same entropy, by a temperature sweep, on the
even grid and on one whose steps shrink towards t = 1.

The run resumes where it stopped; give each setting its own --out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fsdfm.core.device import pick_device
from fsdfm.flow.grid import Late
from fsdfm.flow.loss import cross_entropy, kl
from fsdfm.flow.path import Source, UniformSource, mixture_state
from fsdfm.flow.posterior import FlowModel, Sequences
from fsdfm.flow.sampler import Drawing, Noise, sample
from fsdfm.flow.schedule import Polynomial
from fsdfm.flow.step import STEP_RULES
from fsdfm.flow.target import TARGETS
from fsdfm.model.config import ModelConfig
from fsdfm.model.student import student_from_teacher
from fsdfm.model.transformer import Transformer
from fsdfm.train.checkpoint import load_average
from fsdfm.train.loop import Run, Task
from fsdfm.train.objective import STEP_WEIGHTS, Distill, Objective, Pretrain
from fsdfm.train.settings import TrainSettings

STUDENTS = {
    # name: (step embedding, step weights, target, rule of its jumps)
    "published": ("raw", "published", "rk4", "published"),
    "rk4": ("log2", "even", "rk4", "published"),
    "rk2": ("log2", "even", "rk2", "published"),
    "rk4-exact": ("log2", "even", "rk4", "exact"),
    "semigroup": ("log2", "even", "semigroup", "exact"),
}

PERFECT_STUDENT = "perfect student"
SMALL_STEPS = 32
"""Of a perfect student's jump."""

Row = dict[str, Any]
"""Figures of one set of samples, with what drew them."""


class Setting(NamedTuple):
    """How samples are drawn."""

    steps: int
    """The budget N."""
    power: float
    """Of the grid; 1 is even."""
    temperature: float

    @property
    def label(self) -> str:
        """Budget and grid."""
        return f"{self.steps}" if self.power == 1.0 else f"{self.steps}, late {self.power:g}"

    @classmethod
    def of(cls, row: Row) -> Setting:
        """The setting that a row was drawn in."""
        return cls(*(row[field] for field in cls._fields))


@dataclass(frozen=True)
class Chain:
    """A second-order Markov chain over V symbols.

    Args:
        first: chance of each first pair (its stationary law), float64, shape (V, V).
        following: chance of the next symbol after each pair, float64, shape (V, V, V).
    """

    first: Tensor
    following: Tensor

    @classmethod
    def random(cls, symbols: int, concentration: float, floor: float, seed: int) -> Chain:
        """Rows from a symmetric Dirichlet, a share `floor` of each made uniform.

        The start is the stationary law of pairs, so every window of a sequence has one law.
        """
        generator = np.random.default_rng(seed)
        rows = generator.dirichlet(np.full(symbols, concentration), size=(symbols, symbols))
        rows = (1.0 - floor) * rows + floor / symbols
        pairs = np.full((symbols, symbols), symbols**-2.0)
        for _ in range(10_000):
            pairs = np.einsum("ab,abc->bc", pairs, rows)
        return cls(torch.from_numpy(pairs), torch.from_numpy(rows))

    @property
    def symbols(self) -> int:
        return len(self.first)

    @property
    def trigrams(self) -> Tensor:
        """True law of three symbols in a row, anywhere in a sequence, shape (V, V, V)."""
        return self.first[..., None] * self.following

    def entropy(self, length: int) -> float:
        """True entropy of a sequence in nats a token: closed form."""
        start = -torch.xlogy(self.first, self.first).sum()
        rows = -torch.xlogy(self.following, self.following).sum(-1)
        return float(start + (length - 2) * (self.first * rows).sum()) / length

    def draw(self, count: int, length: int, seed: int) -> Tensor:
        """True sequences, int64, shape (count, length)."""
        generator = torch.Generator().manual_seed(seed)
        pair = torch.multinomial(self.first.flatten(), count, True, generator=generator)
        x = [pair // self.symbols, pair % self.symbols]
        cumulative = self.following.cumsum(-1)
        for _ in range(length - 2):
            u = torch.rand(count, 1, dtype=torch.float64, generator=generator)
            following = (cumulative[x[-2], x[-1]] <= u).sum(-1)
            x.append(following.clamp_max(self.symbols - 1))
        return torch.stack(x, dim=1)

    def nll(self, x: Tensor) -> Tensor:
        """Nats a token of each sequence, shape (count,)."""
        start = self.first[x[:, 0], x[:, 1]].log()
        rest = self.following[x[:, :-2], x[:, 1:-1], x[:, 2:]].log().sum(-1)
        return -(start + rest) / x.shape[1]


@dataclass(frozen=True)
class ExactPosterior:
    """p(x_1[i] given x_t) of a chain under the linear path from a uniform source: a FlowModel.

    Position i of x_t is seen through a channel: it is x_1[i] with chance t, else any of the V
    symbols. So the posterior is a forward-backward pass over pairs (x_1[i - 1], x_1[i]). The
    "hidden rows" are its logarithm, and the head is the identity.

    Args:
        chain: of at least two symbols; sequences of at least two positions.
    """

    chain: Chain

    def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """States (B, L), times (B,) -> log posterior, float64, (B, L, V); h is not needed."""
        return self.marginals(self._channel(x_t, t.double())).log()

    def marginals(self, seen: Tensor) -> Tensor:
        """Chance of each symbol at each position, given the likelihood of what is seen there.

        Args:
            seen: chance of what is seen given each symbol, float64, (B, L, V).

        Returns:
            Float64, (B, L, V).
        """
        forward = self._forward(seen)
        backward = torch.ones_like(forward[-1])
        marginals = [forward[-1].sum(1)]
        for i in range(seen.shape[1] - 1, 1, -1):
            backward = torch.einsum(
                "abc,nbc->nab", self.chain.following, backward * seen[:, None, i]
            )
            backward = backward / backward.sum((1, 2), keepdim=True)
            marginals.append((forward[i - 2] * backward).sum(1))
        marginals.append((forward[0] * backward).sum(2))
        p = torch.stack(marginals[::-1], dim=1)
        p = p / p.sum(-1, keepdim=True)
        return p

    def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
        """See `FlowModel`: there is no joint head."""
        return rows

    def head(self, rows: Tensor) -> Tensor:
        return rows

    def _channel(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Chance of the symbol seen given each true symbol, shape (B, L, V)."""
        t = t[:, None, None]
        return (1.0 - t) / self.chain.symbols + t * F.one_hot(x_t, self.chain.symbols)

    def _forward(self, seen: Tensor) -> list[Tensor]:
        """Pair ending at position i = 1, 2, ... given what is seen up to i, each (B, V, V)."""
        pairs = self.chain.first * seen[:, 0, :, None] * seen[:, 1, None, :]
        forward = [pairs]
        for i in range(2, seen.shape[1]):
            pairs = torch.einsum("nab,abc->nbc", pairs, self.chain.following) * seen[:, i, None, :]
            pairs = pairs / pairs.sum((1, 2), keepdim=True)
            forward.append(pairs)
        return forward


class OneStream(Noise):
    """All sequences' random numbers from one generator: three times as fast for many short ones.

    Args:
        count: of sequences.
        seed: of the generator.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        super().__init__([seed])

    def start(self, source: Source, length: int) -> Tensor:
        """x_0, int64, shape (count, L)."""
        return source.draw((self.count, length), self.generators[0])

    def uniform(self, length: int) -> Tensor:
        """Uniform in [0, 1), float64, shape (count, length)."""
        shape = (self.count, length)
        return torch.rand(shape, dtype=torch.float64, generator=self.generators[0])


def trigram_counts(x: Tensor, symbols: int) -> Tensor:
    """How often each 3-gram occurs in each sequence, float64, shape (count, V ** 3)."""
    grams = (x[:, :-2] * symbols + x[:, 1:-1]) * symbols + x[:, 2:]
    counts = torch.zeros(len(x), symbols**3, dtype=torch.float64)
    return counts.scatter_add_(1, grams, torch.ones_like(grams, dtype=torch.float64))


def trigram_figures(counts: Tensor, law: Tensor) -> tuple[float, float]:
    """Entropy of pooled 3-grams and their divergence from the true law, both plug-in, nats.

    Args:
        counts: of each 3-gram, shape (V ** 3,).
        law: true chance of each 3-gram, shape (V ** 3,).
    """
    p = counts / counts.sum()
    entropy = -torch.xlogy(p, p).sum()
    return float(entropy), float(-torch.xlogy(p, law).sum() - entropy)


def figures(x: Tensor, chain: Chain) -> Row:
    """nll, 3-gram entropy and kl of some sequences, with standard errors."""
    nll, counts = chain.nll(x), trigram_counts(x, chain.symbols)
    law = chain.trigrams.flatten()
    generator = torch.Generator().manual_seed(0)
    resampled = []
    for _ in range(50):
        picked = torch.randint(len(x), (len(x),), generator=generator)
        weights = torch.bincount(picked, minlength=len(x)).double()
        resampled.append(trigram_figures(weights @ counts, law))
    entropy, divergence = trigram_figures(counts.sum(0), law)
    entropy_se, divergence_se = np.std(resampled, axis=0)
    return {
        "nll": float(nll.mean()),
        "nll_se": float(nll.std() / len(x) ** 0.5),
        "entropy": entropy,
        "entropy_se": float(entropy_se),
        "kl": divergence,
        "kl_se": float(divergence_se),
    }


def at_entropy(rows: Iterable[Row], entropy: float) -> Row | None:
    """Figures of a temperature sweep where its 3-gram entropy is the given one.

    Linear between the two neighbouring temperatures that bracket it.

    Args:
        rows: of one model and budget, with their temperatures.
        entropy: nats.

    Returns:
        Every number interpolated, with `nll_slope`, nats of nll for one nat of entropy; or None
        where the sweep does not reach this entropy.
    """
    swept = sorted(rows, key=lambda row: row["temperature"])
    for low, high in itertools.pairwise(swept):
        if min(low["entropy"], high["entropy"]) <= entropy <= max(low["entropy"], high["entropy"]):
            span = high["entropy"] - low["entropy"]
            w = (entropy - low["entropy"]) / span if span else 0.0
            numbers = [k for k, v in low.items() if isinstance(v, float)]
            mixed = {k: (1.0 - w) * low[k] + w * high[k] for k in numbers}
            return mixed | {"nll_slope": (high["nll"] - low["nll"]) / span if span else 0.0}
    return None


class Watch:
    """Prints a line now and then, and keeps hold of the averaged network."""

    ema: Transformer | None = None

    def __init__(self, name: str) -> None:
        self.name, self.started = name, time.perf_counter()

    def advanced(self, step: int, steps: int, loss: float | None) -> None:
        if loss is not None and step % 250 == 0:
            seconds = time.perf_counter() - self.started
            print(f"{self.name}: step {step}/{steps} loss {loss:.4f} ({seconds:.0f} s)", flush=True)

    def evaluated(self, record: dict[str, Any], ema: Transformer) -> None:
        print(f"{self.name}: step {record['step']} ELBO {record['elbo_nats_per_token']:.4f}")

    def saved(self, ema: Transformer) -> None:
        self.ema = ema


def train(
    name: str, model: Transformer, objective: Objective, args: argparse.Namespace, chain: Chain
) -> Transformer:
    """The project's loop on fresh text; returns the averaged network."""
    teacher = name == "teacher"
    directory = args.out / name
    directory.mkdir(parents=True, exist_ok=True)
    settings = TrainSettings(
        steps=args.teacher_steps if teacher else args.student_steps,
        batch_size=args.batch_size,
        learning_rate=args.teacher_learning_rate if teacher else args.student_learning_rate,
        ema_decay=args.teacher_ema if teacher else args.student_ema,
        ema_warmup=teacher,  # as fsdfm distill does
        seed=args.seed,
        evaluate_every=1000,
        checkpoint_every=500,
    )
    device = pick_device(args.device)
    task = Task(
        objective,
        UniformSource(chain.symbols),
        Polynomial(),
        lambda i: chain.draw(args.batch_size, args.length, seed=1_000_003 * (args.seed + 1) + i),
        chain.draw(128, args.length, seed=args.seed + 17),
        device,
        torch.float32,  # bfloat16 is no faster at this width
    )
    watch = Watch(name)
    if not Run(directory, settings, task, watch).train(model.to(device)):
        raise SystemExit("Stopped: run the same command again to go on.")
    if watch.ema is None:  # it was finished before: the checkpoint holds the average
        load_average(directory / "checkpoint.safetensors", model)
        return model.eval()
    return watch.ema


def train_all(args: argparse.Namespace, chain: Chain) -> dict[str, Transformer]:
    """The teacher and then its students, by name."""
    source, schedule = UniformSource(chain.symbols), Polynomial()
    config = ModelConfig(
        vocab_size=chain.symbols,
        hidden_size=args.hidden,
        blocks=args.blocks,
        heads=4,
        cond_size=64,
        context_length=args.length,
    )
    torch.manual_seed(args.seed)
    objective: Objective = Pretrain(source, schedule, cross_entropy)
    models = {"teacher": train("teacher", Transformer(config), objective, args, chain)}
    for name in args.students:
        embedding, weights, target, rule = STUDENTS[name]
        objective = Distill(
            source,
            schedule,
            TARGETS[target],
            STEP_RULES[rule],
            STEP_WEIGHTS[weights](),
            cross_entropy,
        )
        torch.manual_seed(args.seed)
        student = student_from_teacher(models["teacher"], embedding)
        models[name] = train(name, student, objective, args, chain)
    return models


@torch.no_grad()
def path_gap(model: Transformer, chain: Chain, length: int, seed: int) -> float:
    """KL(exact posterior || network) on the path, nats a position: 0 for a perfect teacher."""
    count = 4096
    x_1 = chain.draw(count, length, seed)
    generator = torch.Generator().manual_seed(seed)
    t = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    x_0 = UniformSource(chain.symbols).draw((count, length), generator)
    x_t = mixture_state(x_0, x_1, t, Polynomial(), generator)
    exact = ExactPosterior(chain).body(x_t, t, t).exp().flatten(0, 1)
    device = next(model.parameters()).device
    h = torch.full_like(t, 1.0 / 1024)
    logits = model(x_t.to(device), t.float().to(device), h.float().to(device)).flatten(0, 1)
    return float(kl(exact, logits.double().cpu()).mean())


def judge(model: FlowModel, setting: Setting, args: argparse.Namespace, chain: Chain) -> Row:
    """Samples of one model in one setting, judged by the chain."""
    noise = OneStream(args.samples, args.seed)
    device = next(model.parameters()).device if isinstance(model, Transformer) else "cpu"
    source = UniformSource(chain.symbols)
    *_, last = sample(
        Sequences(model),
        noise.start(source, args.length).to(device),
        Late(setting.power)(setting.steps),
        noise,
        source,
        drawing=Drawing(STEP_RULES[args.rule], temperature=setting.temperature),
    )
    return figures(last.x.cpu(), chain)


def judge_perfect_student(
    setting: Setting, count: int, args: argparse.Namespace, chain: Chain
) -> Row:
    """What consistency can reach at best: exact marginals of a long jump, drawn independently.

    A perfect student's posterior at (x_t, t, h) is, at each position, the law of many small steps
    of the exact posterior from x_t over [t, t + h]. That law is drawn from by running those small
    steps once for each position, on its own copy of x_t, and keeping that position alone.
    """
    source, length = UniformSource(chain.symbols), args.length
    x = OneStream(count, args.seed).start(source, length)
    noise = OneStream(count * length, args.seed + 1)
    for t, then in itertools.pairwise(Late(setting.power)(setting.steps).tolist()):
        *_, last = sample(
            Sequences(ExactPosterior(chain)),
            x.repeat_interleave(length, dim=0),
            torch.linspace(t, then, SMALL_STEPS + 1, dtype=torch.float64),
            noise,
            source,
        )
        x = last.x.view(count, length, length).diagonal(dim1=1, dim2=2)
    return figures(x, chain)


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """Every budget on the even grid, and the temperature sweep on every grid; quick ones first."""
    budgets = {Setting(steps, 1.0, 1.0) for steps in args.budgets}
    swept = itertools.product(args.few, args.powers, args.temperatures)
    return sorted(budgets | {Setting(*each) for each in swept})


def judge_all(
    networks: dict[str, Transformer], args: argparse.Namespace, chain: Chain
) -> list[Row]:
    """Every model in every setting; what results.jsonl holds already is kept."""
    path = args.out / "results.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    models: dict[str, FlowModel] = {"exact posterior": ExactPosterior(chain)} | networks

    def judged(name: str, setting: Setting) -> Row:
        samples = args.samples // 2 if name == PERFECT_STUDENT else args.samples
        drawn = {"model": name, "samples": samples, "rule": args.rule} | setting._asdict()
        for row in done:
            if drawn.items() <= row.items():
                return row
        if name == PERFECT_STUDENT:
            row = drawn | judge_perfect_student(setting, samples, args, chain)
        else:
            row = drawn | judge(models[name], setting, args, chain)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
        return row

    rows = [judged(name, setting) for setting in settings_of(args) for name in models]
    for steps, power in itertools.product(args.few, args.powers):
        rows.append(judged(PERFECT_STUDENT, Setting(steps, power, 1.0)))
    return rows


FIGURES = {
    "nll": "nll, nats/token",
    "entropy": "entropy of the 3-grams, nats",
    "kl": "divergence from the true 3-grams, nats",
}


def budget_tables(rows: list[Row], true: Row) -> str:
    """Every model at every budget and grid, temperature 1: one table for each figure."""
    plain = [row for row in rows if row["temperature"] == 1.0]
    settings = sorted({Setting.of(row) for row in plain})
    names = list(dict.fromkeys(row["model"] for row in plain))
    found = {(row["model"], Setting.of(row)): row for row in plain}
    lines = []
    for figure, title in FIGURES.items():
        lines += ["", f"{title} (true samples: {with_error(true, figure)})", ""]
        lines.append(f"| steps | {' | '.join(each.label for each in settings)} |")
        lines.append("|---" * (1 + len(settings)) + "|")
        for name in names:
            cells = [with_error(found.get((name, each)), figure) for each in settings]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_error(row: Row | None, figure: str) -> str:
    """A figure and its standard error; nothing where it was not measured."""
    return f"{row[figure]:.3f} ± {row[figure + '_se']:.3f}" if row else ""


def matched_table(rows: list[Row], many: int) -> str:
    """Few steps, tempered to the entropy that the teacher has at many, against the teacher there.

    The error of the difference adds up four errors as if they were independent; entropy and nll of
    one set of samples rise together, so it is too large rather than too small.
    """
    (goal,) = (r for r in rows if r["model"] == "teacher" and Setting.of(r) == (many, 1.0, 1.0))
    lines = [
        f"Teacher at {many} steps: nll {goal['nll']:.3f}, 3-gram entropy {goal['entropy']:.3f}, "
        f"3-gram KL {goal['kl']:.3f}. At that entropy:",
        "",
        "| steps | model | temperature | nll, nats/token | minus the teacher's | 3-gram KL |",
        "|---|---|---|---|---|---|",
    ]
    sweeps: dict[tuple[int, float, str], list[Row]] = {}
    for row in rows:
        sweeps.setdefault((row["steps"], row["power"], row["model"]), []).append(row)
    for (steps, power, name), swept in sorted(sweeps.items()):
        if len(swept) > 1:
            label = Setting(steps, power, 1.0).label
            lines.append(f"| {label} | {name} | {matched_cells(swept, goal)} |")
    return "\n".join(lines)


def matched_cells(swept: list[Row], goal: Row) -> str:
    """Temperature, nll, its difference from the goal's, and KL, at the goal's entropy."""
    matched = at_entropy(swept, goal["entropy"])
    if matched is None:
        reached = [row["entropy"] for row in swept]
        return f"| out of range: entropies {min(reached):.3f} to {max(reached):.3f} | |"
    slope = matched["nll_slope"]
    errors = [matched["nll_se"], goal["nll_se"]]
    errors += [slope * matched["entropy_se"], slope * goal["entropy_se"]]
    return (
        f"{matched['temperature']:.2f} | {matched['nll']:.3f} | "
        f"{matched['nll'] - goal['nll']:+.3f} ± {np.linalg.norm(errors):.3f} | {matched['kl']:.3f}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--students", nargs="*", choices=STUDENTS, default=["semigroup", "rk4"])
    parser.add_argument("--budgets", type=int, nargs="+", default=[1, 2, 4, 8, 64, 1024])
    parser.add_argument(
        "--few", type=int, nargs="+", default=[8], help="budgets of the temperature sweep"
    )
    parser.add_argument(
        "--temperatures",
        type=float,
        nargs="+",
        default=[0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5],
    )
    parser.add_argument(
        "--powers", type=float, nargs="+", default=[1.0, 2.0], help="grids of the temperature sweep"
    )
    parser.add_argument("--rule", choices=STEP_RULES, default="exact")
    parser.add_argument("--samples", type=int, default=2048)
    parser.add_argument("--teacher-steps", type=int, default=4000)
    parser.add_argument("--teacher-learning-rate", type=float, default=2e-3)
    parser.add_argument("--teacher-ema", type=float, default=0.999)
    parser.add_argument("--student-steps", type=int, default=2000)
    parser.add_argument("--student-learning-rate", type=float, default=1e-3)
    parser.add_argument("--student-ema", type=float, default=0.998)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--symbols", type=int, default=4)
    parser.add_argument("--length", type=int, default=12)
    parser.add_argument("--concentration", type=float, default=0.3)
    parser.add_argument("--floor", type=float, default=0.1, help="uniform share of each row")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None)
    return parser.parse_args()


def main() -> None:
    args = parse()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    chain = Chain.random(args.symbols, args.concentration, args.floor, args.seed)
    print(f"true entropy of the chain: {chain.entropy(args.length):.4f} nats/token")
    networks = train_all(args, chain)
    gap = path_gap(networks["teacher"], chain, args.length, args.seed + 5)
    print(f"teacher: KL(exact posterior || network) on the path: {gap:.4f} nats/position")
    true = figures(chain.draw(args.samples, args.length, seed=args.seed + 99), chain)
    rows = judge_all(networks, args, chain)
    print(f"{budget_tables(rows, true)}\n\n{matched_table(rows, max(args.budgets))}")


if __name__ == "__main__":
    main()
