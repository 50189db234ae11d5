"""Trackers are told what metrics.jsonl says."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_training_commands import data, pretrain_args

from fsdfm.core.errors import ConfigError
from fsdfm.recipes import training
from fsdfm.train.tracking import figures, tracked

__all__ = ["data"]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_figures_are_flat_and_numbers() -> None:
    line = {"step": 3, "loss": None, "tokens": 4, "kl_by_h": {"1/2": 0.5, "1": None}}
    assert figures(line) == {"tokens": 4.0, "kl_by_h/1-2": 0.5}


def test_tensorboard_has_the_lines_of_a_run(data: Path, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    args = pretrain_args(data, tmp_path / "run", steps=4, track="tensorboard")
    assert training.pretrain(args)
    found = events.EventAccumulator(str(args.out / "tensorboard"))
    found.Reload()
    for name in ("loss", "learning_rate", "elbo_nats_per_token"):
        expected = [(line["step"], line[name]) for line in lines(args.out) if name in line]
        told = [(event.step, event.value) for event in found.Scalars(name)]
        assert expected and told == [(step, pytest.approx(value)) for step, value in expected]
    assert "loss_by_t/0" in found.Tags()["scalars"]
    assert training.pretrain(args)  # finished: nothing is told again


def test_what_was_told_after_the_checkpoint_of_a_killed_run_is_told_once(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps in ((2, 4, 6), (4, 6, 8)):
        with tracked("tensorboard", tmp_path, {}) as tell:
            for step in steps:
                tell({"step": step, "loss": 1.0})
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == [2, 4, 6, 8]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_others_are_told_by_their_own_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    stand_in = SimpleNamespace(
        init=lambda **given: told.append(given),
        log=lambda figures, step: told.append((step, figures)),
        finish=lambda: told.append("end"),
    )
    monkeypatch.setitem(sys.modules, name, stand_in)  # type: ignore[arg-type]
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: wanted == name or None)
    with tracked(name, tmp_path / "run", {"steps": 7}) as tell:
        tell({"step": 1, "loss": 2.0})
        tell({"step": 2, "loss": 1.5})
    init = {"project": "fsdfm", "name": "run", "config": {"steps": 7}}
    assert told == [init, (1, {"loss": 2.0}), (2, {"loss": 1.5}), "end"]


def test_a_tracker_that_is_missing_or_fails_gives_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    missing = pytest.raises(ConfigError, match="track=wandb needs another library: pip install")
    with missing, tracked("wandb", tmp_path, {}):
        raise AssertionError
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())

    def refuse(**given: Any) -> None:
        raise RuntimeError("no key\nmore")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))  # type: ignore[arg-type]
    refused = pytest.raises(ConfigError, match=r"wandb cannot be told the metrics \(no key\)")
    with refused, tracked("wandb", tmp_path, {}) as tell:
        tell({"step": 1})
