"""Where text, teacher and truth of a study come from: a language whose law is known, or prose.

Shapes: B or count sequences, L positions.
"""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fsdfm.core.device import preferred_dtype
from fsdfm.eval.heldout import Blocks, HeldOut, read_texts
from fsdfm.eval.judge import Judge, load_judge
from fsdfm.eval.metrics import histogram_entropy_nats, ngram_js_bits
from fsdfm.flow.grid import Late
from fsdfm.flow.path import Source, make_source
from fsdfm.flow.posterior import Grouped, Sampled, Sequences
from fsdfm.flow.sampler import Drawing, Noise, State, sample
from fsdfm.flow.step import STEP_RULES
from fsdfm.model.engine import Engine
from fsdfm.model.io.pretrained import load_pretrained
from fsdfm.model.transformer import FlowNetwork
from fsdfm.study.chain import Chain, OneStream
from fsdfm.study.divergence import figures
from fsdfm.study.recipes import Recipe
from fsdfm.text.store import TokenStore
from fsdfm.text.tokenizer import Tokenizer
from fsdfm.train.settings import TrainSettings

Row = dict[str, Any]
"""Figures of one set of samples, with what drew them."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A figure and its 95 % interval."""

    middle: float
    low: float
    high: float
    beyond: bool = False
    """Whether it lies beyond the temperatures that were drawn."""

    def text(self, digits: int) -> str:
        """As tables say it."""
        low, middle, high = (f"{each:.{digits}f}" for each in (self.low, self.middle, self.high))
        return f"{middle} ({low}-{high}){'*' if self.beyond else ''}"


@dataclass(frozen=True, slots=True)
class Setting:
    """How samples are drawn from a network."""

    recipe: Recipe
    calls: int
    """The budget N."""
    power: float
    """Of the grid; 1 is even."""
    temperature: float = 1.0


class Language(Protocol):
    """One kind of text, a teacher of it, and who judges samples."""

    name: str
    teacher: FlowNetwork
    source: Source
    settings: TrainSettings
    """Of its students: batch, warm-up, how often things are kept."""
    rates: Sequence[float]
    """Learning rates that a search tries."""
    temperatures: Sequence[float]
    dtype: torch.dtype
    """Of matrix products in training."""
    measures: dict[str, str]
    """What is told of samples -> its title; the first one is what a search minimises."""
    digits: int
    """Of a figure in tables."""

    def batch(self, seed: int, index: int) -> Tensor:
        """Text to train on, int64, (B, L): a function of both numbers."""
        ...

    def validation(self) -> Tensor:
        """Other text."""
        ...

    def draw(self, model: FlowNetwork, setting: Setting, count: int, first: int) -> Row:
        """Samples of a network, judged, with what they cost; one noise for all networks.

        Args:
            model: the network.
            setting: how they are drawn.
            count: of samples.
            first: number of the first sample's noise.
        """
        ...

    def cell(self, swept: Sequence[Row], goal: Row, measure: str) -> Cell:
        """A figure of rows that differ in temperature alone, beside the teacher's many calls."""
        ...

    def floors(self, count: int) -> dict[str, Row]:
        """Judged texts that no network of the study wrote, by name."""
        ...


def drawn(
    model: Sampled,
    setting: Setting,
    source: Source,
    noises: Sequence[Noise],
    length: int,
    seams: str,
) -> tuple[Tensor, Row]:
    """Samples, int64, (count, L), and their cost.

    Args:
        model: the network as the sampler calls it.
        setting: how they are drawn.
        source: where the path starts.
        noises: one for each set that is drawn together.
        length: L.
        seams: of groups, one of SEAMS.

    Returns:
        The samples; and `body_passes` (calls of the body), `head_passes` (rows of the head over
        L) and `seconds` of a text.
    """
    posterior = Grouped(model, setting.recipe.draws, seams)
    drawing = Drawing(
        STEP_RULES[setting.recipe.sampler], posterior=posterior, temperature=setting.temperature
    )
    grid = Late(setting.power)(setting.calls)
    found: list[Tensor] = []
    started, calls, rows = time.perf_counter(), 0, 0
    for noise in noises:
        x_0 = noise.start(source, length)
        last: State
        *_, last = sample(model, x_0, grid, noise, source, drawing=drawing)
        found.append(last.x.cpu())
        calls, rows = calls + last.calls, rows + last.head_rows
    x = torch.cat(found)
    return x, {
        "body_passes": calls / len(noises),
        "head_passes": round(rows / x.numel(), 4),
        "seconds": (time.perf_counter() - started) / len(x),
    }


class KnownLaw:
    """A Markov chain of 4 symbols and memory 2, in texts of 12.

    Its divergences need no judge, no temperature and no matched entropy. An n-gram model drawn
    token by token would be the law itself, so there is no such row.

    Args:
        teacher: a network of 4 symbols.
    """

    name = "known law"
    length, digits = 12, 1
    rates: Sequence[float] = (3e-4, 1e-3, 3e-3, 1e-2)
    temperatures: Sequence[float] = (1.0,)
    dtype = torch.float32
    measures = {  # noqa: RUF012
        "windows_mean": "divergence of each window's own 3-grams from the law, mean of the windows",
        "kl": "divergence of the pooled 3-grams from the law",
    }

    def __init__(self, teacher: FlowNetwork) -> None:
        self.chain = Chain.random(4, 0.3, 0.1, 0)
        self.teacher = teacher.eval()
        self.source = make_source(teacher.config.source, self.chain.symbols)
        self.settings = TrainSettings(
            steps=1,
            batch_size=256,
            learning_rate=1e-3,
            ema_warmup=False,
            evaluate_every=1_000_000,
            checkpoint_every=200,
        )

    def batch(self, seed: int, index: int) -> Tensor:
        """See `Language`."""
        seed = 1_000_003 * (seed + 1) + index
        return self.chain.draw(self.settings.batch_size, self.length, seed)

    def validation(self) -> Tensor:
        """See `Language`."""
        return self.chain.draw(128, self.length, seed=17)

    def draw(self, model: FlowNetwork, setting: Setting, count: int, first: int) -> Row:
        """See `Language`."""
        noises = [OneStream(count, first)]
        x, cost = drawn(
            Sequences(model.eval()), setting, self.source, noises, self.length, "random"
        )
        return cost | figures(x, self.chain)

    def cell(self, swept: Sequence[Row], goal: Row, measure: str) -> Cell:
        """See `Language`: thousandths of a nat, for 3 tokens."""
        (row,) = (each for each in swept if each.get("temperature", 1.0) == 1.0)
        value, error = 1000.0 * row[measure], 1960.0 * row[f"{measure}_se"]
        return Cell(value, max(value - error, 0.0), value + error)

    def floors(self, count: int) -> dict[str, Row]:
        """See `Language`."""
        return {"true samples": figures(self.chain.draw(count, self.length, 18), self.chain)}


class Prose:
    """Packed text, and judges of several families.

    A cell of a judge is the perplexity over that of the teacher's many calls, at their entropy: ln
    perplexity is linear in entropy between two temperatures; beyond all the line is drawn on.

    Args:
        teacher: model directory.
        data: what `fsdfm prepare` wrote.
        judges: names of judges, of different families.
        references: name -> file of texts, such as those of an n-gram model.
    """

    name = "prose"
    rates: Sequence[float] = (1e-4, 3e-4, 1e-3, 3e-3)
    temperatures: Sequence[float] = (0.9, 1.1)
    digits, train_length, length = 2, 256, 1024

    def __init__(
        self, teacher: Path, data: Path, judges: Sequence[str], references: dict[str, Path]
    ) -> None:
        found = load_pretrained(str(teacher))
        self.teacher = found.model.eval()
        self.store = TokenStore.open(data)
        self.tokenizer = Tokenizer.from_json(found.tokenizer_json)
        config = self.teacher.config
        self.source = make_source(config.source, config.vocab_size)
        self.references = references
        self.judges: dict[str, Judge] = {name: judge_of(name) for name in judges}
        self.human = Blocks.cut(HeldOut.open(data), self.tokenizer, self.length, seed=0)
        ratio = "perplexity over that of the teacher's many calls, at their entropy"
        self.measures = {f"{name}": f"{ratio}, by {name}" for name in judges}
        self.measures["js_byte_4"] = "divergence of byte 4-grams from held-out text, bits"
        self.dtype = preferred_dtype(torch.device("cpu"))
        self.settings = TrainSettings(
            steps=1,
            batch_size=16,
            learning_rate=3e-4,
            warmup_steps=30,
            ema_warmup=False,
            evaluate_every=1_000_000,
            checkpoint_every=100,
        )

    def batch(self, seed: int, index: int) -> Tensor:
        """See `Language`."""
        size = self.settings.batch_size
        return self.store.train.batch(index, batch_size=size, length=self.train_length, seed=seed)

    def validation(self) -> Tensor:
        """See `Language`."""
        return torch.stack([self.store.validation.block(i, self.train_length) for i in range(16)])

    def draw(self, model: FlowNetwork, setting: Setting, count: int, first: int) -> Row:
        """See `Language`."""
        noises = [Noise([1_000_000 + first + i]) for i in range(count)]
        sampled = Engine(model.eval(), self.dtype)
        x, cost = drawn(sampled, setting, self.source, noises, self.length, "random")
        return cost | self.judged([self.tokenizer.decode(row) for row in x.tolist()], x.tolist())

    def judged(self, texts: list[str], ids: list[list[int]]) -> Row:
        """Nats a token by every judge, entropy, divergence of 4-grams."""
        row: Row = {"entropy": float(np.mean([histogram_entropy_nats(each) for each in ids]))}
        for name, judge in self.judges.items():
            scores = [judged.score for judged in judge.judge(texts)]
            nats, tokens = [s.nats for s in scores], [s.tokens for s in scores]
            row[name] = sum(nats) / sum(tokens)
            row[f"{name}_se"] = standard_error(nats, tokens)
        others = [self.tokenizer.decode(each) for each in self.human.others]
        return row | {"js_byte_4": ngram_js_bits(texts, others, 4, "byte")}

    def cell(self, swept: Sequence[Row], goal: Row, measure: str) -> Cell:
        """See `Language`."""
        value, inside = at_entropy(swept, goal["entropy"], measure)
        if measure not in self.judges:
            return Cell(value, value, value, not inside)
        errors = [row[f"{measure}_se"] for row in swept]
        error = 1.96 * math.hypot(max(errors), goal[f"{measure}_se"])
        low, middle, high = (math.exp(value - goal[measure] + k * error) for k in (-1, 0, 1))
        return Cell(middle, low, high, not inside)

    def floors(self, count: int) -> dict[str, Row]:
        """See `Language`."""
        human = [self.tokenizer.decode(each) for each in self.human.human[:count]]
        texts = {"human text": human}
        texts |= {name: read_texts(path)[:count] for name, path in self.references.items()}
        return {
            name: self.judged(each, [self.tokenizer.encode(text) for text in each])
            for name, each in texts.items()
        }


def judge_of(name: str) -> Judge:
    """A judge on the CPU."""
    cpu = torch.device("cpu")
    return load_judge(name, device=cpu, dtype=preferred_dtype(cpu))


def standard_error(nats: Sequence[float], tokens: Sequence[int]) -> float:
    """Of pooled nats a token, over samples (linearised)."""
    total, count = sum(tokens), len(nats)
    mean = sum(nats) / total
    residuals = [n - mean * t for n, t in zip(nats, tokens, strict=True)]
    return math.sqrt(count / max(1, count - 1) * sum(r * r for r in residuals)) / total


def at_entropy(swept: Sequence[Row], entropy: float, measure: str) -> tuple[float, bool]:
    """A figure at an entropy, on the line through its neighbours; whether it lies between them.

    Beyond all rows it is the line through the two nearest. Of rows that share an entropy the lowest
    figure counts.
    """
    pairs = sorted(((row["entropy"], row[measure]) for row in swept), reverse=True)
    points = sorted(dict(pairs).items())
    if len(points) == 1:
        return float(points[0][1]), False
    above = bisect.bisect_left(points, entropy, 1, len(points) - 1, key=lambda point: point[0])
    (low, first), (high, second) = points[above - 1 : above + 1]
    w = (entropy - low) / (high - low)
    return float((1 - w) * first + w * second), 0.0 <= w <= 1.0
