"""An option is written once: what is derived from its field, and from the registries."""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from evaluation_fixtures import save_model

import fsdfm
from fsdfm.bench.settings import BenchSettings
from fsdfm.cli.flags import spoken
from fsdfm.core.errors import ConfigError
from fsdfm.core.options import NOT_NEGATIVE, POSITIVE, Range, check, option, options
from fsdfm.eval.settings import JudgeSettings
from fsdfm.flow.grid import GRIDS, even_grid
from fsdfm.flow.path import SOURCES
from fsdfm.flow.step import EXACT, MOVERS, STEP_RULES, independent_movers
from fsdfm.flow.target import TARGETS, rk2_target
from fsdfm.generate.options import DEFAULTS, Options, RequestOptions, SamplingOptions
from fsdfm.model.config import Source
from fsdfm.recipes.plan_settings import PlanSettings
from fsdfm.recipes.settings import (
    PRETRAINED,
    RECIPES,
    AdaptSettings,
    DistillSettings,
    PretrainSettings,
    Recipe,
    distill_settings,
    pretrain_settings,
)
from fsdfm.text.settings import PrepareSettings
from fsdfm.train.settings import TrainSettings

ALL = (
    SamplingOptions,
    RequestOptions,
    TrainSettings,
    PretrainSettings,
    AdaptSettings,
    DistillSettings,
    JudgeSettings,
    PrepareSettings,
    BenchSettings,
    PlanSettings,
)
PLACES: dict[str, Any] = {"data": Path("d"), "out": Path("o"), "teacher": Path("t")}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def additions() -> Iterator[None]:
    """A grid, a step rule, a way to choose movers and a target, in their registries alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(GRIDS, "square", lambda steps: even_grid(steps) ** 2)
        patch.setitem(STEP_RULES, "lazy", replace(EXACT, name="lazy"))
        patch.setitem(MOVERS, "few", lambda a, *rest: independent_movers(a, *rest))
        patch.setitem(TARGETS, "heun", rk2_target)
        yield


def test_what_is_added_to_a_registry_is_an_option_everywhere(
    additions: None, model: Path, run: Run, tmp_path: Path
) -> None:
    chosen: Any = {"grid": "square", "step": "lazy", "movers": "few"}
    # In Python.
    loaded = fsdfm.load(model, device="cpu")
    text = loaded.generate(steps=3, seed=1, **chosen).texts[0]
    assert text != loaded.generate(steps=3, seed=1, step="lazy", movers="few").texts[0]
    # On the command line: parsed, and in the help.
    flags = [word for name, value in chosen.items() for word in (f"--{name}", value)]
    some = "--model", model, "--device", "cpu", "--steps", 3, "--seed", 1
    assert run("generate", *some, *flags) == (0, f"{text}\n", "")
    for command, words in (
        ("generate", ("square", "lazy", "few")),
        ("evaluate", ("square", "lazy")),
        ("distill", ("square", "lazy", "heun")),
    ):
        code, out, _ = run(command, "--help")
        assert code == 0
        for word in words:
            assert f",{word}" in "".join(out.split())
    # In generation.json.
    file = model / "generation.json"
    before = file.read_text()
    try:
        file.write_text(json.dumps(chosen))
        assert fsdfm.load(model, device="cpu").generate(steps=3, seed=1).texts == [text]
    finally:
        file.write_text(before)
    # In settings.
    assert distill_settings(**PLACES, target="heun", grid="square", target_rule="lazy")


def test_what_is_in_no_registry_is_refused_in_the_same_words_everywhere(
    model: Path, run: Run, tmp_path: Path
) -> None:
    says = f"grid must be one of {', '.join(GRIDS)}, got 'square'."
    loaded = fsdfm.load(model, device="cpu")
    with pytest.raises(ConfigError) as caught:
        loaded.generate(grid="square")
    assert str(caught.value) == says and caught.value.fields == ("grid",)
    with pytest.raises(ConfigError) as caught:
        distill_settings(**PLACES, grid="square")
    assert str(caught.value) == says


def test_keyword_arguments_are_the_options() -> None:
    written = {n: o for kind in (SamplingOptions, RequestOptions) for n, o in options(kind).items()}
    hints = typing.get_type_hints(Options)
    assert hints == {name: option.kind | None for name, option in written.items()}
    assert asdict(SamplingOptions()) == DEFAULTS


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_option_says_what_it_is(kind: type[Any]) -> None:
    for name, found in options(kind).items():
        assert found.help.endswith("."), name
        assert "--" not in found.help, name


def test_sources_are_those_of_the_networks() -> None:
    assert typing.get_args(Source) == SOURCES


# ------------------------------------------------------------------------------------- recipes


def test_a_recipe_has_all_the_numbers_that_distilling_leaves_open() -> None:
    names = {field.name for field in fields(Recipe)}
    open_ = {n for n, o in options(DistillSettings).items() if o.default is MISSING}
    assert names == (open_ | {"steps"}) - PLACES.keys()
    for name, recipe in RECIPES.items():
        settings = distill_settings(name, **PLACES)
        assert {k: getattr(settings, k) for k in names} == asdict(recipe)


@pytest.mark.parametrize(
    ("recipe", "target", "rate", "warms_up", "grid"),
    [
        ("default", "joint", 1e-3, True, None),
        ("default", "rk4", 1e-4, False, None),
        ("default", "rk2", 1e-4, False, None),
        ("consistency", "rk4", 1e-4, False, None),
        ("consistency", "joint", 1e-3, True, None),
        ("published", "rk4", 1e-5, False, "even"),
        ("published", "rk2", 1e-5, False, "even"),
        ("published", "joint", 1e-3, True, None),
    ],
)
def test_no_target_gets_the_learning_rate_of_another_kind(
    recipe: str, target: str, rate: float, warms_up: bool, grid: str | None
) -> None:
    found = distill_settings(recipe, **PLACES, target=target)
    assert (found.learning_rate, found.ema_warmup, found.grid) == (rate, warms_up, grid)
    assert found.loss == RECIPES[recipe].loss


def test_what_is_given_wins_over_the_recipe() -> None:
    given: Any = {"learning_rate": 0.3, "grid": "even", "steps": 7}
    found = distill_settings("published", **PLACES, **given)
    assert {name: getattr(found, name) for name in given} == given
    assert (found.batch_size, found.warmup_steps) == (96, 10_000)
    with pytest.raises(ConfigError, match="recipe must be one of default, "):
        distill_settings("secret", **PLACES)


def test_the_papers_pretraining_is_a_recipe_that_gives_way_to_what_is_given() -> None:
    places = {name: PLACES[name] for name in ("data", "out")}
    published = pretrain_settings("published", **places, preset="1.3B", steps=7)
    assert (published.batch_size, published.warmup_steps, published.steps) == (128, 10_000, 7)
    assert published.loss == "generalized_kl" and published.learning_rate == 3e-4
    assert pretrain_settings(**places) == PretrainSettings(**places)
    assert set(PRETRAINED["published"]) <= {f.name for f in fields(PretrainSettings)}
    with pytest.raises(ConfigError, match="recipe must be one of default, published"):
        pretrain_settings("other", **places)


def test_the_command_takes_a_recipe(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr("fsdfm.recipes.training.distill", lambda s, w: given.append(s) or True)
    words = "--data", "d", "--out", "o", "--teacher", "t", "--recipe", "published"
    assert run("distill", *words, "--ema-decay", "0.9", "--ema-warmup", "True")[0] == 0
    wanted = distill_settings("published", **PLACES, ema_decay=0.9, ema_warmup=True)
    assert given == [wanted]


def test_help_says_what_is_usual_where_a_recipe_may_decide(run: Run) -> None:
    code, out, _ = run("pretrain", "--help")
    said = " ".join(out.replace("│", " ").split())
    assert code == 0
    for usual in ("mask, or the starting model's", "20000"):
        assert f"(default: {usual}, or the recipe's)" in said


# ---------------------------------------------------------------------------- checks and messages


@dataclass(frozen=True, slots=True, kw_only=True)
class Toy:
    count: int = option(3, within=Range(1))
    share: float = option(0.5, within=Range(0, 1))
    rate: float = option(1.0, within=POSITIVE)
    heat: tuple[float, ...] | None = option(None, within=NOT_NEGATIVE)
    rule: str = option("exact", choices=STEP_RULES)
    kind: typing.Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        check(self)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"count": 0}, "count must be a whole number >= 1, got 0."),
        ({"count": True}, "count must be a whole number >= 1, got True."),
        ({"count": 1.5}, "count must be a whole number >= 1, got 1.5."),
        ({"count": None}, "count must be a whole number >= 1, got None."),
        ({"share": 1.01}, "share must be in [0, 1], got 1.01."),
        ({"share": math.nan}, "share must be in [0, 1], got nan."),
        ({"share": "much"}, "share must be a number, got 'much'."),
        ({"rate": 0}, "rate must be positive, got 0."),
        ({"rate": math.inf}, "rate must be positive, got inf."),
        ({"heat": (1.0, -1.0)}, "heat must be a finite number >= 0, got -1."),
        ({"heat": 1.0}, "heat must be several values, got 1.0."),
        ({"rule": "heun"}, f"rule must be one of {', '.join(STEP_RULES)}, got 'heun'."),
        ({"kind": "c"}, "kind must be one of a, b, got 'c'."),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_name(given: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Toy(**given)
    assert str(caught.value) == says
    assert caught.value.fields == tuple(given)


def test_values_become_their_types() -> None:
    toy = Toy(count=np.int64(4), share=1, heat=[0, np.float32(0.5)])
    assert (toy.count, toy.share, toy.heat) == (4, 1.0, (0.0, 0.5))
    assert type(toy.count) is int and type(toy.share) is float


@pytest.mark.parametrize(
    ("text", "names", "found"),
    [
        ("learning_rate must be positive.", ["learning_rate"], "--learning-rate must be positive."),
        ("out=/a/out is: choose another out.", ["out"], "--out /a/out is: choose another --out."),
        ("length=4 of 5, in words", ["length"], "--length 4 of 5, in words"),
        ("a/length, my_length, length.py", ["length"], "a/length, my_length, length.py"),
        ("take files, or model", ["files"], "take files, or model"),
    ],
)
def test_options_are_spoken_of_as_flags(text: str, names: list[str], found: str) -> None:
    assert spoken(text, names, positional=("files",)) == found
