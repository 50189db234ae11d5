"""What an evaluation makes texts of: references, and each model at each task, budget, temperature.

A cell is one row of the report to be. Its samples are made group by group, and what they depend on
is written down in `facts`, so that they can be kept and found again.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fsdfm.app.config import EvaluateArgs
from fsdfm.app.device import hardware
from fsdfm.app.generator import Generator, Sample
from fsdfm.app.heldout import Blocks, HeldOut, read_texts
from fsdfm.core.files import digest, tensor_bytes
from fsdfm.errors import ConfigError
from fsdfm.eval.report import Record
from fsdfm.flow.loss import elbo_nats_per_token
from fsdfm.flow.path import make_source
from fsdfm.flow.schedule import Polynomial
from fsdfm.text.tokenizer import HALF

GROUP = 4
"""Fewest samples that are made and judged together, whoever does it."""
HUMAN, SHUFFLED, RANDOM = "human text", "human text, words shuffled", "random tokens"
OTHERS = "other human text"
"""What fidelity is measured against; no row of the report."""
BOUND_TIMES = 32
"""Of the bound, each a forward pass: with 24 x 1,024 tokens its spread over seeds is 0.01 nats."""
SHARES = {"quarter": 0.25, "half": 0.5}


@dataclass(frozen=True, slots=True)
class Text:
    """One sample on its way to the judge."""

    text: str
    ids: list[int]
    """The tokens that entropy and repetition are of."""
    record: Record = field(default_factory=dict)
    """What is known before it is judged."""
    prefix: str = ""
    """What comes before it and is not judged."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One row to be: `make` gives the samples of a range."""

    name: str
    kind: Literal["model", "reference"]
    task: str
    count: int
    make: Callable[[range], list[Text]]
    facts: dict[str, Any]
    """All that the texts depend on."""
    steps: int | None = None
    temperature: float | None = None
    judged: bool = True

    def groups(self, size: int) -> list[range]:
        """The samples, at most `size` at a time."""
        starts = range(0, self.count, size)
        return [range(start, min(self.count, start + size)) for start in starts]

    @property
    def label(self) -> str:
        """For progress."""
        steps = "" if self.steps is None else f", {self.steps} steps"
        heat = "" if self.temperature in (None, 1.0) else f", temperature {self.temperature:g}"
        return f"{self.name}: {self.task}{steps}{heat}"


class Cells:
    """The cells of one command.

    Args:
        args: settings, resolved.
        generators: models by name.
        heldout: held-out text.

    Raises:
        FsdfmError: a length or a number of samples that does not fit, or a bad reference.
    """

    def __init__(
        self, args: EvaluateArgs, generators: dict[str, Generator], heldout: HeldOut
    ) -> None:
        self.args, self.generators, self.heldout = args, generators, heldout
        context = min(g.config.context_length for g in generators.values())
        self.length = min(1024, context) if args.length is None else args.length
        if self.length > context:
            raise ConfigError(
                f"--length {self.length} is more than a model's context of {context} tokens."
            )
        self.blocks = {
            name: Blocks.cut(heldout, g.tokenizer, self.length, args.seed)
            for name, g in generators.items()
        }
        self.first = next(iter(generators))
        self.most = max(count for _, count in args.budgets())
        short = min(len(blocks.human) for blocks in self.blocks.values())
        if self.most > short and set(args.tasks or ()) - {"unconditional"}:
            raise ConfigError(
                f"The held-out text gives {short} prompts of {self.length} tokens: ask for at most "
                f"{short} samples, or give more text with --heldout."
            )
        taken = [HUMAN, SHUFFLED, RANDOM, OTHERS]
        for name in [*generators, *(name for name, _ in args.references())]:
            if name in taken:
                raise ConfigError(
                    f"Two rows would be called {name!r}: rename the model or reference."
                )
            taken.append(name)
        self.given = {name: read_texts(Path(file)) for name, file in args.references()}
        self.models = {name: self._model_facts(name) for name in generators}
        for name, facts in self.models.items() if args.tasks else ():  # refused before other rows
            generators[name].batches(step=facts["step"], draws=facts["draws"], length=self.length)
        self.shared = {
            "length": self.length,
            "seed": args.seed,
            "group": self.group,
            "torch": torch.__version__,
            "heldout": heldout.sha256,
        }

    @property
    def group(self) -> int:
        """Samples of a group: whole batches, and GROUP at least."""
        return self.args.batch_size * math.ceil(GROUP / self.args.batch_size)

    def all(self) -> Iterator[Cell]:
        """References of a task first, then each model over its temperatures and budgets."""
        for task in self.args.tasks or ():
            for share in SHARES if task != "unconditional" else ("",):
                yield from self._references(task, share)
                for name in self.generators:
                    yield from self._generated(name, task, share)
        for name in self.generators:
            yield self._likelihood(name)

    # -- references

    def _references(self, task: str, share: str) -> Iterator[Cell]:
        blocks = self.blocks[self.first]
        if task == "infilling":
            return
        prefix = int(SHARES.get(share, 0.0) * self.length)
        title = _title(task, share)
        yield self._human(OTHERS, title, blocks.others, prefix)
        yield self._human(HUMAN, title, blocks.human, prefix)
        if task == "unconditional":
            count = min(self.most, len(blocks.human))
            yield self._reference(SHUFFLED, title, count, self._shuffled)
            yield self._reference(RANDOM, title, self.most, self._noise)
            for name, texts in self.given.items():
                yield self._told(name, title, texts)

    def _reference(
        self, name: str, task: str, count: int, make: Callable[[range], list[Text]], **facts: Any
    ) -> Cell:
        known = {"reference": name, "task": task, "tokenizer": self.models[self.first]["tokenizer"]}
        return Cell(name, "reference", task, count, make, self.shared | known | facts)

    def _human(self, name: str, task: str, blocks: list[list[int]], prefix: int) -> Cell:
        tokenizer = self.generators[self.first].tokenizer

        def make(group: range) -> list[Text]:
            texts = []
            for ids in (blocks[i] for i in group):
                cut = tokenizer.character_cut(ids, prefix)
                before, text = (_whole(tokenizer.decode(part)) for part in (ids[:cut], ids[cut:]))
                texts.append(Text(text, ids[cut:], {}, before))
            return texts

        return self._reference(name, task, min(self.most, len(blocks)), make)

    def _shuffled(self, group: range) -> list[Text]:
        tokenizer, texts = self.generators[self.first].tokenizer, []
        for i in group:
            words = tokenizer.decode(self.blocks[self.first].human[i]).split()
            random.Random(f"{self.args.seed} {i}").shuffle(words)
            texts.append(Text(" ".join(words), tokenizer.encode(" ".join(words))))
        return texts

    def _noise(self, group: range) -> list[Text]:
        tokenizer, texts = self.generators[self.first].tokenizer, []
        for i in group:
            chance = np.random.default_rng([self.args.seed, i])
            ids = chance.integers(tokenizer.vocab_size, size=self.length).tolist()
            texts.append(Text(tokenizer.decode(ids), ids))
        return texts

    def _told(self, name: str, task: str, texts: list[str]) -> Cell:
        """Texts from a file, cut to the length of the others."""
        tokenizer = self.generators[self.first].tokenizer

        def make(group: range) -> list[Text]:
            rows = [tokenizer.encode(texts[i]) for i in group]
            ends = [tokenizer.character_cut(ids, min(self.length, len(ids))) for ids in rows]
            return [
                Text(tokenizer.decode(ids[:end]), ids[:end])
                for ids, end in zip(rows, ends, strict=True)
            ]

        count = min(self.most, len(texts))
        return self._reference(name, task, count, make, texts_sha256=digest(["\0".join(texts)]))

    # -- models

    def _model_facts(self, name: str) -> dict[str, Any]:
        generator, paper = self.generators[name], self.args.preset == "paper"
        config, defaults = generator.config, generator.defaults
        return {
            "parameters": sum(p.numel() for p in generator.model.parameters()),
            "weights_sha256": _digest(generator),
            "tokenizer": generator.tokenizer.fingerprint,
            "source": config.source,
            "step_embedding": config.step_embedding,
            "device": hardware(generator.device),
            "dtype": str(generator.dtype).removeprefix("torch."),
            "step": self.args.step or defaults["step"],
            "movers": "independent" if paper else defaults["movers"],
            "grid": self.args.grid or ("even" if paper else defaults["grid"]),
            "draws": (self.args.draws or (1 if paper else defaults["draws"]))
            if config.neighbours
            else 1,
            "top_p": 1.0 if paper else defaults["top_p"],
        }

    def _generated(self, name: str, task: str, share: str) -> Iterator[Cell]:
        make = {
            "unconditional": self._write,
            "continuation": self._continue,
            "infilling": self._infill,
        }[task]
        facts = self.models[name]
        for temperature in dict.fromkeys(self.args.temperatures or ()):
            for steps, count in self.args.budgets():
                options = {
                    "steps": steps,
                    "temperature": temperature,
                    "batch_size": self.args.batch_size,
                    **{key: facts[key] for key in ("step", "movers", "grid", "draws", "top_p")},
                }
                yield Cell(
                    name,
                    "model",
                    _title(task, share),
                    count,
                    make(name, SHARES.get(share, 0.0), options),
                    self.shared | facts | options | {"task": _title(task, share)},
                    steps,
                    temperature,
                )

    def _write(self, name: str, share: float, options: Any) -> Callable[[range], list[Text]]:
        """Whole texts."""
        generator = self.generators[name]

        def make(group: range) -> list[Text]:
            seed, count = self.args.seed + group.start, len(group)
            found = generator.generate(**options, length=self.length, num_samples=count, seed=seed)
            return [Text(s.text, s.token_ids, cost(s)) for s in found.samples]

        return make

    def _continue(self, name: str, share: float, options: Any) -> Callable[[range], list[Text]]:
        """What follows the first part of held-out blocks; only that is judged."""
        generator, prefix = self.generators[name], int(share * self.length)

        def make(group: range) -> list[Text]:
            given = [self.blocks[name].human[i] for i in group]
            cuts = [generator.tokenizer.character_cut(ids, prefix) for ids in given]
            frozen = [[i < cut for i in range(self.length)] for cut in cuts]
            seed = self.args.seed + group.start
            found = generator.fill(given, frozen, **options, seed=seed)
            texts = []
            for sample, cut in zip(found.samples, cuts, strict=True):
                ids = sample.token_ids
                before = _whole(generator.decode(ids[:cut]))
                texts.append(Text(generator.decode(ids[cut:]), ids[cut:], cost(sample), before))
            return texts

        return make

    def _infill(self, name: str, share: float, options: Any) -> Callable[[range], list[Text]]:
        """Held-out blocks with a random share hidden; the whole text is judged."""
        generator = self.generators[name]

        def make(group: range) -> list[Text]:
            given = [self.blocks[name].human[i] for i in group]
            hidden = [hidden_positions(self.length, share, self.args.seed, i) for i in group]
            frozen, seed = [(~mask).tolist() for mask in hidden], self.args.seed + group.start
            found = generator.fill(given, frozen, **options, seed=seed)
            texts = []
            for sample, original, mask in zip(found.samples, given, hidden, strict=True):
                right = int((np.equal(sample.token_ids, original) & mask).sum())
                record = cost(sample) | {"right_tokens": right, "hidden_tokens": int(mask.sum())}
                texts.append(Text(sample.text, sample.token_ids, record))
            return texts

        return make

    def _likelihood(self, name: str) -> Cell:
        """The ELBO of held-out blocks; nothing is generated or judged."""
        generator, blocks = self.generators[name], self.blocks[name].human
        source = make_source(
            generator.config.source,
            generator.config.vocab_size,
            absorbing=generator.config.absorbing,
        )
        schedule = Polynomial(generator.config.schedule_power)

        def make(group: range) -> list[Text]:
            texts = []
            for i in group:
                x_1 = torch.tensor([blocks[i]], device=generator.device)
                found = list(
                    elbo_nats_per_token(
                        _Precise(generator),
                        x_1,
                        source,
                        schedule,
                        times=BOUND_TIMES,
                        seed=self.args.seed,
                        first=i,
                    )
                )
                record: Record = {
                    "elbo_nats": self.length * sum(found) / len(found),
                    "elbo_tokens": self.length,
                    "elbo_bytes": len(_whole(generator.decode(blocks[i])).encode()),
                }
                texts.append(Text("", [], record))
            return texts

        # Not the step rule and its like: the bound does not depend on them.
        names = ("weights_sha256", "tokenizer", "device", "dtype")
        facts = self.shared | {n: self.models[name][n] for n in names} | {"task": "likelihood"}
        facts["dtype"] = str(generator.engine.dtype).removeprefix("torch.")
        count = min(self.most, len(blocks))
        return Cell(name, "model", "likelihood", count, make, facts, judged=False)


@dataclass(frozen=True, slots=True)
class _Precise:
    """A generator's network for the bound: the body in its format, logits in float32."""

    generator: Generator

    def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """See `TrainableModel`."""
        with self.generator.autocast():
            return self.generator.model.body(x_t, t, h).float()

    def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
        """See `JointHead`; in float32, as the head."""
        return self.generator.model.told(rows, at, x, known)

    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        """See `TrainableModel`."""
        return self.generator.model.head_parameters()


def _whole(text: str) -> str:
    """The text of a block without the characters that its ends cut."""
    return text.strip(HALF)


def hidden_positions(length: int, share: float, seed: int, index: int) -> Any:
    """Which positions of sample `index` are hidden for infilling, bool, shape (length,)."""
    order = np.random.default_rng([seed, index]).permutation(length)
    return order < max(1, round(share * length))


def cost(sample: Sample) -> Record:
    """What a sample took; of its batch's time, the part that falls to its tokens."""
    return {
        "seed": sample.seed,
        "generated_tokens": sample.tokens,
        "nfe": sample.nfe,
        "seconds": sample.tokens / sample.tokens_per_second if sample.tokens else 0.0,
        "threads": torch.get_num_threads(),
    }


def _title(task: str, share: str) -> str:
    return f"{task}, {share}" if share else task


def _digest(generator: Generator) -> str:
    """Of the weights and what they mean."""
    config = json.dumps(generator.config.to_dict(), sort_keys=True)
    return digest(chain([config], tensor_bytes(generator.model.parameters())))


def samples_of(texts: Sequence[Text]) -> dict[str, list[Any]]:
    """Texts as columns, for keeping."""
    return {
        "texts": [t.text for t in texts],
        "ids": [t.ids for t in texts],
        "records": [t.record for t in texts],
        "prefixes": [t.prefix for t in texts],
    }
