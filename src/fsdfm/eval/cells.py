"""What an evaluation makes texts of: references, and each model at each task, budget, temperature.

A cell is one row of the report to be. Its samples are made group by group, and what they depend on
is written down in `facts`, so that they can be kept and found again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fsdfm.core.errors import ConfigError
from fsdfm.core.files import digest
from fsdfm.eval.heldout import Blocks, HeldOut, read_texts
from fsdfm.eval.report import Record
from fsdfm.eval.settings import PLAIN, JudgeSettings
from fsdfm.eval.source import Sample, TextSource
from fsdfm.text.tokenizer import HALF

GROUP = 4
"""Fewest samples that are made and judged together, whoever does it."""
HUMAN, SHUFFLED, RANDOM = "human text", "human text, words shuffled", "random tokens"
OTHERS = "other human text"
"""What fidelity is measured against; no row of the report."""
VARIED = ("steps", "temperature")
"""Sampling options that differ between the rows of a model."""
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
        sources: models by name.
        heldout: held-out text.

    Raises:
        FsdfmError: a length or a number of samples that does not fit, or a bad reference.
    """

    def __init__(
        self, args: JudgeSettings, sources: Mapping[str, TextSource], heldout: HeldOut
    ) -> None:
        self.args, self.sources, self.heldout = args, sources, heldout
        context = min(s.context_length for s in sources.values())
        self.length = min(1024, context) if args.length is None else args.length
        if self.length > context:
            raise ConfigError(
                f"length={self.length} is more than a model's context of {context} tokens.",
                "length",
            )
        self.blocks = {
            name: Blocks.cut(heldout, s.tokenizer, self.length, args.seed)
            for name, s in sources.items()
        }
        self.first = next(iter(sources))
        self.most = max(count for _, count in args.budgets())
        short = min(len(blocks.human) for blocks in self.blocks.values())
        if self.most > short and set(args.tasks or ()) - {"unconditional"}:
            raise ConfigError(
                f"The held-out text gives {short} prompts of {self.length} tokens: ask for at most "
                f"{short} samples, or give more text as heldout.",
                "heldout",
            )
        taken = [HUMAN, SHUFFLED, RANDOM, OTHERS]
        for name in [*sources, *(name for name, _ in args.references())]:
            if name in taken:
                raise ConfigError(
                    f"Two rows would be called {name!r}: rename the model or reference."
                )
            taken.append(name)
        self.given = {name: read_texts(Path(file)) for name, file in args.references()}
        self.models = {name: self._model_facts(name) for name in sources}
        for name, source in sources.items() if args.tasks else ():  # refused before other rows
            source.check(**self.drawing(name), length=self.length)
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
                for name in self.sources:
                    yield from self._generated(name, task, share)
        for name in self.sources:
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
        tokenizer = self.sources[self.first].tokenizer

        def make(group: range) -> list[Text]:
            texts = []
            for ids in (blocks[i] for i in group):
                cut = tokenizer.character_cut(ids, prefix)
                before, text = (_whole(tokenizer.decode(part)) for part in (ids[:cut], ids[cut:]))
                texts.append(Text(text, ids[cut:], {}, before))
            return texts

        return self._reference(name, task, min(self.most, len(blocks)), make)

    def _shuffled(self, group: range) -> list[Text]:
        tokenizer, texts = self.sources[self.first].tokenizer, []
        for i in group:
            words = tokenizer.decode(self.blocks[self.first].human[i]).split()
            random.Random(f"{self.args.seed} {i}").shuffle(words)
            texts.append(Text(" ".join(words), tokenizer.encode(" ".join(words))))
        return texts

    def _noise(self, group: range) -> list[Text]:
        tokenizer, texts = self.sources[self.first].tokenizer, []
        for i in group:
            chance = np.random.default_rng([self.args.seed, i])
            ids = chance.integers(tokenizer.vocab_size, size=self.length).tolist()
            texts.append(Text(tokenizer.decode(ids), ids))
        return texts

    def _told(self, name: str, task: str, texts: list[str]) -> Cell:
        """Texts from a file, cut to the length of the others."""
        tokenizer = self.sources[self.first].tokenizer

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
        source, args = self.sources[name], self.args
        own = {k: v for k, v in source.defaults.items() if k not in VARIED}
        plain = dict(PLAIN) if args.preset == "paper" else {}
        asked = {"step": args.step, "grid": args.grid, "draws": args.draws}
        given = {k: v for k, v in asked.items() if v is not None}
        alone = {} if source.joint else {"draws": 1}
        return source.facts | own | plain | given | alone

    def drawing(self, name: str) -> dict[str, Any]:
        """How a model's texts are drawn at every budget and temperature."""
        return {k: self.models[name][k] for k in self.sources[name].defaults if k not in VARIED}

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
                    **self.drawing(name),
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
        source = self.sources[name]

        def make(group: range) -> list[Text]:
            seed, count = self.args.seed + group.start, len(group)
            found = source.generate(**options, length=self.length, num_samples=count, seed=seed)
            return [Text(s.text, s.token_ids, cost(s)) for s in found]

        return make

    def _continue(self, name: str, share: float, options: Any) -> Callable[[range], list[Text]]:
        """What follows the first part of held-out blocks; only that is judged."""
        source, prefix = self.sources[name], int(share * self.length)

        def make(group: range) -> list[Text]:
            given = [self.blocks[name].human[i] for i in group]
            cuts = [source.tokenizer.character_cut(ids, prefix) for ids in given]
            frozen = [[i < cut for i in range(self.length)] for cut in cuts]
            seed = self.args.seed + group.start
            found = source.fill(given, frozen, **options, seed=seed)
            texts = []
            for sample, cut in zip(found, cuts, strict=True):
                ids = sample.token_ids
                before = _whole(source.decode(ids[:cut]))
                texts.append(Text(source.decode(ids[cut:]), ids[cut:], cost(sample), before))
            return texts

        return make

    def _infill(self, name: str, share: float, options: Any) -> Callable[[range], list[Text]]:
        """Held-out blocks with a random share hidden; the whole text is judged."""
        source = self.sources[name]

        def make(group: range) -> list[Text]:
            given = [self.blocks[name].human[i] for i in group]
            hidden = [hidden_positions(self.length, share, self.args.seed, i) for i in group]
            frozen, seed = [(~mask).tolist() for mask in hidden], self.args.seed + group.start
            found = source.fill(given, frozen, **options, seed=seed)
            texts = []
            for sample, original, mask in zip(found, given, hidden, strict=True):
                right = int((np.equal(sample.token_ids, original) & mask).sum())
                record = cost(sample) | {"right_tokens": right, "hidden_tokens": int(mask.sum())}
                texts.append(Text(sample.text, sample.token_ids, record))
            return texts

        return make

    def _likelihood(self, name: str) -> Cell:
        """The ELBO of held-out blocks; nothing is generated or judged."""
        source, blocks = self.sources[name], self.blocks[name].human

        def make(group: range) -> list[Text]:
            texts = []
            for i in group:
                record: Record = {
                    "elbo_nats": self.length * source.bound_nats(blocks[i], self.args.seed, i),
                    "elbo_tokens": self.length,
                    "elbo_bytes": len(_whole(source.decode(blocks[i])).encode()),
                }
                texts.append(Text("", [], record))
            return texts

        facts = self.shared | source.bound_facts | {"task": "likelihood"}
        count = min(self.most, len(blocks))
        return Cell(name, "model", "likelihood", count, make, facts, judged=False)


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


def samples_of(texts: Sequence[Text]) -> dict[str, list[Any]]:
    """Texts as columns, for keeping."""
    return {
        "texts": [t.text for t in texts],
        "ids": [t.ids for t in texts],
        "records": [t.record for t in texts],
        "prefixes": [t.prefix for t in texts],
    }
