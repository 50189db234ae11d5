"""`fsdfm plot`: curves of trainings from their metrics.jsonl."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

from fsdfm.core.errors import DataError
from fsdfm.eval.curves import PANELS, picture, read_curves


def written(directory: Path, *records: dict[str, Any], rest: str = "") -> Path:
    directory.mkdir()
    text = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "metrics.jsonl").write_text(text + rest)
    return directory


def line(step: int, loss: float | None) -> dict[str, Any]:
    rates = {"learning_rate": 1e-3, "gradient_norm": 1.0, "tokens_per_second": 99.0}
    table = {"0": loss, "0.125": None}
    return {"step": step, "loss": loss, **rates, "loss_by_t": table}


def test_a_torn_line_and_a_missing_value_are_left_out(tmp_path: Path) -> None:
    bound = {"step": 2, "elbo_nats_per_token": 4.0}
    run = read_curves(written(tmp_path / "a", line(1, 3.0), line(2, None), bound, rest='{"st'))
    assert run.name == "a"
    assert run.points("loss") == ([1], [3.0]) and run.points("learning_rate")[0] == [1, 2]
    assert run.points("elbo_nats_per_token") == ([2], [4.0])
    assert run.points("loss_by_t", "0") == ([1], [3.0])
    assert run.points("loss_by_t", "0.125") == ([], []) and run.points("loss_by_t") == ([], [])
    assert run.tables == {"loss_by_t": ["0", "0.125"]}


def test_every_figure_of_the_panels_is_one_that_training_writes() -> None:
    root = Path(__file__).parents[1] / "src/fsdfm/train/loop.py"
    names = set(PANELS) - {"loss"}  # which the objective names
    assert [name for name in names if f'"{name}"' not in root.read_text()] == []


@pytest.mark.parametrize("count", [1, 2])
def test_a_picture_has_a_panel_for_every_figure_there_is(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    titles: list[str] = []
    save = Figure.savefig

    def noting(self: Figure, *args: Any, **kwargs: Any) -> None:
        titles.extend(axes.get_title() for axes in self.axes)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", noting)
    runs = [written(tmp_path / f"$r{k}", line(1, 3.0), line(2, 2.0)) for k in range(count)]
    assert picture([read_curves(run) for run in runs]).startswith(b"\x89PNG")
    shown = [PANELS[n] for n in ("loss", "learning_rate", "gradient_norm", "tokens_per_second")]
    assert titles == shown + ["loss, nats, by time, from"] * (count == 1)


def test_the_command_writes_a_file_or_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, out = written(tmp_path / "one", line(1, 3.0)), tmp_path / "x.png"
    assert run("plot", one, one, "--out", out) == (0, f"{out}\n", "")
    assert out.read_bytes().startswith(b"\x89PNG")
    code, _, err = run("plot", tmp_path / "none", "--out", out)
    assert code == 2 and "give directories of training runs" in err
    code, _, err = run("plot", one, "--out", tmp_path / "x.pdf")
    assert code == 2 and "--out" in err and ".png" in err
    assert run("plot", "--out", out)[0] == 2
    with pytest.raises(DataError, match="no line of metrics yet"):
        read_curves(written(tmp_path / "empty"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = run("plot", one, "--out", out)
    assert (code, err) == (2, "error: Plots need matplotlib: pip install 'fsdfm[eval]'.\n")
