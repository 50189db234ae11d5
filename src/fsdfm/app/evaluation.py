"""`fsdfm evaluate`: models, held-out text and a judge meet; what is done is kept."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fsdfm.app.config import EvaluateArgs
from fsdfm.app.device import describe, pick_device, preferred_dtype
from fsdfm.app.generator import Generator, Sample, load
from fsdfm.app.heldout import Blocks, HeldOut, read_texts
from fsdfm.app.workers import Workers
from fsdfm.errors import ConfigError
from fsdfm.eval.judge import Judge, load_judge
from fsdfm.eval.mauve import mauve
from fsdfm.eval.metrics import distinct, histogram_entropy_nats, ngram_js_bits, repetition
from fsdfm.eval.report import Record, Report, Row, write_whole
from fsdfm.flow.loss import elbo_nats_per_token
from fsdfm.flow.path import make_source
from fsdfm.flow.schedule import Polynomial

EVALUATION = 1
"""Part of every key: raise it when what a part holds, or how it is made, changes."""
GROUP = 4
"""Samples of one part, made and judged together, whoever does it."""
FEWEST_SEGMENTS = 20
"""MAUVE of fewer feature vectors is noise."""
EXCERPT = 400
"""Characters of the first sample that a report shows."""
HUMAN, SHUFFLED, RANDOM = "human text", "human text, words shuffled", "random tokens"
SHARES = {"quarter": 0.25, "half": 0.5}

Progress = Callable[[str, int, int], None]
"""(what was done, samples done, samples to do in all, both in this process and call)."""


@dataclass(frozen=True, slots=True)
class Text:
    """One sample on its way to the judge."""

    text: str
    ids: list[int]
    """The tokens that entropy and repetition are of."""
    record: Record
    prefix: str = ""
    """What comes before it and is not judged."""
    judged: bool = True


@dataclass(frozen=True, slots=True)
class Cell:
    """One row to be: `make` gives its samples [first, last)."""

    name: str
    kind: Any
    task: str
    count: int
    make: Callable[[range], list[Text]]
    facts: dict[str, Any]
    """All that the samples depend on besides the judge."""
    steps: int | None = None
    temperature: float | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """What is known of some samples of a cell once they are judged."""

    records: list[Record]
    texts: list[str]
    ids: list[list[int]]
    features: NDArray[np.float32]


class Evaluation:
    """The cells of one command, and what they need.

    Args:
        args: settings, resolved.
        generators: models by name.
        heldout: held-out text.
        judge: the judge.
    """

    def __init__(
        self,
        args: EvaluateArgs,
        generators: dict[str, Generator],
        heldout: HeldOut,
        judge: Judge,
    ) -> None:
        self.args, self.generators, self.heldout, self.judge = args, generators, heldout, judge
        contexts = [g.config.context_length for g in generators.values()]
        self.length = args.length or min(1024, *contexts)
        if self.length > min(contexts):
            raise ConfigError(
                f"--length {self.length} is more than a model's context of {min(contexts)} tokens."
            )
        self.blocks = {
            name: Blocks.cut(heldout, g.tokenizer, self.length, args.seed)
            for name, g in generators.items()
        }
        self.first = next(iter(generators))
        self.machine = describe(generators[self.first].device)
        self.models = {name: self._model_facts(name) for name in generators}
        self.most = max([args.num_samples, *(count for _, count in args.budgets())])
        short = min(len(blocks.human) for blocks in self.blocks.values())
        if self.most > short and set(args.tasks or ()) - {"unconditional"}:
            raise ConfigError(
                f"The held-out text gives {short} prompts of {self.length} tokens: ask for at most "
                f"{short} samples, or give more text with --heldout."
            )

    def cells(self) -> Iterator[Cell]:
        """References first, then each model over its budgets and temperatures."""
        for task in self.args.tasks or ():
            shares: Sequence[str] = tuple(SHARES) if task != "unconditional" else ("",)
            for share in shares:
                yield from self._references(task, share)
                for name in self.generators:
                    yield from self._generated(name, task, share)
        for name in self.generators:
            yield self._likelihood(name)

    def others(self) -> Cell:
        """More human text: what MAUVE is measured against."""
        return self._human("other human text", "others", self.blocks[self.first].others)

    def facts(self) -> dict[str, Any]:
        """What the rows of a report share."""
        return {
            "fsdfm": importlib.metadata.version("fsdfm"),
            "torch": torch.__version__,
            "machine": self.machine,
            "length": self.length,
            "seed": self.args.seed,
            "batch_size": self.args.batch_size,
            "preset": self.args.preset,
            "judge": self.judge.facts,
            "heldout": {
                "name": self.heldout.name,
                "sha256": self.heldout.sha256,
                "blocks": len(self.blocks[self.first].human) * 2,
            },
            "models": self.models,
        }

    def _model_facts(self, name: str) -> dict[str, Any]:
        generator = self.generators[name]
        defaults = generator.defaults
        return {
            "parameters": sum(p.numel() for p in generator.model.parameters()),
            "weights_sha256": _digest(generator),
            "source": generator.config.source,
            "step_embedding": generator.config.step_embedding,
            "dtype": str(preferred_dtype(generator.device)).removeprefix("torch."),
            "step": self.args.step or defaults["step"],
            "movers": defaults["movers"],
            "top_p": defaults["top_p"],
        }

    def _references(self, task: str, share: str) -> Iterator[Cell]:
        blocks, tokenizer = self.blocks[self.first], self.generators[self.first].tokenizer
        if task == "continuation":
            prefix = int(SHARES[share] * self.length)
            yield self._human(HUMAN, f"{task}, {share}", blocks.human, prefix)
        if task != "unconditional":
            return
        yield self._human(HUMAN, task, blocks.human)

        def shuffled(part: range) -> list[Text]:
            texts = []
            for i in part:
                words = tokenizer.decode(blocks.human[i]).split()
                random.Random(f"{self.args.seed} {i}").shuffle(words)
                text = " ".join(words)
                texts.append(Text(text, tokenizer.encode(text), {}))
            return texts

        def noise(part: range) -> list[Text]:
            texts = []
            for i in part:
                chance = np.random.default_rng([self.args.seed, i])
                ids = chance.integers(tokenizer.vocab_size, size=self.length).tolist()
                texts.append(Text(tokenizer.decode(ids), ids, {}))
            return texts

        count = min(self.args.num_samples, len(blocks.human))
        yield self._reference(SHUFFLED, task, count, shuffled)
        yield self._reference(RANDOM, task, self.args.num_samples, noise)
        for given in self.args.reference:
            yield self._given(given, task)

    def _given(self, given: str, task: str) -> Cell:
        """A row of texts from a file, cut to the length of the others."""
        name, equals, file = given.partition("=")
        if not name or not equals:
            raise ConfigError(f"--reference takes NAME=FILE, got {given!r}.")
        tokenizer, texts = self.generators[self.first].tokenizer, read_texts(Path(file))

        def make(part: range) -> list[Text]:
            ids = [tokenizer.encode(texts[i])[: self.length] for i in part]
            return [Text(tokenizer.decode(row), row, {}) for row in ids]

        count = min(self.args.num_samples, len(texts))
        digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        return self._reference(name, task, count, make, texts_sha256=digest)

    def _human(self, name: str, task: str, blocks: list[list[int]], prefix: int = 0) -> Cell:
        tokenizer = self.generators[self.first].tokenizer

        def make(part: range) -> list[Text]:
            return [
                Text(
                    tokenizer.decode(blocks[i][prefix:]),
                    blocks[i][prefix:],
                    {},
                    tokenizer.decode(blocks[i][:prefix]),
                )
                for i in part
            ]

        return self._reference(name, task, min(self.most, len(blocks)), make)

    def _reference(
        self, name: str, task: str, count: int, make: Callable[[range], list[Text]], **facts: Any
    ) -> Cell:
        tokenizer = self.generators[self.first].tokenizer.fingerprint
        return Cell(name, "reference", task, count, make, facts | {"tokenizer": tokenizer})

    def _generated(self, name: str, task: str, share: str) -> Iterator[Cell]:
        for temperature in self.args.temperatures or ():
            for steps, count in self.args.budgets():
                options = {
                    "steps": steps,
                    "temperature": temperature,
                    "step": self.args.step,
                    "batch_size": self.args.batch_size,
                }
                make = _MAKERS[task](self, name, SHARES.get(share, 0.0), options)
                yield Cell(
                    name,
                    "model",
                    f"{task}, {share}" if share else task,
                    count,
                    make,
                    self.models[name] | {"batch_size": self.args.batch_size},
                    steps,
                    temperature,
                )

    def _write(self, name: str, share: float, options: Any) -> Callable[[range], list[Text]]:
        """Whole texts."""
        generator = self.generators[name]

        def make(part: range) -> list[Text]:
            samples = generator.generate(
                **options,
                length=self.length,
                num_samples=len(part),
                seed=self.args.seed + part.start,
            ).samples
            return [Text(s.text, s.token_ids, _cost(s, generator)) for s in samples]

        return make

    def _continue(self, name: str, share: float, options: Any) -> Callable[[range], list[Text]]:
        """What follows the first part of held-out blocks; only that is judged."""
        generator, prefix = self.generators[name], int(share * self.length)

        def make(part: range) -> list[Text]:
            given = [self.blocks[name].human[i] for i in part]
            frozen = [[i < prefix for i in range(self.length)]] * len(part)
            seed = self.args.seed + part.start
            samples = generator.fill(given, frozen, **options, seed=seed).samples
            return [
                Text(
                    generator.decode(s.token_ids[prefix:]),
                    s.token_ids[prefix:],
                    _cost(s, generator),
                    generator.decode(s.token_ids[:prefix]),
                )
                for s in samples
            ]

        return make

    def _infill(self, name: str, share: float, options: Any) -> Callable[[range], list[Text]]:
        """Held-out blocks with a random share hidden; the whole text is judged."""
        generator = self.generators[name]

        def make(part: range) -> list[Text]:
            given = [self.blocks[name].human[i] for i in part]
            hidden = []
            for i in part:
                order = np.random.default_rng([self.args.seed, i]).permutation(self.length)
                hidden.append(order < round(share * self.length))
            frozen = [(~mask).tolist() for mask in hidden]
            seed = self.args.seed + part.start
            samples = generator.fill(given, frozen, **options, seed=seed).samples
            texts = []
            for sample, original, mask in zip(samples, given, hidden, strict=True):
                right = int((np.equal(sample.token_ids, original) & mask).sum())
                found = {"right_tokens": right, "hidden_tokens": int(mask.sum())}
                record = _cost(sample, generator) | found
                texts.append(Text(sample.text, sample.token_ids, record))
            return texts

        return make

    def _likelihood(self, name: str) -> Cell:
        """The ELBO of held-out blocks; nothing is generated or judged."""
        generator, blocks = self.generators[name], self.blocks[name].human
        source = make_source(generator.config.source, generator.config.vocab_size)
        schedule = Polynomial(generator.config.schedule_power)

        def make(part: range) -> list[Text]:
            texts = []
            for i in part:
                x_1 = torch.tensor([blocks[i]], device=generator.device)
                estimates = list(
                    elbo_nats_per_token(
                        generator.network, x_1, source, schedule, seed=self.args.seed + i
                    )
                )
                text = generator.decode(blocks[i])
                record: Record = {
                    "elbo_nats": self.length * sum(estimates) / len(estimates),
                    "elbo_tokens": self.length,
                    "elbo_bytes": len(text.encode()),
                }
                texts.append(Text("", [], record, judged=False))
            return texts

        count = min(self.args.num_samples, len(blocks))
        return Cell(name, "model", "likelihood", count, make, self.models[name])

    def key(self, cell: Cell) -> str:
        """What a part of the cell depends on, in short."""
        facts = {
            "evaluation": EVALUATION,
            "name": cell.name if cell.kind == "reference" else "",
            "task": cell.task,
            "steps": cell.steps,
            "temperature": cell.temperature,
            "length": self.length,
            "seed": self.args.seed,
            "group": self.group,
            "heldout": self.heldout.sha256,
            "judge": self.judge.facts,
            "machine": self.machine,
            **{f"cell_{k}": v for k, v in cell.facts.items()},
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def group(self) -> int:
        """Samples of a part."""
        return max(GROUP, self.args.batch_size)

    def groups(self, cell: Cell) -> list[range]:
        """The cell's samples, part by part."""
        starts = range(0, cell.count, self.group)
        return [range(start, min(cell.count, start + self.group)) for start in starts]

    def part(self, cell: Cell, samples: range) -> Part:
        """Make and judge some samples."""
        texts = cell.make(samples)
        records = [dict(text.record) for text in texts]
        features: list[NDArray[np.float32]] = []
        if all(text.judged for text in texts):
            judgements = self.judge.judge([t.text for t in texts], [t.prefix for t in texts])
            for text, record, judgement in zip(texts, records, judgements, strict=True):
                score = judgement.score
                record["nats"], record["judge_tokens"] = score.nats, score.tokens
                record["utf8_bytes"] = score.utf8_bytes
                record["entropy_nats"] = histogram_entropy_nats(text.ids) if text.ids else 0.0
                record["repetition_4"] = repetition(text.ids, 4)
                features.append(judgement.features)
        found = [f for f in features if f.size]
        stacked = np.concatenate(found) if found else np.zeros((0, 0), dtype=np.float32)
        return Part(records, [t.text for t in texts], [t.ids for t in texts], stacked)

    def row(self, cell: Cell, parts: list[Part], others: list[Part], human: list[Part]) -> Row:
        """A cell's parts as a row of the report; fidelity is to other text of the same task."""
        records = [record for part in parts for record in part.records]
        texts = [text for part in parts for text in part.texts]
        ids = [row for part in parts for row in part.ids]
        pooled: dict[str, float] = {}
        if cell.task != "likelihood" and not cell.task.startswith("infilling"):
            with contextlib.suppress(ValueError):  # no sample of two tokens
                pooled["distinct_2"] = distinct(ids, 2)
            reference = others if cell.task == "unconditional" else human
            if cell.task == "unconditional" or cell.name != HUMAN:
                pooled |= _fidelity(parts, reference)
        excerpt = texts[0][:EXCERPT]
        return Row(
            cell.name,
            cell.kind,
            cell.task,
            cell.steps,
            cell.temperature,
            records,
            pooled,
            excerpt,
        )


_MAKERS = {
    "unconditional": Evaluation._write,
    "continuation": Evaluation._continue,
    "infilling": Evaluation._infill,
}


def evaluate(args: EvaluateArgs, progress: Progress | None = None) -> Report | None:
    """Judge models and write a report.

    Args:
        args: what to judge, and how.
        progress: told of every part that had to be made.

    Returns:
        The report; None in a process that is not the first of torchrun's.

    Raises:
        FsdfmError: settings, models, judge, held-out text or the output cannot be used.
    """
    args = args.resolved()
    workers = Workers.from_environment()
    device = pick_device(workers.device(args.device))
    with _undisturbed():
        evaluation = _prepare(args, device)
        cells = [evaluation.others(), *evaluation.cells()]
        parts = args.out / "parts"
        work = [(cell, group) for cell in cells for group in evaluation.groups(cell)]
        mine = [
            (cell, group, file)
            for number, (cell, group) in enumerate(work)
            if workers.mine(number) and _load(file := _file(parts, evaluation, cell, group)) is None
        ]
        done, total = 0, sum(len(group) for _, group, _ in mine)
        for cell, group, file in mine:
            _save(file, evaluation.part(cell, group))
            done += len(group)
            if progress is not None and workers.first:
                progress(_label(cell), done, total)
        workers.wait()
        report = _assemble(evaluation, cells, parts) if workers.first else None
        workers.wait()
        workers.leave()
    if report is not None:
        report.save(args.out / "report.json")
    return report


def _prepare(args: EvaluateArgs, device: torch.device) -> Evaluation:
    heldout = HeldOut.open(args.heldout)
    generators = {}
    for name, place in _names(args.model):
        generators[name] = load(place, device=device)
        generators[name].generate(steps=1)  # the first call is slow, and must not be timed
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(args.judge_dtype)
    judge = load_judge(args.judge or "", device=device, dtype=dtype or preferred_dtype(device))
    return Evaluation(args, generators, heldout, judge)


def _names(models: tuple[str, ...]) -> list[tuple[str, str | None]]:
    """Short names of the models: the last part of their paths, numbered where two are equal."""
    if not models:
        return [("bundled", None)]
    found: dict[str, str | None] = {}
    for model in models:
        base = name = Path(model).resolve().name or model
        number = 1
        while name in found:
            number += 1
            name = f"{base} ({number})"
        found[name] = model
    return list(found.items())


def _assemble(evaluation: Evaluation, cells: list[Cell], folder: Path) -> Report:
    """All parts as rows; the cell of other human text has none of its own."""
    loaded: list[tuple[Cell, list[Part]]] = []
    for cell in cells:
        found = []
        for group in evaluation.groups(cell):
            part = _load(_file(folder, evaluation, cell, group))
            found.append(part or evaluation.part(cell, group))
        loaded.append((cell, found))
    (_, others), *rest = loaded
    human = {cell.task: parts for cell, parts in rest if cell.name == HUMAN}
    rows = [evaluation.row(cell, parts, others, human.get(cell.task, [])) for cell, parts in rest]
    return Report(evaluation.facts(), rows)


def _fidelity(parts: list[Part], reference: list[Part]) -> dict[str, float]:
    """MAUVE over equally many segments, and n-gram divergences."""
    texts, others = ([t for part in side for t in part.texts] for side in (parts, reference))
    found = {}
    with contextlib.suppress(ValueError):  # no text at all has no n-grams
        found["js_byte_4_bits"] = ngram_js_bits(texts, others[: len(texts)], 4, "byte")
        found["js_word_1_bits"] = ngram_js_bits(texts, others[: len(texts)], 1, "word")
    p, q = (
        np.concatenate(
            [part.features for part in side if part.features.size] or [np.zeros((0, 1), np.float32)]
        )
        for side in (parts, reference)
    )
    count = min(len(p), len(q))
    if count >= FEWEST_SEGMENTS and p.shape[1] == q.shape[1]:
        found["mauve"] = mauve(p[:count], q[:count])
    return found


def _cost(sample: Sample, generator: Generator) -> Record:
    return {
        "seed": sample.seed,
        "generated_tokens": sample.tokens,
        "nfe": sample.nfe,
        "seconds": sample.tokens / sample.tokens_per_second,
    }


def _label(cell: Cell) -> str:
    steps = "" if cell.steps is None else f", {cell.steps} steps"
    heat = "" if cell.temperature in (None, 1.0) else f", temperature {cell.temperature:g}"
    return f"{cell.name}: {cell.task}{steps}{heat}"


def _file(folder: Path, evaluation: Evaluation, cell: Cell, group: range) -> Path:
    return folder / f"{evaluation.key(cell)}-{group.start}-{group.stop}.npz"


def _save(file: Path, part: Part) -> None:
    facts = {k: v for k, v in asdict(part).items() if k != "features"}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, facts=np.array(json.dumps(facts)), features=part.features)
    write_whole(file, buffer.getvalue())


def _load(file: Path) -> Part | None:
    """A part that was done; None where there is none, or it is damaged and must be done again."""
    try:
        with np.load(file, allow_pickle=False) as data:
            facts = json.loads(str(data["facts"]))
            return Part(facts["records"], facts["texts"], facts["ids"], data["features"])
    except Exception:  # a damaged archive raises many kinds
        return None


def _digest(generator: Generator) -> str:
    """Of the weights."""
    digest = hashlib.sha256(json.dumps(generator.config.to_dict(), sort_keys=True).encode())
    for parameter in generator.model.parameters():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave the global random states as they were."""
    state, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numbers)
