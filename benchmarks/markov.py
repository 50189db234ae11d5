"""A language whose true likelihood is known: does the sampler converge, does distillation work?

    python benchmarks/markov.py --out runs/markov

Text is a stationary second-order Markov chain over a few symbols. A teacher is pretrained on it and
students are distilled from it by the project's own loop; samples at every budget are then judged by
the chain itself. Two figures stand beside each other, since either alone can be cheated:

  nll      nats a token of the samples under the true chain; data has the chain's entropy
  entropy  entropy of the samples' pooled 3-grams, nats for 3 tokens; data has the chain's

Both are given with the standard error over samples (nll) or a bootstrap over samples (entropy), and
the same figures of as many true samples are the reference row. The run resumes where it stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from fsdfm.app.device import pick_device, preferred_dtype
from fsdfm.flow.grid import even_grid
from fsdfm.flow.loss import cross_entropy
from fsdfm.flow.path import UniformSource
from fsdfm.flow.sampler import Drawing, Noise, sample
from fsdfm.flow.schedule import Polynomial
from fsdfm.flow.step import STEP_RULES
from fsdfm.flow.target import TARGETS
from fsdfm.model.transformer import ModelConfig, Transformer, student_from_teacher
from fsdfm.train.loop import Run, Task, TrainSettings
from fsdfm.train.objective import STEP_WEIGHTS, Distill, Objective, Pretrain

STUDENTS = {
    # name: (step embedding, step weights, target, rule of its jumps)
    "published": ("raw", "published", "rk4", "published"),
    "rk4": ("log2", "even", "rk4", "published"),
    "rk2": ("log2", "even", "rk2", "published"),
    "rk4-exact": ("log2", "even", "rk4", "exact"),
    "semigroup": ("log2", "even", "semigroup", "exact"),
}


@dataclass(frozen=True)
class Chain:
    """A second-order Markov chain over V symbols.

    Args:
        first: chance of each first pair (its stationary law), shape (V, V).
        following: chance of the next symbol after each pair, shape (V, V, V).
    """

    first: Tensor
    following: Tensor

    @classmethod
    def random(cls, symbols: int, concentration: float, seed: int) -> Chain:
        """Rows drawn from a symmetric Dirichlet; the start is the stationary law of pairs."""
        generator = np.random.default_rng(seed)
        rows = generator.dirichlet(np.full(symbols, concentration), size=(symbols, symbols))
        pairs = np.full((symbols, symbols), symbols**-2.0)
        for _ in range(10_000):
            pairs = np.einsum("ab,abc->bc", pairs, rows)
        return cls(torch.from_numpy(pairs), torch.from_numpy(rows))

    @property
    def symbols(self) -> int:
        return len(self.first)

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


def trigram_entropy(x: Tensor, symbols: int) -> float:
    """Plug-in entropy of the pooled 3-grams, nats; biased low alike for equal sample counts."""
    grams = (x[:, :-2] * symbols + x[:, 1:-1]) * symbols + x[:, 2:]
    p = torch.bincount(grams.flatten(), minlength=symbols**3).double()
    p = p / p.sum()
    return float(-torch.xlogy(p, p).sum())


class Quiet:
    """A watcher that prints a line now and then."""

    def __init__(self, name: str) -> None:
        self.name, self.started = name, time.perf_counter()

    def advanced(self, step: int, steps: int, loss: float | None) -> None:
        if loss is not None and step % 250 == 0:
            seconds = time.perf_counter() - self.started
            print(f"{self.name}: step {step}/{steps} loss {loss:.4f} ({seconds:.0f} s)", flush=True)

    def evaluated(self, record: dict[str, Any], ema: Transformer) -> None:
        print(f"{self.name}: step {record['step']} ELBO {record['elbo_nats_per_token']:.4f}")

    def saved(self, ema: Transformer) -> None:
        pass


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
        learning_rate=1e-3 if teacher else args.student_learning_rate,
        ema_decay=0.998 if teacher else args.student_ema,
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
        preferred_dtype(device),
    )
    watched = Averaged(name)
    if not Run(directory, settings, task, watched).train(model.to(device)):
        raise SystemExit("Stopped: run the same command again to go on.")
    if watched.ema is None:  # it was finished before: the checkpoint holds the average
        tensors = load_file(directory / "checkpoint.safetensors")
        ema = {k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")}
        model.load_state_dict(ema)
        return model.eval()
    return watched.ema


class Averaged(Quiet):
    """Keeps hold of the averaged network."""

    ema: Transformer | None = None

    def saved(self, ema: Transformer) -> None:
        self.ema = ema


def judge(model: Transformer, rule: str, steps: int, args: argparse.Namespace, chain: Chain) -> Any:
    """Samples of one model at one budget, judged by the chain."""
    noise = Noise(range(args.samples))
    device = next(model.parameters()).device
    x_0 = noise.start(UniformSource(chain.symbols), args.length).to(device)
    *_, last = sample(
        model,
        x_0,
        even_grid(steps),
        noise,
        vocab_size=chain.symbols,
        drawing=Drawing(STEP_RULES[rule]),
    )
    return row(last.x.cpu(), chain) | {"rule": rule, "steps": steps, "calls": last.calls}


def row(x: Tensor, chain: Chain) -> dict[str, Any]:
    """nll and entropy of some sequences, with standard errors."""
    nll = chain.nll(x)
    generator = torch.Generator().manual_seed(0)
    resampled = [
        trigram_entropy(x[torch.randint(len(x), (len(x),), generator=generator)], chain.symbols)
        for _ in range(50)
    ]
    return {
        "nll": float(nll.mean()),
        "nll_se": float(nll.std() / len(x) ** 0.5),
        "entropy": trigram_entropy(x, chain.symbols),
        "entropy_se": float(np.std(resampled)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--students", nargs="*", choices=STUDENTS, default=["rk4", "semigroup"])
    parser.add_argument("--budgets", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 1024])
    parser.add_argument("--rules", nargs="+", choices=STEP_RULES, default=["exact"])
    parser.add_argument("--teacher-steps", type=int, default=3000)
    parser.add_argument("--student-steps", type=int, default=2000)
    parser.add_argument("--student-learning-rate", type=float, default=3e-4)
    parser.add_argument("--student-ema", type=float, default=0.99)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--symbols", type=int, default=12)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--concentration", type=float, default=0.3)
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None)
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")

    chain = Chain.random(args.symbols, args.concentration, args.seed)
    source, schedule = UniformSource(chain.symbols), Polynomial()
    torch.manual_seed(args.seed)
    config = ModelConfig(
        vocab_size=chain.symbols,
        hidden_size=args.hidden,
        blocks=args.blocks,
        heads=4,
        cond_size=64,
        context_length=args.length,
    )
    print(f"true entropy of the chain: {chain.entropy(args.length):.4f} nats/token")
    true = chain.draw(args.samples, args.length, seed=args.seed + 99)
    results = [{"model": "true samples", "rule": "", "steps": 0, "calls": 0} | row(true, chain)]
    teacher = train(
        "teacher", Transformer(config), Pretrain(source, schedule, cross_entropy), args, chain
    )
    models = {"teacher": teacher}
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
        models[name] = train(name, student_from_teacher(teacher, embedding), objective, args, chain)
    for name, model in models.items():
        for rule in args.rules:
            for steps in args.budgets:
                results.append({"model": name} | judge(model, rule, steps, args, chain))
                print(json.dumps(results[-1]), flush=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(
        "\n| model | rule | steps | nll, nats/token | 3-gram entropy, nats |\n|---|---|---|---|---|"
    )
    for r in results:
        nll, entropy = (f"{r[k]:.3f} ± {r[k + '_se']:.3f}" for k in ("nll", "entropy"))
        print(f"| {r['model']} | {r['rule']} | {r['steps'] or ''} | {nll} | {entropy} |")


if __name__ == "__main__":
    main()
