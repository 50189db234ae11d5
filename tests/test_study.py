"""The study: equal compute, one search for all, matched entropy, and a whole run at a toy size."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluation_fixtures import save_heldout, save_judge, save_model
from safetensors.torch import load_file
from scripts import script
from torch import Tensor

from fsdfm.core.errors import ConfigError
from fsdfm.study import curve
from fsdfm.study import protocol as protocols
from fsdfm.study.chain import ExactConditionals
from fsdfm.study.languages import KnownLaw, Prose, at_entropy, standard_error
from fsdfm.study.limits import Drawer, drawer, kept_marginals, limits
from fsdfm.study.protocol import Protocol, Study, append, read
from fsdfm.study.recipes import RECIPES, Recipe
from fsdfm.study.tables import tables
from fsdfm.study.training import Choice, known_law, student
from fsdfm.text.packing import prepare
from fsdfm.text.settings import PrepareSettings
from fsdfm.text.tokenizer import Tokenizer
from fsdfm.train import loop

FEW = {"budget": 12, "search_budget": 6, "calls": (1, 2), "many": 4}


@pytest.fixture(autouse=True)
def _brief_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which every run does one in the end."""
    monkeypatch.setattr(loop, "VALIDATION_TIMES", 1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run of a teacher of the known law."""
    run = tmp_path_factory.mktemp("known") / "teacher"
    known_law(run, steps=2)
    return run


def test_recipes_spend_the_same_compute() -> None:
    # Path rows: forward 1, backward 2. Others: the same, and the target's evaluations.
    assert Recipe(target="rk4").updates(600) == 100  # a quarter of the rows: 3 + .75 * 4
    assert Recipe(target="semigroup").updates(900) == 200
    assert Recipe(target="joint", embedding="none").updates(180) == 100
    # 1/h: 1,024 of 2,047 rows are at the smallest step, 5 - .0005 * 2 in all.
    assert RECIPES["published"].updates(1000) == 200


@pytest.mark.parametrize("updates", [20, 1000])
@pytest.mark.parametrize("window", [0.1, 0.03, 1 / 3])
def test_an_average_has_forgotten_its_start_at_the_end_of_any_run(
    window: float, updates: int
) -> None:
    assert Choice(1e-3, window).decay(updates) ** updates < 0.05


def test_the_search_may_not_use_a_seed_of_the_table() -> None:
    with pytest.raises(ConfigError, match="may not use a seed of the table: 1"):
        Protocol(seeds=(0, 1), search_seed=1)


def test_nats_are_read_off_the_line_at_the_goal() -> None:
    rows = [{"entropy": 5.0, "j": 6.0}, {"entropy": 5.4, "j": 7.0}]
    nats, inside = at_entropy(rows, 5.1, "j")
    assert nats == pytest.approx(6.25) and inside
    nats, inside = at_entropy(rows, 5.8, "j")
    assert nats == pytest.approx(8.0) and not inside
    assert at_entropy(rows[:1], 5.0, "j") == (6.0, False)


def test_nats_at_the_goal_are_those_between_its_neighbours_of_distinct_entropies() -> None:
    rows = [{"entropy": e, "j": j} for e, j in ((5.1, 4.2), (6.0, 8.0), (5.0, 4.0))]
    # The two nearest, 5.0 and 5.1, give 4.4.
    assert at_entropy(rows, 5.2, "j") == (pytest.approx(4.2 + 3.8 / 9), True)
    assert at_entropy(rows, 6.0, "j") == (8.0, True)
    assert at_entropy(rows, 4.9, "j") == (pytest.approx(3.8), False)
    assert at_entropy(rows, 6.9, "j") == (pytest.approx(11.8), False)
    assert at_entropy([rows[2], rows[1], rows[2]], 5.25, "j") == (pytest.approx(5.0), True)
    assert at_entropy([rows[2], rows[2]], 5.25, "j") == (4.0, False)


def test_a_cell_of_prose_is_a_ratio_at_the_goals_entropy() -> None:
    def row(entropy: float, perplexity: float) -> dict[str, float]:
        return {"entropy": entropy, "j": math.log(perplexity), "j_se": 0.01}

    prose = Prose.__new__(Prose)
    prose.judges = {"j": None}  # type: ignore[dict-item]
    cell = prose.cell([row(5.0, 300.0), row(6.0, 1200.0)], row(5.5, 400.0), "j")
    # exp of the mean of ln 300 and ln 1200 is 600; 1.96 * sqrt(2) * .01 on either side.
    assert cell.text(2) == "1.50 (1.46-1.54)"
    beyond = prose.cell([row(5.0, 300.0), row(5.2, 400.0)], row(5.5, 400.0), "j")
    assert beyond.text(2).endswith("*")


def test_pooled_nats_come_with_the_error_of_a_ratio() -> None:
    assert standard_error([10.0, 20.0], [5, 10]) == pytest.approx(0.0)
    # Equal lengths: the error of a mean.
    assert standard_error([10.0, 14.0], [2, 2]) == pytest.approx(2.0 / math.sqrt(2) / 1.414214)


def test_a_row_that_was_cut_short_costs_itself_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append(path, {"a": 1})
    path.write_text(path.read_text() + '{"a": 2, "b"')
    append(path, {"a": 3})
    assert read(path) == [{"a": 1}, {"a": 3}]


def test_rows_that_two_processes_drew_count_once(tmp_path: Path, teacher: Path) -> None:
    language, few = known_law(teacher), {**FEW, "samples": 16, "search_samples": 8}
    studies = [Study(tmp_path, language, Protocol(**few)) for _ in range(2)]
    for study in studies:
        study.teacher([1.0, 2.0])
    assert len(read(tmp_path / "results.jsonl")) == 2 * 5
    again = Study(tmp_path, language, Protocol(**few))
    assert again.rows == studies[0].rows and len(again.rows) == 5
    assert "| teacher | 0 |" in tables(again)


def test_a_run_of_other_settings_is_refused(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    language, recipe = known_law(teacher), RECIPES["joint head"]
    run = tmp_path / "joint head 0"

    def last(choice: Choice, updates: int, recipe: Recipe = recipe) -> Tensor:
        weights = student(recipe, choice, language, run, updates, 0)("last").state_dict()
        return torch.cat([each.flatten() for each in weights.values()])

    first = last(Choice(3e-3, 0.1), 6)
    others = [
        (Choice(1e-5, 0.1), 3, recipe),
        (Choice(3e-3, 0.1), 3, recipe),
        (Choice(3e-3, 0.5), 6, recipe),
        (Choice(3e-3, 0.1), 6, replace(recipe, neighbours=2)),
    ]
    refused = "joint head 0 has a run of other or unknown settings: give another out"
    for other in others:
        with pytest.raises(ConfigError, match=refused):
            last(*other)
    # The grid is no part of a run.
    assert torch.equal(last(Choice(3e-3, 0.1, power=8.0), 6), first)
    kept = (run / "settings.json").read_text()
    (run / "settings.json").unlink()  # as runs were before
    with pytest.raises(ConfigError, match=refused):
        last(Choice(3e-3, 0.1), 6)
    (run / "settings.json").write_text(kept)
    with torch.no_grad():
        language.teacher.vocab_embed.weight.mul_(1.1)
    with pytest.raises(ConfigError, match=refused):
        last(Choice(3e-3, 0.1), 6)
    command = f"joint --out {tmp_path} --teacher-run {teacher} --calls 1 --samples 8 --powers 1"
    for updates in (2, 1):
        words = f"{command} --updates {updates} --heads".split()
        monkeypatch.setattr(sys, "argv", [*words, "fixed seams"])
        if updates == 2:
            script("benchmarks/joint.py").main()
        else:
            with pytest.raises(SystemExit, match="other or unknown settings"):
                script("benchmarks/joint.py").main()


def test_a_row_of_another_teacher_is_not_taken(tmp_path: Path, teacher: Path) -> None:
    language = known_law(teacher)
    made: list[str] = []

    def draws() -> Drawer:
        made.append("")
        return drawer(language, language.teacher)

    for _ in range(2):
        limits(tmp_path, language, {"teacher": draws}, [(1, 1.0)], 8)
    assert len(made) == 1
    with torch.no_grad():
        language.teacher.vocab_embed.weight.mul_(1.1)
    limits(tmp_path, language, {"teacher": draws}, [(1, 1.0)], 8)
    assert len(made) == 2


def test_every_recipe_gets_the_same_search_and_shows_its_start(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    language = known_law(teacher)
    language.rates = (1e-3, 1e-2)
    language.settings = replace(language.settings, batch_size=128)
    monkeypatch.setattr(protocols, "POWERS", (1.0, 8.0))
    monkeypatch.setattr(protocols, "WINDOWS", (0.1, 0.3))
    protocol = Protocol(seeds=(0,), samples=64, search_samples=32, **FEW)
    study = Study(tmp_path, language, protocol)
    for name in ("published", "joint head"):
        study.students(name)
    study.teacher([1.0])
    tried = {
        name: {
            (row["learning_rate"], row["window"], row["power"], row["calls"])
            for row in study.searched
            if row["recipe"] == name
        }
        for name in ("published", "joint head")
    }
    # Two rates and one more window, on two grids, at two budgets.
    assert {len(each) for each in tried.values()} == {3 * 2 * 2}
    noises = [{row["first_sample"] for row in rows} for rows in (study.searched, study.rows)]
    assert noises[0].isdisjoint(noises[1])
    text = tables(study)
    for weights in ("update 0", "last weights", "average"):
        assert f"| published | 0 | {weights} |" in text
    # The start of a student with a silent head is its teacher, drawn in groups or alone.
    assert "true samples: " in text
    once = json.dumps(study.rows)
    again = Study(tmp_path, language, protocol)
    again.students("published")
    again.teacher([1.0])
    assert json.dumps(again.rows) == once  # nothing was drawn anew


def test_a_curve_judges_the_start_and_what_a_run_left_behind(
    tmp_path: Path,
    teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = f"published --out {tmp_path} --teacher-run {teacher} --calls 1 2 --samples 16"
    monkeypatch.setattr(curve, "SAVED_EVERY", 2)
    monkeypatch.setattr(sys, "argv", f"{command} --updates 2 4".split())
    script("benchmarks/published.py").main()
    table = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:-1]] == [
        "teacher, exact rule",
        "teacher, published rule",
        "update 0",
        "2 updates, average",
        "2 updates, last weights",
        "4 updates, average",
        "4 updates, last weights",
    ]
    run = tmp_path / "published 0"
    average, last = (load_file(run / f"4 {kind}.safetensors") for kind in ("average", "last"))
    checkpoint = load_file(run / "checkpoint.safetensors")
    assert all(torch.equal(checkpoint[f"ema.{name}"], each) for name, each in average.items())
    assert all(torch.equal(checkpoint[f"model.{name}"], each) for name, each in last.items())
    assert not torch.equal(average["vocab_embed.weight"], last["vocab_embed.weight"])
    for words, says in (("3", "multiples of 2"), ("2", "other or unknown settings")):
        monkeypatch.setattr(sys, "argv", f"{command} --updates {words}".split())
        with pytest.raises(SystemExit, match=says):
            script("benchmarks/published.py").main()


@pytest.mark.parametrize(
    ("name", "flags", "rows"),
    [
        (
            "markov",
            "--powers 1",
            [
                "exact posterior, each alone",
                "exact conditionals, 8 groups",
                "teacher, each alone",
                "perfect student",
            ],
        ),
        (
            "joint",
            "--powers 1 8 --updates 2",
            ["exact conditionals", "teacher", "fixed seams 0", "random seams 0"],
        ),
    ],
)
def test_scripts_of_the_known_law_give_a_row_for_every_way_of_drawing(
    name: str,
    flags: str,
    rows: list[str],
    tmp_path: Path,
    teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = f"{name} --out {tmp_path} --teacher-run {teacher} --calls 1 2 --samples 16 {flags}"
    monkeypatch.setattr(sys, "argv", command.split())
    script(f"benchmarks/{name}.py").main()
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    tables = [each.splitlines()[2:] for each in table.split("\n\n") if each.startswith("|")]
    names = [[line.split("|")[1].strip() for line in lines] for lines in tables]
    assert list(dict.fromkeys(names[0])) == rows
    assert names[1:] == ([[*rows, "exact marginals"]] if name == "joint" else [])


def test_marginals_are_kept_by_exact_conditionals_and_not_by_wrong_ones(teacher: Path) -> None:
    language = known_law(teacher)
    exact = drawer(language, ExactConditionals(language.chain, language.source), 4)

    def wrong(grid: Tensor, samples: int, start: Tensor | None = None) -> Tensor:
        return torch.zeros_like(exact(grid, samples, start))

    found = kept_marginals(language, {"exact": exact, "wrong": wrong}, 400)
    three = (found[name] for name in ("exact", "exact marginals", "wrong"))
    for at, floor, off in zip(*three, strict=True):
        assert at < 1.3 * floor < 0.3 * off


def test_prose_is_judged_by_several_beside_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Prose, "train_length", 16)
    monkeypatch.setattr(Prose, "length", 32)
    monkeypatch.setattr(Prose, "rates", (1e-3,))
    monkeypatch.setattr(protocols, "POWERS", (1.0,))
    monkeypatch.setattr(protocols, "WINDOWS", (0.1,))
    model = save_model(tmp_path / "model", step_embedding="none")
    judges = [str(save_judge(made(tmp_path / f"judge{i}"), 64, seed=i)) for i in (1, 2)]
    heldout = save_heldout(tmp_path / "text.jsonl")
    tokenizer = Tokenizer.from_json((model / "tokenizer.json").read_text())
    settings = PrepareSettings(validation_fraction=0.5)
    prepare([heldout], tmp_path / "data", settings=settings, tokenizer=tokenizer)
    command = (
        f"study --out {tmp_path / 'out'} --teacher {model} --data {tmp_path / 'data'} --many 4"
    )
    command += f" --judges {' '.join(judges)} --reference ngram={heldout} --budget 6 --calls 2"
    command += " --search-budget 3 --samples 2 --search-samples 2 --seeds 0"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--recipes", "step-aware"])
    script("benchmarks/study.py").main()
    table = (tmp_path / "out" / "tables.md").read_text()
    assert table.count("| step-aware | 0 | average |") == 3  # two judges and the 4-grams
    assert table.count("ngram: ") == table.count("human text: ") == 3
    # A teacher at its own many calls is the goal itself.
    assert table.count("Teacher in 4 calls: 1.00") == 2


def made(directory: Path) -> Path:
    """The directory, which was not there before."""
    directory.mkdir()
    return directory


def test_a_study_of_the_mask_source_trains_its_own_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KnownLaw, "rates", (1e-3,))
    monkeypatch.setattr(protocols, "POWERS", (1.0,))
    monkeypatch.setattr(protocols, "WINDOWS", (0.1,))
    command = f"study --out {tmp_path} --source mask --teacher-steps 2 --budget 6 --samples 8"
    command += " --search-budget 3 --calls 2 --many 4 --search-samples 8 --seeds 0"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--recipes", "joint head"])
    script("benchmarks/study.py").main()
    tensors = load_file(tmp_path / "teacher" / "checkpoint.safetensors")
    assert tensors["ema.vocab_embed.weight"].shape == (5, 64)
    assert (tmp_path / "figure.png").read_bytes()[1:4] == b"PNG"
    assert "| joint head | 0 | average |" in (tmp_path / "tables.md").read_text()
