"""`fsdfm evaluate`: models, held-out text and a judge meet; what is done is kept and found again.

Each group of samples is kept in two files of OUT/parts: its texts, which depend on no judge, and
what the judge said of them.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fsdfm.core.device import pick_device, preferred_dtype
from fsdfm.core.errors import ConfigError, DataError
from fsdfm.core.files import digest, one_line, write_whole
from fsdfm.core.lock import locked
from fsdfm.core.progress import Progress
from fsdfm.core.workers import Workers, own_device
from fsdfm.eval.cells import HUMAN, OTHERS, Cell, Cells, Text, samples_of
from fsdfm.eval.heldout import HeldOut
from fsdfm.eval.judge import Judge, load_judge, require_judge
from fsdfm.eval.mauve import mauve
from fsdfm.eval.metrics import distinct, histogram_entropy_nats, ngram_js_bits, repetition
from fsdfm.eval.report import JUDGED, Opinion, Record, Report, Row
from fsdfm.eval.settings import JudgeSettings
from fsdfm.eval.source import Load

EVALUATION = 5
"""Part of every key: raise it when what a part holds, or how it is made, changes."""
FEWEST_SEGMENTS = 80
"""MAUVE of fewer feature vectors (8 clusters) is noise."""
EXCERPT = 400
"""Characters of the first sample that a report shows."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A group of samples with what the judge said."""

    texts: list[Text]
    records: list[Record]
    features: NDArray[np.float32]
    """Feature vectors of all samples, shape (segments, D)."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Where groups are kept.

    Args:
        folder: OUT/parts.
        facts: of the judge whose judgements they are.
        judge: itself, while it is loaded; without it nothing can be judged.
    """

    folder: Path
    facts: dict[str, Any]
    judge: Judge | None = None

    def texts_file(self, cell: Cell, group: range) -> Path:
        """Texts of a group."""
        return self.folder / f"texts-{_key(cell.facts)}-{group.start}-{group.stop}.json"

    def judged_file(self, cell: Cell, group: range) -> Path:
        """Judgements of a group: of these texts, by this judge under whatever name."""
        facts = {k: v for k, v in self.facts.items() if k not in ("name", "model")}
        key = f"{_key(cell.facts)}-{_key(facts)}"
        return self.folder / f"judged-{key}-{group.start}-{group.stop}.npz"

    def find(self, cell: Cell, group: range) -> Judged | None:
        """What was done of a group; None if it is not all there, or damaged."""
        texts = self._texts(cell, group)
        if texts is None:
            return None
        if not cell.judged:
            return Judged(texts, [t.record for t in texts], np.zeros((0, 0), np.float32))
        try:
            with np.load(self.judged_file(cell, group), allow_pickle=False) as data:
                records = json.loads(str(data["records"]))
                return Judged(texts, records, data["features"])
        except Exception:  # a damaged archive raises many kinds
            return None

    def make(self, cell: Cell, group: range) -> None:
        """Do what is missing of a group, and keep it."""
        texts = self._texts(cell, group)
        if texts is None:
            texts = cell.make(group)
            kept = json.dumps(samples_of(texts), ensure_ascii=False)
            write_whole(self.texts_file(cell, group), kept)
        if cell.judged:
            assert self.judge is not None
            records, features = judged(self.judge, texts)
            buffer = io.BytesIO()
            np.savez_compressed(buffer, records=np.array(json.dumps(records)), features=features)
            write_whole(self.judged_file(cell, group), buffer.getvalue())

    def _texts(self, cell: Cell, group: range) -> list[Text] | None:
        try:
            kept = json.loads(self.texts_file(cell, group).read_text(encoding="utf-8"))
            columns = (kept[name] for name in ("texts", "ids", "records", "prefixes"))
            return [Text(*row) for row in zip(*columns, strict=True)]
        except (OSError, ValueError, KeyError, TypeError):
            return None


def judged(judge: Judge, texts: list[Text]) -> tuple[list[Record], NDArray[np.float32]]:
    """Complete records of some texts, and their feature vectors, shape (segments, D)."""
    records, features = [], []
    judgements = judge.judge([t.text for t in texts], [t.prefix for t in texts])
    for text, judgement in zip(texts, judgements, strict=True):
        score = judgement.score
        records.append(
            text.record
            | {
                "nats": score.nats,
                "judge_tokens": score.tokens,
                "utf8_bytes": score.utf8_bytes,
                "entropy_nats": histogram_entropy_nats(text.ids) if text.ids else 0.0,
                "repetition_4": repetition(text.ids, 4),
            }
        )
        if judgement.features.size:
            features.append(judgement.features)
    return records, np.concatenate(features) if features else np.zeros((0, 0), np.float32)


def evaluate(args: JudgeSettings, load: Load, progress: Progress | None = None) -> Report | None:
    """Judge models and write report.json.

    Args:
        args: what to judge, and how.
        load: how a model is loaded, e.g. `fsdfm.generate.source.load_source`.
        progress: told of every group that had to be made.

    Returns:
        The report; None in a process that is not the first of torchrun's.

    Raises:
        FsdfmError: settings, models, judge, held-out text or the output cannot be used.
    """
    args = args.resolved()
    folder = _claim(args.out)
    with Workers.joined() as workers, _alone(folder, args.out, workers):
        device = pick_device(own_device(args.device))
        with _undisturbed(device):
            for name in args.judge:
                require_judge(name)
            cells = _prepare(args, device, load)
            planned = list(cells.all())
            work = [(cell, group) for cell in planned for group in cell.groups(cells.group)]
            mine = [pair for number, pair in enumerate(work) if workers.mine(number)]
            told = progress if workers.first else None
            judges = [*_judges(args, device, folder, mine, told)]
            workers.wait()
            report = _assemble(cells, planned, judges) if workers.first else None
        if report is not None:
            report.save(args.out / "report.json")
        workers.wait()
    return report


def _claim(out: Path) -> Path:
    """The folder of parts, made before anything is loaded or computed."""
    try:
        (out / "parts").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"Cannot write {out} ({one_line(error)}): choose another out.", "out"
        ) from None
    return out / "parts"


def _judges(
    args: JudgeSettings,
    device: torch.device,
    folder: Path,
    work: list[tuple[Cell, range]],
    progress: Progress | None,
) -> Iterator[Parts]:
    """Do what is missing of the work, under one judge after the other; one is in memory at a time.

    The first finds or makes the texts, the later ones read them.

    Args:
        work: groups of this process.
        progress: told of every group; of later judges all is presumed to be missing.

    Yields:
        What is kept of each judge, to be read.
    """
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(args.judge_dtype)
    whole, done = sum(len(group) for cell, group in work if cell.judged), 0
    for number, name in enumerate(args.judge):
        judge: Judge = load_judge(name, device=device, dtype=dtype or preferred_dtype(device))
        parts = Parts(folder, judge.facts, judge)
        missing = [(cell, group) for cell, group in work if parts.find(cell, group) is None]
        total = done + sum(len(group) for _, group in missing)
        total += (len(args.judge) - 1 - number) * whole
        for cell, group in missing:
            _make(parts, cell, group)
            done += len(group)
            if progress is not None:
                progress(f"{name}: {cell.label}" if number else cell.label, done, total)
        yield Parts(folder, parts.facts)
        del judge, parts
        gc.collect()  # networks of the library are knots of references


@contextlib.contextmanager
def _alone(folder: Path, out: Path, workers: Workers) -> Iterator[None]:
    """Keep other commands out of the folder while the first process of this one is at work."""
    with contextlib.ExitStack() as stack:
        if workers.first:
            try:
                stack.enter_context(locked(folder / ".lock", out))
            except OSError as error:
                raise DataError(
                    f"Cannot write {folder} ({one_line(error)}): choose another out.", "out"
                ) from None
        yield


def _make(parts: Parts, cell: Cell, group: range) -> None:
    try:
        parts.make(cell, group)
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"Not enough memory for {cell.label}: take a smaller batch_size or length, or the "
            "device cpu.",
            "batch_size",
            "length",
            "device",
        ) from None


def _prepare(args: JudgeSettings, device: torch.device, load: Load) -> Cells:
    """What can be refused is refused here, before anything is made."""
    heldout = HeldOut.open(args.heldout)
    sources = {name: load(place, device, args.precision) for name, place in _names(args.model)}
    cells = Cells(args, sources, heldout)
    for name in args.judge:
        require_judge(name)
    for name, source in sources.items():  # the first call is slow, and must not be timed
        options = cells.drawing(name) | {"num_samples": args.batch_size}
        source.generate(steps=1, length=cells.length, batch_size=args.batch_size, **options)
    return cells


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


def _assemble(cells: Cells, planned: list[Cell], judges: list[Parts]) -> Report:
    """All groups as rows."""
    loaded = [(cell, [_all(cells, cell, parts) for parts in judges]) for cell in planned]
    others = {cell.task: seen for cell, seen in loaded if cell.name == OTHERS}
    sizes = {cell.task: cell.count for cell, _ in loaded if cell.name == HUMAN}
    names = [parts.facts["name"] for parts in judges]
    rows = []
    for cell, seen in loaded:
        if cell.name != OTHERS:
            # Pooled figures depend on the size, so only rows of the human row's size have them.
            same_size = cell.count == sizes.get(cell.task)
            against = others[cell.task] if same_size else [[] for _ in judges]
            row = _row(cell, seen[0], against[0])
            if cell.judged:
                rest = zip(names[1:], seen[1:], against[1:], strict=True)
                row.others.update((name, _opinion(*sides)) for name, *sides in rest)
            rows.append(row)
    return Report(_facts(cells, judges), rows)


def _all(cells: Cells, cell: Cell, parts: Parts) -> list[Judged]:
    """The groups of a cell.

    Raises:
        DataError: one is missing.
    """
    found = [parts.find(cell, group) for group in cell.groups(cells.group)]
    if None in found:
        raise DataError(
            f"{parts.folder} lacks a part of {cell.label}: all processes must share the file "
            "system and the kind of device; run the same command again."
        )
    return [group for group in found if group is not None]


def _row(cell: Cell, groups: list[Judged], others: list[Judged]) -> Row:
    """A row as the first judge sees it."""
    texts = [text for group in groups for text in group.texts]
    pooled: dict[str, float] = {}
    if others:
        with contextlib.suppress(ValueError):  # no sample of two tokens
            pooled["distinct_2"] = distinct([t.ids for t in texts], 2)
        pooled |= _fidelity(groups, others) | _mauve(groups, others)
    return Row(
        cell.name,
        cell.kind,
        cell.task,
        cell.steps,
        cell.temperature,
        [record for group in groups for record in group.records],
        pooled,
        texts[0].text[:EXCERPT],
    )


def _opinion(groups: list[Judged], others: list[Judged]) -> Opinion:
    """What a further judge says of a row."""
    records = [record for group in groups for record in group.records]
    return Opinion([{k: r[k] for k in JUDGED} for r in records], _mauve(groups, others))


def _fidelity(groups: list[Judged], others: list[Judged]) -> dict[str, float]:
    """N-gram divergences from equally many texts."""
    texts, reference = ([t.text for g in side for t in g.texts] for side in (groups, others))
    count = min(len(texts), len(reference))
    found = {}
    with contextlib.suppress(ValueError):  # no text at all has no n-grams
        found["js_byte_4_bits"] = ngram_js_bits(texts[:count], reference[:count], 4, "byte")
        found["js_word_1_bits"] = ngram_js_bits(texts[:count], reference[:count], 1, "word")
    return found


def _mauve(groups: list[Judged], others: list[Judged]) -> dict[str, float]:
    """MAUVE against equally many segments, where there are enough."""
    p, q = (
        np.concatenate([g.features for g in side if g.features.size] or [np.zeros((0, 1), "f4")])
        for side in (groups, others)
    )
    count = min(len(p), len(q))
    return {"mauve": mauve(p[:count], q[:count])} if count >= FEWEST_SEGMENTS else {}


def _facts(cells: Cells, judges: list[Parts]) -> dict[str, Any]:
    """What the rows of a report share."""
    args = cells.args
    first, *others = (parts.facts for parts in judges)
    descent = {
        name: {"ancestors": list(source.ancestors)} if source.ancestors else {}
        for name, source in cells.sources.items()
    }
    return {
        "fsdfm": importlib.metadata.version("fsdfm"),
        "torch": torch.__version__,
        "machine": cells.models[cells.first]["device"],
        "length": cells.length,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "preset": args.preset,
        "judge": first,
        **({"other_judges": others} if others else {}),
        "heldout": {
            "name": cells.heldout.name,
            "sha256": cells.heldout.sha256,
            "blocks": 2 * len(cells.blocks[cells.first].human),
        },
        "models": {name: facts | descent[name] for name, facts in cells.models.items()},
    }


def _key(facts: dict[str, Any]) -> str:
    """Facts in short."""
    text = json.dumps({"evaluation": EVALUATION, **facts}, sort_keys=True)
    return digest([text])[:16]


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Leave the global random states as they were."""
    state, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numbers)
