"""Settings as a file: they repeat a run, and what a run does not know is refused."""

from __future__ import annotations

import json
import os
import signal
import tomllib
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from test_training_commands import (
    SMALL,
    assert_same_runs,
    data,
    distill_args,
    pretrain_args,
    teacher,
    weights,
)

from fsdfm.core.errors import ConfigError
from fsdfm.core.options import options
from fsdfm.recipes import training
from fsdfm.recipes.config import read_config, toml
from fsdfm.recipes.settings import AdaptSettings, DistillSettings, PretrainSettings
from fsdfm.recipes.watch import Nobody
from fsdfm.train.settings import TrainSettings

__all__ = ["data", "teacher"]
SETTINGS = TrainSettings(steps=10, learning_rate=1.0, warmup_steps=2, final_fraction=0.25)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsdfm.model.config import PRESETS

    shape = {"hidden_size": 16, "blocks": 1, "heads": 2, "cond_size": 8}
    monkeypatch.setitem(PRESETS, "tiny", shape)


def losses(directory: Path) -> dict[int, float]:
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def stopped_after(updates: int, settings: PretrainSettings) -> None:
    """A run that was told to stop after so many updates."""

    class Stops(Nobody):
        def advanced(self, step: int, steps: int, loss: float | None) -> None:
            if step == updates - 1:  # it ends after the update in progress
                os.kill(os.getpid(), signal.SIGTERM)

    assert not training.pretrain(settings, lambda plan: nullcontext(Stops()))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    odd = Path('a "b"\\c\nd\x7fé')
    kept = AdaptSettings(data=odd, out=Path("o"), model="m", clip_norm=float("inf"), device="cpu")
    (tmp_path / "c.toml").write_text(toml("adapt", asdict(kept)), encoding="utf-8")
    found = read_config(tmp_path / "c.toml", "adapt", options(AdaptSettings))
    assert AdaptSettings(**found) == kept and "layers" not in found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("learning_rat = 1.0", "no setting 'learning_rat'; did you mean learning_rate?"),
        ("zzz = 1", "no setting 'zzz'; it takes steps"),
        ("steps = 0", "steps must be a whole number >= 1, got 0"),
        ("steps = 1.5", "steps must be a whole number >= 1, got 1.5"),
        ("data = 3", "data must be a text in quotes, got 3"),
        ("ema_warmup = 1", "ema_warmup must be true or false, got 1"),
        ('source = "sand"', "source must be one of uniform, mask"),
        ("steps = ", "must be a TOML file"),
        ('command = "distill"', "settings of fsdfm distill, not of fsdfm pretrain"),
    ],
)
def test_a_file_that_cannot_be_is_refused_in_one_line(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path / "c.toml", "pretrain", options(PretrainSettings))
    assert says in str(caught.value) and "c.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_is_repeated_from_its_config(run: Run, data: Path, tmp_path: Path) -> None:
    args = pretrain_args(data, tmp_path / "a")
    assert training.pretrain(args)
    config = tmp_path / "a" / "config.toml"
    kept = tomllib.loads(config.read_text())
    assert kept.pop("command") == "pretrain"
    assert kept["steps"] == 7 and kept["data"] == str(data) and "init" not in kept
    code, _, err = run("pretrain", "--config", config, "--out", tmp_path / "b")
    assert code == 0, err
    assert_same_runs(tmp_path / "a", tmp_path / "b")
    code, _, err = run("pretrain", "--config", config)
    assert code == 0 and "Finished already" in err
    code, _, err = run("distill", "--config", config)
    assert code == 2 and "not of fsdfm distill" in err


def test_flags_win_over_the_file_and_a_recipe_over_its_numbers(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(training, "distill", lambda settings, watch: seen.append(settings) or True)
    monkeypatch.setattr(training, "pretrain", lambda settings, watch: seen.append(settings) or True)
    places = {"data": Path("d"), "out": Path("o"), "teacher": Path("t")}
    file = tmp_path / "c.toml"
    joint = distill_args(Path("d"), Path("o"), Path("t"), seed=3)
    file.write_text(toml("distill", asdict(joint)))
    for flags in ((), ("--seed", 4), ("--recipe", "published"), ("--target", "rk4")):
        code, _, err = run("distill", "--config", file, *flags)
        assert code == 0, err
    same, other, published, rk4 = seen
    assert same == joint and other == replace(joint, seed=4)
    assert isinstance(published, DistillSettings)
    assert (published.learning_rate, published.steps, published.seed) == (1e-5, 500_000, 3)
    assert (rk4.learning_rate, rk4.draws, rk4.steps) == (1e-4, 1, 7)
    file.write_text('recipe = "published"\ndata = "d"\n')
    code, _, err = run("pretrain", "--config", file, "--out", "o", "--steps", 9)
    assert code == 0, err
    assert seen[-1].batch_size == 128 and seen[-1].steps == 9 and seen[-1].out == places["out"]
    code, _, err = run("pretrain", "--config", file)
    assert code == 2 and "has no out: give --out" in err.replace("--out: give", "out: give")


def test_the_learning_rate_stays_after_its_cosine() -> None:
    longer = replace(SETTINGS, steps=20, decay_steps=10)
    rates = [SETTINGS.learning_rate_at(step) for step in range(10)]
    assert [longer.learning_rate_at(step) for step in range(10)] == rates
    assert [longer.learning_rate_at(step) for step in (10, 15, 19)] == [0.25] * 3


def test_a_run_goes_on_with_more_steps_as_its_config_repeats_it(
    run: Run, data: Path, tmp_path: Path
) -> None:
    short = pretrain_args(data, tmp_path / "a", steps=5)
    assert training.pretrain(short)
    before = losses(tmp_path / "a")
    longer = replace(short, steps=9, log_every=1, checkpoint_every=4, evaluate_every=3)
    assert training.pretrain(longer)
    found = losses(tmp_path / "a")
    assert {step: found[step] for step in before} == before and max(found) == 9
    kept = tomllib.loads((tmp_path / "a/config.toml").read_text())
    assert (kept["steps"], kept["decay_steps"]) == (9, 5)
    # At once, as the settings say now: the same weights.
    code, _, err = run("pretrain", "--config", tmp_path / "a/config.toml", "--out", tmp_path / "b")
    assert code == 0, err
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    # The same command again, and longer still: the cosine is that of the beginning.
    assert training.pretrain(replace(longer, steps=10))
    assert json.loads((tmp_path / "a/run.json").read_text())["settings"]["decay_steps"] == 5
    with pytest.raises(ConfigError, match=r"learning_rate 0.0003 -> 0.5"):
        training.pretrain(replace(longer, learning_rate=0.5))


def test_a_run_may_cool_down_at_any_time_as_its_config_repeats_it(
    run: Run, data: Path, tmp_path: Path
) -> None:
    planned = pretrain_args(data, tmp_path / "a", steps=20, checkpoint_every=4)
    stopped_after(4, planned)
    ends = replace(planned, steps=7, cooldown_steps=3)
    assert training.pretrain(ends)
    code, _, err = run("pretrain", "--config", tmp_path / "a/config.toml", "--out", tmp_path / "b")
    assert code == 0, err
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    kept = tomllib.loads((tmp_path / "a/config.toml").read_text())
    assert (kept["steps"], kept["decay_steps"], kept["cooldown_steps"]) == (7, 20, 3)
    assert training.pretrain(ends)
    for changes in ({"steps": 9}, {"cooldown_steps": 0}, {"steps": 9, "cooldown_steps": 5}):
        with pytest.raises(ConfigError, match=r"has begun to cool down: go on with steps=7 and"):
            training.pretrain(replace(ends, **changes))


def test_updates_that_are_done_are_neither_forgotten_nor_told_otherwise(
    data: Path, tmp_path: Path
) -> None:
    args = pretrain_args(data, tmp_path / "a", steps=6)
    assert training.pretrain(args)
    with pytest.raises(ConfigError, match="has 6 updates: give steps of 6 or more"):
        training.pretrain(replace(args, steps=5))
    late = replace(args, steps=8, cooldown_steps=4)
    with pytest.raises(ConfigError, match=r"cool down after 4: give steps of 10 or more, or fewer"):
        training.pretrain(late)
    kept = tomllib.loads((tmp_path / "a/config.toml").read_text())
    assert (kept["steps"], kept["cooldown_steps"]) == (6, 0)
    assert training.pretrain(replace(args, steps=8, cooldown_steps=2))


def test_a_run_that_has_only_warmed_up_takes_the_cosine_of_its_new_length(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = pretrain_args(data, tmp_path / "a", steps=3, warmup_steps=4)
    assert training.pretrain(short)
    assert training.pretrain(replace(short, steps=4))
    long = replace(short, steps=8)
    assert training.pretrain(long)
    assert not caplog.messages
    assert training.pretrain(replace(long, out=tmp_path / "b"))
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    # From here on there is a cosine to keep, and its last rate is said.
    assert training.pretrain(replace(long, steps=9))
    rate = replace(long, steps=9, decay_steps=8).learning_rate_at(8)
    assert 0 < rate < long.learning_rate and f"and is {rate:g} after them" in caplog.text


def test_what_has_not_begun_to_cool_down_may_do_so_elsewhere(data: Path, tmp_path: Path) -> None:
    planned = pretrain_args(data, tmp_path / "a", steps=9, cooldown_steps=5, checkpoint_every=2)
    stopped_after(4, planned)
    assert training.pretrain(replace(planned, steps=6, cooldown_steps=2))


def test_the_learning_rate_falls_linearly_over_the_last_updates() -> None:
    cooled = replace(SETTINGS, cooldown_steps=4)
    found = [cooled.learning_rate_at(step) / SETTINGS.learning_rate_at(step) for step in range(10)]
    assert found == pytest.approx([1.0] * 6 + [0.8, 0.6, 0.4, 0.2])


def test_names_that_are_not_utf8_are_told(
    run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / os.fsdecode(b"d\xe9")).symlink_to(data)
    with pytest.raises(ConfigError, match=r"is not UTF-8, so config.toml cannot say it"):
        training.pretrain(pretrain_args(tmp_path / os.fsdecode(b"d\xe9"), tmp_path / "a", steps=1))
    assert "run.json" not in os.listdir(tmp_path / "a")
    code, _, err = run("prepare", "a" * 300, "--tokenizer", "a" * 300, "--out", tmp_path / "b")
    assert code == 2 and "File name too long" in err


def test_a_run_of_an_older_fsdfm_goes_on_longer(data: Path, tmp_path: Path) -> None:
    args = pretrain_args(data, tmp_path / "a", steps=3)
    assert training.pretrain(args)
    facts = json.loads((args.out / "run.json").read_text())
    del facts["settings"]["decay_steps"]
    (args.out / "run.json").write_text(json.dumps(facts))
    assert training.pretrain(replace(args, steps=4))
    assert SMALL["steps"] == 7 and max(losses(args.out)) == 4
