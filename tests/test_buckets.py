"""What a line of metrics says besides the loss: by times and step sizes, gradients, rates."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import SETTINGS, B, L, Recorder, Toy, V, batch, distill_objective, generator
from test_train import make_task as task
from torch import Tensor

from fsdfm.core.device import peak_tflops
from fsdfm.flow.loss import cross_entropy
from fsdfm.flow.path import MaskSource, UniformSource
from fsdfm.flow.schedule import Polynomial
from fsdfm.train import outside
from fsdfm.train.buckets import STEPS, TIMES, is_bucket, means
from fsdfm.train.loop import Run
from fsdfm.train.objective import Distill, Joint, Objective, Pretrain, even_weights

TABLES = {
    "pretrain": {"loss_by_t": TIMES},
    "joint": {"loss_by_t": TIMES},
    "distill": {"path_loss_by_t": TIMES, "kl_by_t": TIMES, "kl_by_h": STEPS},
}


def objective(name: str, source: Any = None) -> Objective:
    source = source or UniformSource(V)
    if name == "pretrain":
        return Pretrain(source, Polynomial(), cross_entropy)
    if name == "joint":
        return Joint(source, Polynomial())
    return Distill(source, Polynomial(), weights=even_weights(0.3))


def tables(parts: dict[str, Tensor]) -> dict[str, dict[str, float | None]]:
    return means((name, value[None]) for name, value in parts.items() if is_bucket(name))


@pytest.mark.parametrize("name", TABLES)
def test_sums_over_buckets_are_the_losses(name: str) -> None:
    parts = objective(name).loss(Toy(), Toy(1), batch(0).repeat(8, 1), generator(3))
    found = {n: v for n, v in parts.items() if is_bucket(n)}
    assert {n.partition(".")[0] for n in found} == set(TABLES[name])
    for table, labels in TABLES[name].items():
        ours = {n: float(v) for n, v in found.items() if n.startswith(f"{table}.")}
        assert [n for n in ours if n.endswith("count")] == [f"{table}.{b}.count" for b in labels]
        total = sum(v for n, v in ours.items() if n.endswith("sum"))
        count = sum(v for n, v in ours.items() if n.endswith("count"))
        mean = float(parts[table.rpartition("_by_")[0]].detach())
        assert total / count == pytest.approx(mean, rel=1e-5)
    assert next(iter(parts)) == "loss"


def test_a_bucket_is_where_a_times_rows_are() -> None:
    """A loss that is the time of its row lies within its bucket."""

    def time(logits: Tensor, x_t: Tensor, x_1: Tensor, g: Tensor) -> Tensor:
        return 1.0 - 1.0 / g + 0.0 * logits[:, 0]  # g = 1 / (1 - t)

    chosen = replace(objective("pretrain"), position_loss=time)  # type: ignore[type-var]
    found = tables(chosen.loss(Toy(), Toy(1), batch(0).repeat(16, 1), generator(3)))
    for start, value in found["loss_by_t"].items():
        assert value is not None and float(start) <= value < float(start) + 0.125


def test_a_bucket_is_where_a_step_sizes_rows_are() -> None:
    seen: list[Tensor] = []

    def one(target: Tensor, logits: Tensor) -> Tensor:
        seen.append(logits)
        return 1.0 + 0.0 * logits[:, 0]

    student = Toy()
    chosen = distill_objective(divergence=one)
    parts = chosen.loss(student, Toy(1), batch(0).repeat(16, 1), generator(3))
    found = tables(parts)["kl_by_h"]
    steps = torch.cat([h for _, _, h in student.seen])
    for label, value in found.items():
        h = eval(label)
        rows = int((steps == h).sum()) if h > 2.0**-10 else 0
        assert (value is None) == (rows == 0)
        assert float(parts[f"kl_by_h.{label}.count"]) == rows * L


def test_a_pass_without_rows_has_all_its_buckets_empty() -> None:
    weights = torch.zeros(11, dtype=torch.float64)
    weights[10] = 1.0
    whole = Distill(UniformSource(V), Polynomial(), weights=weights)
    found = tables(whole.loss(Toy(), Toy(1), batch(0), generator()))
    assert set(found) == set(TABLES["distill"])
    assert all(value is None for value in found["kl_by_h"].values())
    absorbing = objective("pretrain", MaskSource(V))
    assert set(tables(absorbing.loss(Toy(rows=V + 1), Toy(), batch(0), generator()))) == {
        "loss_by_t"
    }


def test_a_pass_that_was_not_finite_is_left_out_of_its_buckets_alone() -> None:
    values = {"a_by_t.0.125.sum": [2.0, math.nan, 4.0], "a_by_t.0.125.count": [1.0, 5.0, 2.0]}
    values |= {"a_by_t.1/2.sum": [0.0, 0.0, 0.0], "a_by_t.1/2.count": [0.0, 0.0, 0.0]}
    found = means((name, torch.tensor(value)) for name, value in values.items())
    assert found == {"a_by_t": {"0.125": 2.0, "1/2": None}}


@pytest.fixture
def records(tmp_path: Path) -> list[dict[str, Any]]:
    given = replace(task(), sequence_flops=1e6, peak_flops=1e9)
    with pytest.MonkeyPatch.context() as patch:
        clock = iter(range(1000))
        patch.setattr(outside.time, "perf_counter", lambda: float(next(clock)))
        Run(tmp_path, replace(SETTINGS, log_every=1), given, Recorder()).train(Toy())
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def test_a_line_has_the_learning_rate_of_its_last_update(records: list[dict[str, Any]]) -> None:
    rates = [record["learning_rate"] for record in records]
    assert rates == [SETTINGS.learning_rate_at(step) for step in range(7)]
    assert rates[0] == pytest.approx(0.005) and max(rates) == 0.01


def test_a_line_has_the_share_of_the_peak(records: list[dict[str, Any]]) -> None:
    for record in records:
        sequences = record["tokens_per_second"] / L
        assert record["utilisation"] == pytest.approx(sequences * 1e6 / 1e9)
        assert list(record["loss_by_t"]) == list(TIMES)
    # The clock ticks at every look: a line's rate is that since the line before.
    assert records[0]["tokens_per_second"] <= 2 * B * L


def test_a_line_has_the_length_of_the_gradient_before_it_is_cut(tmp_path: Path) -> None:
    def norms(clip: float) -> list[float]:
        (tmp_path / str(clip)).mkdir()
        settings = replace(SETTINGS, log_every=1, clip_norm=clip, steps=1)
        Run(tmp_path / str(clip), settings, task(), Recorder()).train(Toy())
        lines = (tmp_path / str(clip) / "metrics.jsonl").read_text().splitlines()
        return [r["gradient_norm"] for r in map(json.loads, lines) if "loss" in r]

    (free,), (cut,) = norms(1e9), norms(1e-3)
    assert free == pytest.approx(cut) and free > 0.01


def test_a_peak_is_known_by_the_name_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    names: Iterator[str] = iter(["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "Abacus 3"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: next(names))
    cuda = torch.device("cuda")
    assert [peak_tflops(cuda) for _ in range(3)] == [989.0, 756.0, None]
    assert peak_tflops(torch.device("cpu")) is None
