"""`fsdfm evaluate` and `fsdfm compare`, whole: figures, resume, several processes, refusals."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_fixtures import PROSE, save_heldout, save_judge, save_model
from PIL import Image
from processes import beside

from fsdfm.core.errors import ConfigError, FsdfmError
from fsdfm.eval import evaluation
from fsdfm.eval.cells import Cell, Cells, hidden_positions
from fsdfm.eval.evaluation import Parts
from fsdfm.eval.heldout import Blocks, HeldOut
from fsdfm.eval.judge import CausalJudge, load_judge
from fsdfm.eval.metrics import ngram_js_bits
from fsdfm.eval.report import Report, Row, load_report
from fsdfm.eval.settings import JudgeSettings
from fsdfm.eval.tables import markdown, section
from fsdfm.flow.loss import elbo_nats_per_token
from fsdfm.flow.path import UniformSource
from fsdfm.generate.generator import Generator
from fsdfm.generate.loading import load, load_with_network
from fsdfm.generate.options import DEFAULTS
from fsdfm.generate.source import load_source
from fsdfm.model.io.pretrained import load_pretrained, save_pretrained
from fsdfm.text.packing import prepare
from fsdfm.text.tokenizer import Tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge, two models and held-out text."""
    place = tmp_path_factory.mktemp("evaluation")
    (place / "judge").mkdir()
    save_judge(place / "judge", context=128)
    (place / "second").mkdir()
    save_judge(place / "second", context=96, seed=8)
    save_model(place / "teacher", step_embedding="none")
    save_model(place / "student", seed=6)
    save_heldout(place / "heldout.jsonl")
    return place


def arguments(place: Path, out: Path, **changes: Any) -> JudgeSettings:
    values: dict[str, Any] = {
        "out": out,
        "model": (str(place / "teacher"), str(place / "student")),
        "steps": ("1", "3:2"),
        "num_samples": 6,
        "judge": (str(place / "judge"),),
        "judge_dtype": "float32",
        "heldout": place / "heldout.jsonl",
    }
    return JudgeSettings(**values | changes)


def evaluate(args: JudgeSettings, progress: Any = None) -> Any:
    return evaluation.evaluate(args, load_source, progress)


@pytest.fixture(scope="module")
def report(place: Path) -> Report:
    tasks: Any = ("unconditional", "continuation", "infilling")
    found = evaluate(arguments(place, place / "whole", tasks=tasks, temperatures=(0.7, 1.0)))
    assert found is not None
    return found


def row(report: Report, name: str, task: str, steps: int | None = None, heat: float = 1.0) -> Row:
    (found,) = (
        r
        for r in report.rows
        if (r.name, r.task, r.steps) == (name, task, steps) and r.temperature in (None, heat)
    )
    return found


def test_there_is_a_row_for_every_model_task_budget_and_temperature(report: Report) -> None:
    tasks = ["unconditional"] + [
        f"{task}, {share}"
        for task in ("continuation", "infilling")
        for share in ("quarter", "half")
    ]
    assert report.tasks() == [*tasks, "likelihood"]
    generated = [r for r in report.rows if r.steps is not None]
    assert len(generated) == 2 * 5 * 2 * 2
    assert {len(r.records) for r in generated if r.steps == 1} == {6}
    assert {len(r.records) for r in generated if r.steps == 3} == {2}
    assert all(r["nfe"] == cell.steps for cell in generated for r in cell.records)
    references = [r.name for r in report.rows if r.kind == "reference"]
    assert references == [
        "human text",
        "human text, words shuffled",
        "random tokens",
        "human text",
        "human text",
    ]


@pytest.mark.parametrize(
    ("changes", "grids"),
    [
        ({}, ("even", "late")),
        ({"grid": "late"}, ("late", "late")),
        ({"preset": "paper"}, ("even", "even")),
        ({"preset": "paper", "grid": "late"}, ("late", "late")),
    ],
)
def test_the_grid_is_the_one_asked_for_else_the_models_own(
    changes: dict[str, Any], grids: tuple[str, str], place: Path, tmp_path: Path
) -> None:
    places = tmp_path / "teacher", tmp_path / "student"
    for name in places:
        shutil.copytree(place / name.name, name)
    (places[1] / "generation.json").write_text('{"grid": "late"}')
    sources = {p.name: load_source(str(p), CPU) for p in places}
    args = arguments(place, tmp_path / "out", length=48, **changes).resolved()
    cells = Cells(args, sources, HeldOut.open(place / "heldout.jsonl"))
    assert tuple(cells.models[name]["grid"] for name in ("teacher", "student")) == grids
    cell = next(c for c in cells.all() if (c.name, c.steps) == ("student", 3))
    assert cell.facts["grid"] == grids[1]


OWN = {
    **{"step": "euler", "movers": "independent", "grid": "late", "draws": 3, "seams": "random"},
    **{"top_p": 0.8, "top_k": 5, "min_p": 0.01, "repetition_penalty": 1.2},
}
"""Sampling options of a model, none of which is the usual one but movers."""


def test_all_sampling_options_of_a_model_are_facts_and_keys_of_its_texts(
    place: Path, tmp_path: Path
) -> None:
    model = save_model(tmp_path / "joint", neighbours=2, step_embedding="none")
    held = HeldOut.open(place / "heldout.jsonl")

    def cells(own: dict[str, Any], **changes: Any) -> Cells:
        (model / "generation.json").write_text(json.dumps(own))
        args = arguments(place, tmp_path / "out", length=48, **changes).resolved()
        return Cells(args, {"joint": load_source(str(model), CPU)}, held)

    def file(found: Cells) -> Path:
        cell = next(each for each in found.all() if (each.kind, each.steps) == ("model", 3))
        return Parts(tmp_path, {}).texts_file(cell, range(2))

    options = set(DEFAULTS) - {"steps", "temperature"}
    # euler cannot draw in groups, so each option but it goes with draws.
    own = {**OWN, "step": "exact"}
    assert set(own) == options
    assert cells(own).drawing("joint") == own
    assert cells(own).models["joint"].items() >= own.items()
    keys = [file(cells({}))] + [file(cells({n: v})) for n, v in OWN.items() if v != DEFAULTS[n]]
    assert len(set(keys)) == len(keys) == len(options)
    paper = cells(own, preset="paper").drawing("joint")
    plain = {name: DEFAULTS[name] for name in options}
    assert paper == {**plain, "step": "published", "seams": "random"}


def test_a_report_tells_of_sampling_options_that_are_not_the_usual_ones(
    report: Report, place: Path
) -> None:
    assert "top_k" not in markdown(report)
    values = json.loads((place / "whole" / "report.json").read_text())
    teacher, student = (values["facts"]["models"][name] for name in ("teacher", "student"))
    teacher["top_k"] = 5
    for name in ("top_k", "min_p", "repetition_penalty"):
        del student[name]  # as reports were before
    found = markdown(Report(values["facts"], report.rows))
    assert found.count(", top_k 5\n") == 1 and "min_p" not in found


def test_a_rule_that_cannot_draw_in_groups_is_refused_before_any_row_is_made(
    place: Path, tmp_path: Path, run: Run
) -> None:
    joint = save_model(tmp_path / "joint", neighbours=2, step_embedding="none")
    (joint / "generation.json").write_text('{"draws": 3}')
    held, names = HeldOut.open(place / "heldout.jsonl"), (place / "teacher", joint)
    sources = {p.name: load_source(str(p), CPU) for p in names}

    def cells(**changes: Any) -> Cells:
        args = arguments(place, tmp_path / "out", length=48, **changes).resolved()
        return Cells(args, sources, held)

    with pytest.raises(ConfigError, match="step=published cannot go with draws=3") as caught:
        cells(step="published")
    assert set(caught.value.fields) == {"step", "draws"}
    for fits in ({"step": "exact"}, {"step": "published", "draws": 1}, {"preset": "paper"}):
        assert cells(**fits).models["teacher"]["draws"] == 1  # it has no joint head
    words = ("evaluate", "--model", place / "teacher", "--model", joint, "--steps", "1")
    files = ("--judge", place / "judge", "--heldout", place / "heldout.jsonl")
    code, out, err = run(*words, *files, "--step", "published", "--out", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1) and "--draws 1" in err
    assert list((tmp_path / "out" / "parts").iterdir()) == []


def test_only_generated_tokens_are_counted_and_judged(report: Report) -> None:
    whole, rest = (
        row(report, "student", "unconditional", 1),
        row(report, "student", "continuation, half", 1),
    )
    hidden = row(report, "student", "infilling, quarter", 1)
    assert {r["generated_tokens"] for r in whole.records} == {48}
    assert {r["generated_tokens"] for r in rest.records} == {24}
    assert {r["generated_tokens"] for r in hidden.records} == {12}
    assert {r["hidden_tokens"] for r in hidden.records} == {12}
    assert all(0 <= r["right_tokens"] <= 12 for r in hidden.records)
    assert sum(r["utf8_bytes"] for r in rest.records) < 0.7 * sum(
        r["utf8_bytes"] for r in whole.records
    )


def test_the_figures_are_those_of_the_records(report: Report) -> None:
    found = row(report, "teacher", "unconditional", 1)
    nats, tokens, size = (
        np.array([r[k] for r in found.records]) for k in ("nats", "judge_tokens", "utf8_bytes")
    )
    value = {name: found.estimate(name) for name in ("ppl_pooled", "ppl_mean", "bits_per_byte")}
    assert value["ppl_pooled"].value == pytest.approx(np.exp(nats.sum() / tokens.sum()))
    assert value["ppl_mean"].value == pytest.approx(np.exp(nats / tokens).mean())
    assert value["bits_per_byte"].value == pytest.approx(nats.sum() / np.log(2) / size.sum())
    bits, in_nats = found.estimate("entropy_bits"), found.estimate("entropy_nats")
    assert bits.value == pytest.approx(in_nats.value / np.log(2))
    assert 0.0 < in_nats.value <= np.log(48)


def test_the_likelihood_row_is_the_bound_on_held_out_text(report: Report, place: Path) -> None:
    found = row(report, "teacher", "likelihood").estimate("elbo_nats_per_token")
    vocabulary = load_pretrained(place / "teacher").model.config.vocab_size
    assert found.value > np.log(vocabulary)  # random weights know nothing


def test_the_bound_of_each_block_is_the_one_computed_by_hand(report: Report, place: Path) -> None:
    generator, loaded = load_with_network(place / "student", device="cpu")
    network = loaded.model
    blocks = Blocks.cut(HeldOut.open(place / "heldout.jsonl"), generator.tokenizer, 48, seed=0)
    source = UniformSource(generator.config.vocab_size)

    class Precise:
        """The body in the generator's format, but logits in float32: losses near 0 need them."""

        def body(self, *inputs: torch.Tensor) -> torch.Tensor:
            with generator.autocast():
                return network.body(*inputs).float()

        def told(self, rows: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return rows

        def head_parameters(self) -> tuple[torch.Tensor, torch.Tensor]:
            return network.head_parameters()

    for k, record in enumerate(row(report, "student", "likelihood").records[:3]):
        x_1 = torch.tensor([blocks.human[k]])
        found = list(elbo_nats_per_token(Precise(), x_1, source, times=32, first=k))
        assert record["elbo_nats"] == pytest.approx(48 * sum(found) / len(found), rel=1e-6)
        assert record["elbo_bytes"] == len(generator.decode(blocks.human[k]).encode())


def test_fidelity_is_to_other_human_text_of_the_same_task(report: Report, place: Path) -> None:
    generator = load(place / "teacher", device="cpu")
    blocks = Blocks.cut(HeldOut.open(place / "heldout.jsonl"), generator.tokenizer, 48, seed=0)
    for task, prefix in (("unconditional", 0), ("continuation, half", 24)):
        human, others = (
            [generator.decode(ids[prefix:]) for ids in side[:6]]
            for side in (blocks.human, blocks.others)
        )
        found = row(report, "human text", task).pooled["js_byte_4_bits"]
        assert found == pytest.approx(ngram_js_bits(human, others, 4, "byte"), rel=1e-9)
    assert row(report, "student", "unconditional", 1).pooled.keys() >= {"js_word_1_bits"}
    assert row(report, "student", "unconditional", 3).pooled == {}  # two samples, not six


def test_a_report_comes_back_from_its_file(report: Report, place: Path) -> None:
    found = load_report(place / "whole")
    assert found == report
    figures = json.loads((place / "whole" / "report.json").read_text())["rows"][0]["figures"]
    assert figures["ppl_pooled"]["value"] == report.rows[0].estimate("ppl_pooled").value


def without_times(path: Path) -> Any:
    """report.json but for wall-clock and threads."""
    values = json.loads((path / "report.json").read_text())
    for found in values["rows"]:
        for record in found["records"]:
            record.pop("seconds", None)
            record.pop("threads", None)
        for name in ("seconds", "tokens_per_second"):
            found["figures"].pop(name, None)
    return values


WORKER = """
import sys
from fsdfm.cli import main as cli
from fsdfm.eval import evaluation
make = evaluation.Parts.make
def logged(self, cell, group):
    print(cell.label, group, file=sys.stderr)
    make(self, cell, group)
evaluation.Parts.make = logged
raise SystemExit(cli.main(sys.argv[1:]))
"""


def test_two_processes_share_the_work_and_give_the_report_of_one(
    place: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        *("evaluate", "--model", place / "student", "--steps", "1", "3:2", "--num-samples", "10"),
        *("--judge", place / "judge", "--judge", place / "second"),
        *("--heldout", place / "heldout.jsonl", "--tasks", "unconditional", "infilling"),
    ]
    made: list[str] = []
    make = Parts.make
    monkeypatch.setattr(
        Parts, "make", lambda s, c, g: made.append(f"{c.label} {g}") or make(s, c, g)
    )
    assert run(*words, "--out", tmp_path / "one")[0] == 0
    alone, both = made.copy(), [*words, "--out", tmp_path / "two"]
    made.clear()
    with beside(["-c", WORKER, *both]) as other:
        code, _, err = run(*both)
        assert code == 0, err
        said = other.communicate()[1]
    assert without_times(tmp_path / "one") == without_times(tmp_path / "two")
    shares = made, [line for line in said.splitlines() if line in set(alone)]
    assert sorted(shares[0] + shares[1]) == sorted(alone)
    assert abs(len(shares[0]) - len(shares[1])) <= 2  # one a judge


def test_what_is_done_is_not_done_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(place, tmp_path / "out", steps=("2",))

    def stop_after_three(what: str, done: int, total: int) -> None:
        if done >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(args, stop_after_three)
    assert not (tmp_path / "out" / "report.json").exists()
    kept = sorted((tmp_path / "out" / "parts").glob("judged-*"))
    assert 3 <= len(kept) <= 4
    kept[0].write_bytes(b"cut short")  # a damaged part is made again

    made = []
    make = Parts.make
    monkeypatch.setattr(Parts, "make", lambda s, c, g: made.append(g) or make(s, c, g))
    whole = evaluate(args)
    everything = len(list((tmp_path / "out" / "parts").glob("texts-*")))
    assert len(made) == everything - len(kept) + 1
    made.clear()
    again = evaluate(args)
    assert made == []
    assert again == whole


def judges(place: Path, *names: str) -> dict[str, Any]:
    return {"judge": tuple(str(place / name) for name in names)}


def test_each_of_several_judges_says_what_it_says_alone(place: Path, tmp_path: Path) -> None:
    both = evaluate(arguments(place, tmp_path / "both", **judges(place, "judge", "second")))
    names = [str(place / name) for name in ("judge", "second")]
    assert [judge["name"] for judge in both.judges] == names
    for name in names:
        alone = evaluate(arguments(place, tmp_path / name.rpartition("/")[2], judge=(name,)))
        found = both.only({name: name})
        assert found.facts == alone.facts
        for row, other in zip(found.rows, alone.rows, strict=True):
            assert (row.name, row.setting, row.pooled) == (other.name, other.setting, other.pooled)
            for a, b in zip(row.records, other.records, strict=True):
                assert {k: v for k, v in a.items() if k != "seconds"} == {
                    k: v for k, v in b.items() if k != "seconds"
                }
    assert load_report(tmp_path / "both") == both


def test_a_second_judge_reads_the_texts_that_the_first_one_read(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    generate = Generator.generate
    monkeypatch.setattr(
        Generator, "generate", lambda self, **k: made.append(k) or generate(self, **k)
    )
    told = []
    args = arguments(place, tmp_path / "a", **judges(place, "judge", "second"))
    evaluate(args, lambda *progress: told.append(progress))
    several = len(made)
    texts, judgements = kept(tmp_path / "a")
    made.clear()
    evaluate(arguments(place, tmp_path / "b"))
    assert several == len(made) > 0
    one_text, one_judgement = kept(tmp_path / "b")
    assert texts == one_text and len(judgements) == 2 * len(one_judgement)
    assert [done for _, done, _ in told][-1] == told[0][2] == told[-1][2]  # foreseen from the start
    assert told[-1][0].startswith(str(place / "second") + ": ")

    # A judge that comes later, to texts that are there already.
    made.clear()
    evaluate(arguments(place, tmp_path / "b", **judges(place, "judge", "second")))
    assert len(made) == 2  # the two models' first calls, which are never timed
    assert kept(tmp_path / "b") == (texts, judgements)


def test_a_judge_under_another_name_has_judged_already(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "judge", tmp_path / "renamed")
    change: Any = {"num_samples": 2, "steps": ("1",)}
    evaluate(arguments(place, tmp_path / "out", **change))
    before = kept(tmp_path / "out")
    evaluate(arguments(place, tmp_path / "out", judge=(str(tmp_path / "renamed"),), **change))
    assert kept(tmp_path / "out") == before


def test_several_judges_go_on_where_they_stopped(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(place, tmp_path / "out", **judges(place, "judge", "second"))

    def stop_in_the_second(what: str, done: int, total: int) -> None:
        if what.startswith(str(place / "second")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(args, stop_in_the_second)
    _, before = kept(tmp_path / "out")
    made = []
    make = Parts.make
    monkeypatch.setattr(Parts, "make", lambda s, c, g: made.append(g) or make(s, c, g))
    found = evaluate(args)
    _, after = kept(tmp_path / "out")
    assert len(made) == len(after) - len(before) == len(after) // 2 - 1
    made.clear()
    assert evaluate(args) == found and made == []


def test_one_judge_is_in_memory_at_a_time(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks: list[weakref.ref[Any]] = []

    def loaded(*args: Any, **options: Any) -> CausalJudge:
        assert all(network() is None for network in networks)
        judge = load_judge(*args, **options)
        networks.append(weakref.ref(judge.model))
        return judge

    monkeypatch.setattr(evaluation, "load_judge", loaded)
    evaluate(arguments(place, tmp_path / "out", num_samples=2, **judges(place, "judge", "second")))
    assert len(networks) == 2


def test_a_report_knows_what_its_models_descend_from(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "judge", tmp_path / "SmolLM2-135M")
    start = load_pretrained(place / "student")
    for name, ancestors in (("child", ("SmolLM2-135M",)), ("orphan", ())):
        save_pretrained(
            tmp_path / name, start.model, tokenizer_json=start.tokenizer_json, ancestors=ancestors
        )
    change: Any = {"judge": (str(tmp_path / "SmolLM2-135M"),), "num_samples": 2, "steps": ("1",)}
    model = (str(tmp_path / "child"), str(tmp_path / "orphan"))
    found = evaluate(arguments(place, tmp_path / "out", model=model, **change))
    assert found.facts["models"]["child"]["ancestors"] == ["SmolLM2-135M"]
    assert "ancestors" not in found.facts["models"]["orphan"]
    assert found.facts["judge"]["model"] == "SmolLM2-135M"
    assert "is an ancestor of child: its figures flatter it" in "\n".join(
        section(found, "unconditional")
    )
    # Texts do not depend on it: equal weights have equal parts.
    texts, _ = kept(tmp_path / "out")
    assert len(texts) == 6


def kept(out: Path) -> tuple[set[str], set[str]]:
    """Names of the kept texts and judgements."""
    names = {p.name for p in (out / "parts").iterdir()}
    return {n for n in names if n.startswith("texts")}, {n for n in names if n.startswith("judged")}


@pytest.mark.parametrize(
    ("change", "same_texts"),
    # One model: others, human, shuffled, random, generated and likelihood are six texts.
    [
        ({"seed": 1}, 0),
        ({"length": 40}, 0),
        ({"batch_size": 5}, 0),
        ({"step": "published"}, 5),
        ({"temperatures": (0.9,)}, 5),
        ({"steps": ("3",)}, 5),
        ({"heldout": "other"}, 0),
        ({"judge": "other"}, 6),
        ({"model": "other"}, 4),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_only_what_depends_on_a_setting_is_done_again(
    place: Path, tmp_path: Path, change: Any, same_texts: int
) -> None:
    out = tmp_path / "out"
    model = tmp_path / "model"
    shutil.copytree(place / "teacher", model)
    shutil.copytree(place / "judge", tmp_path / "judge")
    shutil.copy(place / "heldout.jsonl", tmp_path / "heldout.jsonl")
    settings: Any = {
        "steps": ("2",),
        "num_samples": 2,
        "model": (str(model),),
        "judge": (str(tmp_path / "judge"),),
        "heldout": tmp_path / "heldout.jsonl",
    }
    evaluate(arguments(place, out, **settings))
    texts, judgements = kept(out)
    assert (len(texts), len(judgements)) == (6, 5)
    # The same places with another content, so that a name alone would not tell.
    if change == {"heldout": "other"}:
        with (tmp_path / "heldout.jsonl").open("a") as file:
            file.write(json.dumps({"text": "One more document."}) + "\n")
    elif change == {"judge": "other"}:
        save_judge(tmp_path / "judge", context=128, seed=4)
    elif change == {"model": "other"}:
        save_model(model, step_embedding="none", seed=9)
    else:
        settings |= change
    evaluate(arguments(place, out, **settings))
    more_texts, more_judgements = kept(out)
    assert len(more_texts) == 6 + 6 - same_texts
    judged_again = 5 if same_texts in (0, 6) else 1
    assert len(more_judgements) == 5 + judged_again


def test_evaluation_leaves_files_and_random_states_alone(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Parts.make

    def careless(self: Parts, cell: Cell, group: range) -> None:
        torch.rand(1), random.random(), np.random.random()
        make(self, cell, group)

    monkeypatch.setattr(Parts, "make", careless)
    weights = (place / "student" / "model.safetensors").read_bytes()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    evaluate(arguments(place, tmp_path / "out", num_samples=2))
    assert (place / "student" / "model.safetensors").read_bytes() == weights
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


def texts_of(report: Report, out: Path, name: str, task: str) -> list[dict[str, Any]]:
    """Kept groups whose records are those of a row."""
    wanted = [r.get("seconds", r["nats"]) for r in row(report, name, task, 1).records]
    found = []
    for file in sorted((out / "parts").glob("texts-*.json")):
        group = json.loads(file.read_text())
        if all(r.get("seconds") in wanted for r in group["records"]):
            found.append(group)
    return found


def test_right_tokens_are_counted_against_the_original(report: Report, place: Path) -> None:
    tokenizer = Tokenizer.from_file(place / "teacher" / "tokenizer.json")
    blocks = Blocks.cut(HeldOut.open(place / "heldout.jsonl"), tokenizer, 48, seed=0)
    groups = texts_of(report, place / "whole", "student", "infilling, half")
    checked = 0
    for group in groups:
        for ids, record in zip(group["ids"], group["records"], strict=True):
            k = record["seed"]
            hidden = hidden_positions(48, 0.5, 0, k)
            original = np.array(blocks.human[k])
            assert np.array_equal(np.array(ids)[~hidden], original[~hidden])
            assert record["right_tokens"] == (np.array(ids) == original)[hidden].sum()
            checked += 1
    assert checked == 6


def test_a_continuation_is_judged_after_its_prefix(report: Report, place: Path) -> None:
    tokenizer = Tokenizer.from_file(place / "teacher" / "tokenizer.json")
    blocks = Blocks.cut(HeldOut.open(place / "heldout.jsonl"), tokenizer, 48, seed=0)
    judge = load_judge(str(place / "judge"), device=torch.device("cpu"), dtype=torch.float32)
    (first, *_) = texts_of(report, place / "whole", "student", "continuation, half")
    assert first["prefixes"][0] == tokenizer.decode(blocks.human[0][:24])
    assert first["texts"][0] == tokenizer.decode(first["ids"][0])
    (found,) = judge.judge(first["texts"][:1], first["prefixes"][:1])
    record = row(report, "student", "continuation, half", 1).records[0]
    assert record["nats"] == pytest.approx(found.score.nats, rel=1e-5)
    (alone,) = judge.judge(first["texts"][:1])
    assert alone.score.nats != pytest.approx(found.score.nats, rel=1e-4)
    assert record["judge_tokens"] == found.score.tokens


def test_shuffled_words_are_the_same_words_in_another_order(report: Report, place: Path) -> None:
    names = ("human text", "human text, words shuffled")
    human, shuffled = (row(report, name, "unconditional").excerpt.split() for name in names)
    assert sorted(human[1:-1]) != human[1:-1] != shuffled[1:-1]
    assert sorted(human) == sorted(shuffled)


def test_seconds_are_the_samples_shares_of_the_wall_clock(place: Path, tmp_path: Path) -> None:
    model = (str(place / "student"),)
    args = arguments(place, tmp_path / "out", model=model, steps=("40",), batch_size=4)
    began = time.perf_counter()
    found = evaluate(args)
    whole = time.perf_counter() - began
    spent = sum(r["seconds"] for r in row(found, "student", "unconditional", 40).records)
    assert 0.001 * whole < spent < whole


def test_human_and_other_text_share_no_block(place: Path) -> None:
    tokenizer = Tokenizer.from_file(place / "teacher" / "tokenizer.json")
    blocks = Blocks.cut(HeldOut.open(place / "heldout.jsonl"), tokenizer, 16, seed=3)
    stream = [tuple(b) for b in blocks.human + blocks.others]
    assert len(blocks.human) == len(blocks.others) > 20
    again = Blocks.cut(HeldOut.open(place / "heldout.jsonl"), tokenizer, 16, seed=3)
    assert again == blocks
    assert Blocks.cut(HeldOut.open(place / "heldout.jsonl"), tokenizer, 16, seed=4) != blocks
    assert len(stream) - len(set(stream)) < 3  # the prose itself repeats; blocks do not


def test_held_out_text_may_be_a_prepared_directory(place: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(place / "teacher" / "tokenizer.json")
    (tmp_path / "text.txt").write_text(PROSE)
    prepare([tmp_path / "text.txt"], tmp_path / "data", tokenizer=tokenizer)
    (document,) = HeldOut.open(tmp_path / "data").documents
    assert PROSE.endswith(document)


def test_the_bundled_held_out_text_is_there() -> None:
    documents = HeldOut.open(None).documents
    assert sum(map(len, documents)) > 300_000


def test_an_autoregressive_models_texts_can_stand_beside(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "gpt.jsonl"
    file.write_text(json.dumps({"text": PROSE[:400]}) + "\n" + json.dumps({"text": PROSE[9:500]}))
    found = evaluate(
        arguments(place, tmp_path / "out", num_samples=2, reference=(f"GPT={file}",), steps=("1",))
    )
    given = row(found, "GPT", "unconditional")
    assert len(given.records) == 2
    assert given.records[0]["nats"] > 0.0


def test_the_papers_protocol_is_a_preset(place: Path) -> None:
    args = JudgeSettings(out=place, preset="paper", judge=("mine",)).resolved()
    assert args.length == 1024 and args.step == "published" and args.judge == ("mine",)
    assert args.budgets() == [(n, 16) for n in (1, 2, 4, 8, 16, 1024)]
    assert JudgeSettings(out=place).resolved().step is None


Run = Callable[..., tuple[int, str, str]]


def test_the_command_prints_a_table_and_writes_report_and_plots(
    place: Path, tmp_path: Path, run: Run
) -> None:
    out = tmp_path / "out"
    code, printed, noted = run(
        *("evaluate", "--model", place / "teacher", "--model", place / "student"),
        *("--steps", "1", "2", "--num-samples", "2", "--temperatures", "0.8", "1"),
        *("--judge", place / "judge", "--heldout", place / "heldout.jsonl", "--out", out),
    )
    assert code == 0, noted
    assert "| student | 2 | 0.8 | 2 |" in printed
    text = (out / "report.md").read_text()
    for name in ("ppl_pooled", "quality_nfe.png", "human text, words shuffled", "ELBO", "student"):
        assert name.lower() in text.lower()
    for name in ("quality_nfe", "quality_entropy", "quality_seconds"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")

    code, printed, _ = run("compare", out, "--out", tmp_path / "compare.md")
    assert code == 0
    assert "## Against teacher" in printed and "## At equal entropy: unconditional" in printed
    assert (tmp_path / "compare.md").read_text() in printed


def test_the_command_shows_every_judge(place: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    flags = [w for name in ("judge", "second") for w in ("--judge", place / name)]
    code, printed, noted = run(
        *("evaluate", "--model", place / "student", "--steps", "1", "--num-samples", "2"),
        *(*flags, "--heldout", place / "heldout.jsonl", "--out", out),
    )
    assert code == 0, noted
    for name in ("judge", "second"):
        assert f"| ppl_pooled ({place / name}) |" in printed
    image = Image.open(out / "quality_nfe.png")
    assert image.width > 2 * image.height  # two panels
    code, printed, _ = run("compare", out)
    assert code == 0 and f"| bits_per_byte ({place / 'second'}) |" in printed


def test_a_later_judge_that_cannot_load_is_refused_before_anything_is_made(
    place: Path, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for name, says in ((tmp_path / "broken", "Cannot load"), ("/no/judge", "There is no")):
        code, out, err = run(
            *("evaluate", "--model", place / "student", "--steps", "1", "--out", tmp_path / "out"),
            *("--judge", place / "judge", "--judge", name),
            *("--heldout", place / "heldout.jsonl"),
        )
        assert (code, out, err.count("\n")) == (2, "", 1) and says in err
    assert list((tmp_path / "out" / "parts").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--steps", "0"), "--steps takes whole numbers"),
        (("--steps", "8:x"), "--steps takes whole numbers"),
        (("--steps", "2", "2:1"), "--steps names a budget twice"),
        (("--num-samples", "0"), "--num-samples must be a whole number >= 1"),
        (("--length", "0"), "--length must be a whole number >= 1"),
        (("--seed", "-1"), "--seed must be a whole number from 0"),
        (("--temperatures", "nan"), "--temperatures must be in [0, 1000]"),
        (("--temperatures", "-1"), "--temperatures must be in [0, 1000]"),
        (("--out", "/dev/null/x"), "Cannot write /dev/null/x"),
        (("--length", "49"), "more than a model's context of 48"),
        (("--heldout", "nothing.txt"), "nothing.txt"),
        (("--reference", "GPT"), "NAME=FILE"),
        (("--reference", "human text=x.txt"), "Two rows would be called 'human text'"),
        (("--judge", "/no/judge"), "There is no directory /no/judge"),
        (("--judge", "a", "--judge", "a"), "--judge names one twice: a a"),
        (("--model", "/no/model"), "/no/model"),
        (("--tasks", "infilling", "--num-samples", "500"), "ask for at most"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    place: Path, tmp_path: Path, run: Run, words: tuple[str, ...], says: str
) -> None:
    flags = {
        "--model": str(place / "student"),
        "--steps": "1",
        "--judge": str(place / "judge"),
        "--heldout": str(place / "heldout.jsonl"),
        "--out": str(tmp_path / "out"),
    }
    given = [w for flag, value in flags.items() if flag not in words for w in (flag, value)]
    code, out, err = run("evaluate", *given, *words)
    assert (code, out) == (2, "")
    assert says in err and err.count("\n") == 1


def test_a_full_disk_is_one_line_and_leaves_no_half_file(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)  # as the disk fills up
    with pytest.raises(FsdfmError, match="No space left") as caught:
        evaluate(arguments(place, tmp_path / "out", num_samples=2))
    assert "\n" not in str(caught.value)
    assert not any(p.is_file() for p in tmp_path.rglob("*"))


def test_two_evaluations_do_not_share_a_directory(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(place, tmp_path / "out", num_samples=2, steps=("1",))
    refused: list[str] = []
    make = Parts.make

    def second(self: Parts, cell: Cell, group: range) -> None:
        if not refused:
            with pytest.raises(FsdfmError) as caught:
                evaluate(args)
            refused.append(str(caught.value))
        make(self, cell, group)

    monkeypatch.setattr(Parts, "make", second)
    evaluate(args)
    assert refused[0].startswith(f"{args.out} is being written by process {os.getpid()}:")
    assert not (args.out / "parts" / ".lock").exists()


def test_no_character_is_cut_where_a_continuation_begins(place: Path, tmp_path: Path) -> None:
    """Held-out text of two-byte characters, each two tokens, in blocks that begin within one."""
    text = "x" + "é" * 400
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"text": text}))
    (tmp_path / "other.txt").write_text(text)
    student = load_source(str(place / "student"), CPU)
    generator = student.generator
    assert len(generator.tokenizer.encode(text)) == 801
    args = arguments(
        place,
        tmp_path / "out",
        tasks=("continuation", "unconditional"),
        length=38,  # a quarter is 9 tokens
        reference=(f"other={tmp_path / 'other.txt'}",),
    ).resolved()
    sources = {"student": student}
    cells = Cells(args, sources, HeldOut.open(tmp_path / "heldout.jsonl"))
    seen = 0
    for cell in cells.all():
        if cell.name == "human text" or cell.name == "other":
            for sample in cell.make(range(cell.count)):
                assert "\ufffd" not in sample.prefix + sample.text
                assert 17 <= len(sample.prefix + sample.text) <= 20
                seen += 1
        elif cell.task == "continuation, quarter" and cell.kind == "model":
            human = cells.blocks["student"].human
            for sample, ids in zip(cell.make(range(cell.count)), human, strict=False):
                cut = 38 - len(sample.ids)
                assert cut in (8, 9)
                assert "\ufffd" not in sample.prefix
                assert generator.decode(ids[:cut]).strip("\ufffd") == sample.prefix
                assert sample.record["generated_tokens"] == len(sample.ids)
                seen += 1
        elif cell.task == "likelihood":
            assert {t.record["elbo_bytes"] for t in cell.make(range(2))} <= {36, 37, 38}
            seen += 1
    assert seen > 20
