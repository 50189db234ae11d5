"""Truths of training: optimizer, average, objectives, and a loop that can die at any moment."""

from __future__ import annotations

import copy
import errno
import itertools
import json
import math
import os
import resource
import signal
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fsdfm.core.errors import CheckpointError, ConfigError, TrainingError
from fsdfm.flow.loss import LATEST_TIME, POSITION_LOSSES, PositionLoss, path_loss
from fsdfm.flow.path import SOURCES, Batch, MaskSource, Source, UniformSource, make_source
from fsdfm.flow.schedule import Polynomial
from fsdfm.flow.step import EXACT
from fsdfm.flow.target import TARGETS, Jumper, Target
from fsdfm.model.causal import CausalConfig, CausalNetwork
from fsdfm.model.config import ModelConfig
from fsdfm.model.student import student_from_teacher
from fsdfm.model.transformer import Transformer
from fsdfm.train import checkpoint as checkpoint_module
from fsdfm.train import loop as loop_module
from fsdfm.train import outside
from fsdfm.train.blocks import run_blocks
from fsdfm.train.buckets import is_bucket
from fsdfm.train.checkpoint import TrainState, load_average, load_checkpoint, save_checkpoint
from fsdfm.train.ema import Ema, within
from fsdfm.train.loop import Run, Task
from fsdfm.train.objective import (
    Distill,
    Pretrain,
    even_weights,
    published_weights,
    stratified,
)
from fsdfm.train.optim import make_optimizer
from fsdfm.train.rate import learning_rate
from fsdfm.train.settings import TrainSettings

V, L, B = 11, 6, 4
TIME_FIELDS = {"elapsed_seconds", "tokens_per_second", "utilisation"}


class Toy(nn.Module):
    """The smallest network that reads its states, times and step sizes; it counts its calls."""

    def __init__(self, seed: int = 0, rows: int = V, width: int = 8) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(rows, width)
            self.time = nn.Linear(2, width)
            self.mix = nn.Linear(2 * width, width)
            self.out = nn.Linear(width, rows)
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        self.seen.append((x_t, t, h))
        x = self.embed(x_t)
        both = torch.cat((x, x.roll(1, dims=1)), -1)
        time = self.time(torch.stack((t, h.log2() / 10), -1))
        return torch.tanh(self.mix(both) + time[:, None])

    def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
        return rows

    def head(self, rows: Tensor) -> Tensor:
        return self.out(rows)

    def head_parameters(self) -> tuple[Tensor, Tensor]:
        return self.out.weight, self.out.bias


@dataclass
class Recorder:
    """A watcher that notes what it is told, and can act on it."""

    on_advance: Callable[[int], None] = lambda step: None
    on_saved: Callable[[], None] = lambda: None
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    exported: dict[str, Tensor] = field(default_factory=dict)

    def advanced(self, step: int, steps: int, loss: float | None) -> None:
        self.steps.append(step)
        if loss is not None:
            self.losses.append(loss)
        self.on_advance(step)

    def evaluated(self, record: dict[str, Any], ema: nn.Module) -> None:
        self.evaluations.append(record["step"])

    def saved(self, ema: nn.Module) -> None:
        self.exported.update({k: v.clone() for k, v in ema.state_dict().items()})
        self.on_saved()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(index: int) -> Tensor:
    return torch.randint(V, (B, L), generator=generator(1000 + index))


def make_task(objective: Any = None, source: Source | None = None) -> Task:
    source = source or UniformSource(V)
    return Task(
        objective=objective or Pretrain(source, Polynomial()),
        source=source,
        schedule=Polynomial(),
        batch=batch,
        validation=batch(-1)[:3],
        device=torch.device("cpu"),
        autocast=torch.float32,
    )


SETTINGS = TrainSettings(
    steps=7,
    batch_size=B,
    accumulate=2,
    learning_rate=0.01,
    warmup_steps=2,
    log_every=2,
    evaluate_every=4,
    checkpoint_every=3,
    validation_sequences=3,
)


def distill_objective(**options: Any) -> Distill:
    return Distill(UniformSource(V), Polynomial(), weights=even_weights(), **options)


def metrics(directory: Path, drop: set[str] = TIME_FIELDS) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = (directory / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    return [{k: v for k, v in record.items() if k not in drop} for record in records]


def scalars(parts: dict[str, Tensor]) -> set[str]:
    """What an objective gives besides its tables."""
    return {name for name in parts if not is_bucket(name)}


def assert_same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# ---------------------------------------------------------------------------------------- optim


def test_learning_rate_climbs_to_the_peak_and_falls_along_a_cosine_to_its_fraction() -> None:
    def rate(step: int, warmup: int = 10) -> float:
        return learning_rate(step, peak=0.3, warmup_steps=warmup, steps=110, final_fraction=0.2)

    assert rate(0) == pytest.approx(0.03)
    assert rate(4) == pytest.approx(0.15)
    assert rate(9) == rate(10) == pytest.approx(0.3)
    assert rate(35) == pytest.approx(0.3 * (0.2 + 0.8 * (0.5 + 0.5 * math.sqrt(0.5))))
    assert rate(60) == pytest.approx(0.3 * 0.6)
    assert rate(110) == pytest.approx(0.06)
    assert rate(0, warmup=0) == pytest.approx(0.3)
    assert rate(109, warmup=110) == pytest.approx(0.3)  # nothing but warm-up


def test_weight_decay_shrinks_matrices_and_nothing_else() -> None:
    model = Toy()
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, weight_decay=0.3)
    optimizer.set_learning_rate(0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1.0 - 0.1 * 0.3 if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)
    (adamw,) = optimizer.parts
    in_groups = [p for group in adamw.param_groups for p in group["params"]]
    assert {id(p) for p in in_groups} == {id(p) for p in model.parameters()}
    assert all(group["betas"] == (0.9, 0.95) for group in adamw.param_groups)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    model = network("log2", "uniform")
    optimizer = make_optimizer(model, 0.1, "muon")
    muon, adamw = optimizer.parts
    ids = [{id(p) for g in part.param_groups for p in g["params"]} for part in (muon, adamw)]
    names = {name for name, p in model.named_parameters() if id(p) in ids[0]}
    products = ("qw", "kw", "vw", "attn_out", "mlp.0", "mlp.2")
    blocks = range(model.config.blocks)
    assert names == {f"blocks.{i}.{product}.weight" for i in blocks for product in products}
    assert ids[0] | ids[1] == {id(p) for p in model.parameters()} and not ids[0] & ids[1]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_resumed_optimizer_goes_on_as_if_it_had_not_stopped(kind: str, tmp_path: Path) -> None:
    def state() -> TrainState[Transformer]:
        torch.manual_seed(0)
        model = network("log2", "uniform")
        return TrainState(model, Ema(model, 0.9), make_optimizer(model, 0.1, kind))

    def updates(state: TrainState[Transformer], count: int) -> None:
        state.optimizer.set_learning_rate(0.01)
        for _ in range(count):
            noise = generator(state.step)
            for p in state.model.parameters():
                p.grad = torch.randn(p.shape, generator=noise)
            state.optimizer.step()
            state.step += 1

    whole, part, path = state(), state(), tmp_path / "checkpoint.safetensors"
    updates(whole, 4)
    updates(part, 2)
    save_checkpoint(path, part)
    load_checkpoint(path, resumed := state())
    updates(resumed, 2)
    assert_same_tensors(resumed.model.state_dict(), whole.model.state_dict())
    other = state()
    other.optimizer = make_optimizer(other.model, 0.1, "adamw" if kind == "muon" else "muon")
    with pytest.raises(CheckpointError, match="another optimizer"):
        load_checkpoint(path, other)


# ------------------------------------------------------------------------------------------ ema


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.6, 0.9995])
def test_average_follows_its_formula_through_the_warm_up(decay: float, warmup: bool) -> None:
    model = nn.Linear(1, 1, bias=False)
    ema = Ema(model, decay, warmup)
    expected = model.weight.item()
    for n in range(30):
        with torch.no_grad():
            model.weight.fill_(math.sin(n))
        ema.update(model)
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        expected = d * expected + (1 - d) * math.sin(n)
        assert ema.model.weight.item() == pytest.approx(expected, abs=1e-5)
    assert ema.updates == 30


def test_average_is_a_frozen_copy_in_evaluation_mode() -> None:
    model = Toy().train()
    ema = Ema(model, 0.9)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters())
    pointers = {p.data_ptr() for p in model.parameters()}
    assert not pointers & {p.data_ptr() for p in ema.model.parameters()}


@pytest.mark.parametrize(
    ("decay", "updates", "expected"),
    [(0.9995, 360, 0.9936), (0.9995, 5000, 0.9995), (0.9, 22, 0.9), (0.9, 21, 0.8962)],
)
def test_a_short_run_is_not_judged_by_its_start(
    decay: float, updates: int, expected: float
) -> None:
    found = within(decay, updates)
    assert found == pytest.approx(expected, abs=1e-4) and found <= decay
    assert found**updates <= 0.1 + 1e-9
    assert (found == decay) == (decay**updates <= 0.1)


@pytest.mark.parametrize(("steps", "warmup", "says"), [(7, False, 1), (7, True, 0), (40, False, 0)])
def test_an_average_that_would_be_its_start_is_shortened_in_a_line(
    steps: int, warmup: bool, says: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = replace(SETTINGS, steps=steps, ema_decay=0.94, ema_warmup=warmup)
    run = Run(tmp_path, settings, make_task(), Recorder())
    assert run._decay() == (0.1 ** (1 / 7) if says else 0.94)
    assert len(caplog.messages) == says
    if says:
        assert "65% of its start" in caplog.messages[0] and "\n" not in caplog.messages[0]


# ------------------------------------------------------------------------------------ objective


@pytest.mark.parametrize("count", [1, 5, 64])
def test_stratified_numbers_fall_one_into_each_part_in_random_order(count: int) -> None:
    draws = torch.stack([stratified(count, generator(seed)) for seed in range(200)])
    parts = (draws * count).floor()
    assert torch.equal(parts.sort(1).values, torch.arange(count).double().expand(200, count))
    if count > 1:
        # Mean part of the first number: uniform over the parts, 4.5 standard errors.
        error = math.sqrt((count**2 - 1) / 12 / 200)
        assert abs(float(parts[:, 0].mean()) - (count - 1) / 2) < 4.5 * error


def test_pretraining_times_are_stratified_and_clipped() -> None:
    model, count = Toy(), 5000
    x_1 = torch.zeros((count, 1), dtype=torch.int64)
    Pretrain(UniformSource(V), Polynomial()).loss(model, model, x_1, generator())
    ((_, t, h),) = model.seen
    latest = torch.tensor(LATEST_TIME).float()
    assert t.max() == latest
    low = t.sort().values[: count - 10].double() * count
    assert ((low - torch.arange(count - 10) - 0.5).abs() <= 0.501).all()
    assert (h == 2.0**-10).all()


def test_step_size_weights_are_as_stated() -> None:
    published, even = published_weights(), even_weights()
    assert float(published.sum()) == pytest.approx(1.0) == float(even.sum())
    torch.testing.assert_close(published[1:] / published[:-1], torch.full((10,), 2.0).double())
    assert float(published[-1]) == pytest.approx(1024 / 2047)
    assert float(even[-1]) == 0.25
    torch.testing.assert_close(even[:-1], torch.full((10,), 0.075).double())
    assert float(even_weights(0.6)[0]) == pytest.approx(0.04)


@pytest.mark.parametrize(
    "weights", [published_weights(), even_weights()], ids=["published", "even"]
)
def test_step_sizes_come_with_their_weights_and_times_on_the_grid(weights: Tensor) -> None:
    objective, count = Distill(UniformSource(V), Polynomial(), weights=weights), 200_000
    t, h = objective._times(count, generator(3))
    cells, exponent = t * 1024, -h.log2()
    assert torch.equal(cells, cells.round()) and torch.equal(exponent, exponent.round())
    assert (t >= 0.0).all() and (t + h <= 1.0).all()
    # Stratified: a count misses its expectation by less than the two parts at its edges.
    counts = torch.bincount(exponent.long(), minlength=11).double()
    assert ((counts - count * weights).abs() <= 2.0).all()
    # Times of one step size: uniform over every cell from which the step does not pass 1.
    for k, number in enumerate(counts.tolist()):
        places = 1025 - 2 ** (10 - k)
        if number > 14 * places:  # an empty cell has a chance below 1e-3 in all
            seen = torch.bincount(cells[exponent == k].long(), minlength=places).double()
            chi_square = float(((seen - number / places) ** 2 * places / number).sum())
            assert len(seen) == places and (seen > 0.0).all()
            assert abs(chi_square - (places - 1)) <= 4.5 * math.sqrt(2 * (places - 1))


def test_step_sizes_of_single_rows_come_with_the_stated_weights() -> None:
    objective = distill_objective()
    source, count = generator(5), 4000
    seen = Counter(float(objective._times(1, source)[1]) for _ in range(count))
    expected = {2.0**-k: float(w) * count for k, w in enumerate(even_weights())}
    chi_square = sum((seen[h] - e) ** 2 / e for h, e in expected.items())
    assert set(seen) == set(expected) and chi_square < 35.6  # 10 degrees, p = 1e-4


def one_hot(exponent: int) -> Tensor:
    weights = torch.zeros(11, dtype=torch.float64)
    weights[exponent] = 1.0
    return weights


def test_rows_with_the_smallest_step_take_the_path_loss_and_never_ask_the_average() -> None:
    objective = Distill(UniformSource(V), Polynomial(), weights=one_hot(10))
    model, ema = Toy(), Toy(1)
    parts = objective.loss(model, ema, batch(0), generator(2))
    assert scalars(parts) == {"loss", "path_loss"} and not ema.seen
    ((x_t, t, h),) = model.seen
    expected = path_loss(model, Batch(x_t, batch(0), t.double(), h.double()), V, Polynomial())
    torch.testing.assert_close(parts["loss"], expected)
    assert (h == 2.0**-10).all()


def test_only_rows_with_larger_steps_reach_the_average() -> None:
    objective = Distill(UniformSource(V), Polynomial(), weights=even_weights(0.5))
    model, ema, x_1 = Toy(), Toy(1), batch(0).repeat(4, 1)
    parts = objective.loss(model, ema, x_1, generator(2))
    ((x_t, t, h),) = model.seen  # one pass with a gradient, those with the smallest step first
    small = int((h == 2.0**-10).sum())
    assert 0 < small < len(h) == 16 and (h[:small] == 2.0**-10).all()
    x_t, t, h = (each[small:] for each in (x_t, t, h))
    assert len(ema.seen) == 4
    for (_, at, half), shift in zip(ema.seen, (0.0, 0.5, 0.5, 1.0), strict=True):
        torch.testing.assert_close(half, h / 2)
        torch.testing.assert_close(at, t + shift * h)
    assert torch.equal(ema.seen[0][0], x_t)
    total = (parts["path_loss"] * small + parts["kl"] * len(h)) / 16
    torch.testing.assert_close(parts["loss"], total)


def test_without_a_smallest_step_there_is_no_path_loss() -> None:
    objective = Distill(UniformSource(V), Polynomial(), weights=one_hot(0))
    parts = objective.loss(Toy(), Toy(1), batch(0), generator())
    assert scalars(parts) == {"loss", "kl"} and torch.equal(parts["loss"].detach(), parts["kl"])


def test_the_divergence_of_larger_steps_can_be_chosen() -> None:
    def rows_of_three(target: Tensor, logits: Tensor) -> Tensor:
        return 3.0 + 0.0 * logits.sum(-1)

    objective = distill_objective(divergence=rows_of_three)
    parts = objective.loss(Toy(), Toy(1), batch(0).repeat(4, 1), generator(2))
    assert float(parts["kl"]) == pytest.approx(3.0)


def test_no_gradient_reaches_the_average() -> None:
    model, ema = Toy(), Toy(1)  # its parameters would take a gradient
    distill_objective().loss(model, ema, batch(0).repeat(3, 1), generator())["loss"].backward()
    assert all(p.grad is None for p in ema.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_objectives_draw_from_their_generator_alone() -> None:
    for objective in (Pretrain(UniformSource(V), Polynomial()), distill_objective()):
        values = []
        for global_seed in (1, 2):
            torch.manual_seed(global_seed)
            state = torch.get_rng_state()
            values.append(objective.loss(Toy(), Toy(1), batch(0), generator(4))["loss"])
            assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(*values)


def network(step_embedding: str = "none", source: str = "uniform") -> Transformer:
    """A tiny published network whose zero-initialised parts are filled, as after training."""
    torch.manual_seed(0)
    config = {"vocab_size": V, "hidden_size": 16, "blocks": 1, "heads": 2, "cond_size": 8}
    model = Transformer(ModelConfig.from_dict({**config, "source": source, "context_length": L}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model if step_embedding == "none" else student_from_teacher(model, step_embedding)


def first_posterior(jumper: Jumper, x_t: Tensor, t: Tensor, h: Tensor) -> Target:
    """A target that is the average's posterior where it stands, at half the step."""
    rows = jumper.hidden(x_t, t, h / 2).flatten(0, 1)
    return Target((rows,), (torch.ones(len(rows)),))


def test_log2_student_starts_in_agreement_with_its_average_at_every_step_size() -> None:
    student = network("log2")
    for exponent in (0, 4, 9):
        objective = Distill(
            UniformSource(V), Polynomial(), target=first_posterior, weights=one_hot(exponent)
        )
        parts = objective.loss(student, Ema(student, 0.9).model, batch(0), generator())
        assert abs(float(parts["kl"])) < 1e-6
    with torch.no_grad():  # the branch of h at work
        student.dt_embedding.mlp[2].weight.normal_(generator=generator())
    parts = objective.loss(student, Ema(student, 0.9).model, batch(0), generator())
    assert float(parts["kl"]) > 1e-3


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("embedding", ["raw", "log2"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_student_takes_an_update_in_all_its_weights(
    source: str, embedding: str, target: str, tmp_path: Path
) -> None:
    student = network(embedding, source)
    before = copy.deepcopy(student.state_dict())
    objective = Distill(
        make_source(source, V), Polynomial(), TARGETS[target], EXACT, even_weights(0.5)
    )
    settings = replace(SETTINGS, steps=2, warmup_steps=0)
    watcher = Recorder()
    run: Run[Transformer] = Run(
        tmp_path, settings, make_task(objective, make_source(source, V)), watcher
    )
    assert run.train(student)
    assert math.isfinite(watcher.losses[-1]) and watcher.losses[-1] > 0.0
    still = [name for name, p in student.state_dict().items() if torch.equal(p, before[name])]
    assert not still


@pytest.mark.parametrize("source", [UniformSource(V), MaskSource(V)], ids=["uniform", "mask"])
def test_the_source_decides_what_hidden_positions_show(source: Source) -> None:
    model, x_1 = Toy(rows=V + 1), torch.zeros((500, L), dtype=torch.int64)
    Pretrain(source, Polynomial()).loss(model, model, x_1, generator())
    shown = set(model.seen[0][0].unique().tolist())
    assert shown == ({0, V} if isinstance(source, MaskSource) else set(range(V)))


# ----------------------------------------------------------------------------------------- loop


def gradients_of_first_update(
    settings: TrainSettings, task: Task, monkeypatch: pytest.MonkeyPatch, directory: Path
) -> tuple[list[Tensor], float]:
    found: list[Tensor] = []

    def keep(self: torch.optim.AdamW) -> None:
        for group in self.param_groups:
            found.extend(p.grad.clone() for p in group["params"])

    monkeypatch.setattr(torch.optim.AdamW, "step", keep)
    monkeypatch.setattr(loop_module, "save_checkpoint", lambda path, state: None)
    directory.mkdir()
    watcher = Recorder()
    Run(directory, settings, task, watcher).train(Toy())
    return found, watcher.losses[0]


def test_accumulated_passes_give_the_mean_of_their_losses_and_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain:
        """No noise, so that passes can be compared one by one."""

        def loss(self, model: Any, ema: Any, x_1: Tensor, generator: Any) -> dict[str, Tensor]:
            hidden = model.body(x_1, torch.zeros(len(x_1)), torch.ones(len(x_1)))
            return {"loss": model.head(hidden).square().mean()}

    once = replace(SETTINGS, steps=1, accumulate=1, clip_norm=1e9)
    alone = []
    for k in (0, 1):
        task = replace(make_task(Plain()), batch=lambda index, k=k: batch(k))
        alone.append(gradients_of_first_update(once, task, monkeypatch, tmp_path / str(k)))
    twice = replace(once, accumulate=2)
    both, loss = gradients_of_first_update(
        twice, make_task(Plain()), monkeypatch, tmp_path / "both"
    )
    assert loss == pytest.approx((alone[0][1] + alone[1][1]) / 2)
    for total, a, b in zip(both, alone[0][0], alone[1][0], strict=True):
        torch.testing.assert_close(total, (a + b) / 2)


@pytest.mark.parametrize("position_loss", POSITION_LOSSES.values(), ids=POSITION_LOSSES)
def test_gradients_under_bfloat16_autocast_are_near_those_in_float32(
    position_loss: PositionLoss,
) -> None:
    torch.manual_seed(3)
    config = ModelConfig(61, 32, blocks=2, heads=2, cond_size=16, step_embedding="log2")
    model = Transformer(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    x_1 = torch.randint(61, (4, 24))
    objective = Pretrain(UniformSource(61), Polynomial(), position_loss)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(1)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = objective.loss(model, model, x_1, generator)["loss"]
        slopes = torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)
        found.append((loss.detach(), torch.cat([g.flatten() for g in slopes if g is not None])))
    (exact, slope), (rough, rough_slope) = found
    assert float(rough) == pytest.approx(float(exact), rel=0.01)
    assert (rough_slope - slope).norm() < 0.03 * slope.norm()
    assert not torch.equal(rough_slope, slope)  # autocast was on


def test_gradients_are_shortened_to_the_clip_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(SETTINGS, steps=1, clip_norm=0.03)
    found, _ = gradients_of_first_update(settings, make_task(), monkeypatch, tmp_path / "run")
    norm = torch.stack([g.norm() for g in found]).norm()
    assert float(norm) == pytest.approx(0.03, rel=1e-3)


def test_every_pass_sees_a_batch_and_noise_of_its_own(tmp_path: Path) -> None:
    asked: list[int] = []

    def noted(index: int) -> Tensor:
        asked.append(index)
        return batch(0)

    model = Toy()
    Run(tmp_path, SETTINGS, replace(make_task(), batch=noted), Recorder()).train(model)
    assert asked == list(range(SETTINGS.steps * SETTINGS.accumulate))
    times = torch.cat([t for _, t, _ in model.seen])
    assert len(times.unique()) == len(times)


def finish(directory: Path, objective: Any = None, watcher: Recorder | None = None) -> Recorder:
    directory.mkdir(exist_ok=True)
    watcher = watcher or Recorder()
    assert Run(directory, SETTINGS, make_task(objective), watcher).train(Toy())
    return watcher


def twin() -> CausalNetwork:
    """A tiny causal language model's, with more heads than keys, and a start token."""
    torch.manual_seed(0)
    shape = {"vocab_size": V, "hidden_size": 24, "blocks": 2, "heads": 6, "cond_size": 8}
    heads = {"kv_heads": 3, "head_size": 4, "mlp_size": 20, "start_id": 1}
    model = CausalNetwork(
        CausalConfig.from_dict({**shape, **heads, "source": "mask", "context_length": L})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("how", "make"), [("recompute", network), ("compile", network), ("compile", twin)]
)
def test_blocks_that_run_otherwise_give_the_same_losses(
    how: str, make: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is traced, a block as one graph, is run as it is: making code of it takes half a minute.
    one_graph = partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", one_graph)
    found: dict[bool, list[float]] = {}
    for asked in (False, True):
        (model := make()).train()
        source = make_source(model.config.source, V)
        objective = Pretrain(source, Polynomial(), POSITION_LOSSES["cross_entropy"])
        settings = replace(SETTINGS, log_every=1, **{how: asked})
        (out := tmp_path / str(asked)).mkdir()
        run: Run[Any] = Run(out, settings, make_task(objective, source), watcher := Recorder())
        assert run.train(model)
        found[asked] = watcher.losses
        assert ("forward" in vars(model.blocks[0])) == asked
    assert len(found[True]) == SETTINGS.steps
    assert found[True] == pytest.approx(found[False], rel=1e-5)


def test_blocks_that_cannot_be_compiled_are_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(graph: object, inputs: object) -> object:
        raise TypeError("mul expected 2 arguments, got 3\nWhile executing %mul")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=refuses))
    run: Run[Any] = Run(tmp_path, replace(SETTINGS, compile=True), make_task(), Recorder())
    with pytest.raises(TrainingError) as caught:
        run.train(network())
    assert str(caught.value) == (
        "The blocks cannot be compiled (mul expected 2 arguments, got 3); run the same command "
        "without compile."
    )
    assert caught.value.fields == ("compile",)


def test_what_is_computed_again_is_not_kept() -> None:
    """Of a block only what goes in: its input, the condition and the tables."""
    kept: dict[bool, int] = {}
    for asked in (False, True):
        run_blocks(model := network(), recompute=asked, compiled=False)
        sizes: list[int] = []
        parameters = {p.data_ptr() for p in model.parameters()}

        def keep(tensor: Tensor, sizes: list[int] = sizes, own: set[int] = parameters) -> Tensor:
            sizes.append(0 if tensor.data_ptr() in own else tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.body(batch(0), torch.rand(B), torch.ones(B))
        kept[asked] = sum(sizes)
    assert kept[True] < kept[False] / 2


def test_the_last_update_is_logged_evaluated_and_saved_off_every_interval(tmp_path: Path) -> None:
    watcher = finish(tmp_path)
    assert watcher.steps == list(range(8))
    assert watcher.evaluations == [4, 7]
    assert [m["step"] for m in metrics(tmp_path) if "loss" in m] == [2, 4, 6, 7]
    model = Toy()
    state = TrainState(model, Ema(model, 0.9), make_optimizer(model, 0.0))
    load_checkpoint(tmp_path / "checkpoint.safetensors", state)
    assert state.step == 7 == state.ema.updates
    assert_same_tensors(watcher.exported, state.ema.model.state_dict())


def test_means_of_a_line_cover_the_updates_since_the_line_before(tmp_path: Path) -> None:
    finish(tmp_path)
    (tmp_path / "all").mkdir()
    each = replace(SETTINGS, log_every=1)
    Run(tmp_path / "all", each, make_task(), Recorder()).train(Toy())
    one = {m["step"]: m["loss"] for m in metrics(tmp_path / "all") if "loss" in m}
    coarse = {m["step"]: m["loss"] for m in metrics(tmp_path) if "loss" in m}
    for step, steps in {2: (1, 2), 4: (3, 4), 6: (5, 6), 7: (7,)}.items():
        assert coarse[step] == pytest.approx(sum(one[s] for s in steps) / len(steps))


def test_a_finished_run_does_nothing_again(tmp_path: Path) -> None:
    finish(tmp_path)
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()}

    def never(index: int) -> Tensor:
        raise AssertionError("a batch was asked for")

    watcher, model = Recorder(), Toy()
    assert Run(tmp_path, SETTINGS, replace(make_task(), batch=never), watcher).train(model)
    assert watcher.steps == [7] and not watcher.evaluations and not watcher.exported
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()} == before


class Killed(BaseException):
    """Stands for SIGKILL."""


def die_at(moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the moment-th touch of the file system (before or after it is done) the last one."""
    clock = itertools.count()

    def mortal(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(clock) == moment:
                raise Killed
            result = function(*args, **kwargs)
            if next(clock) == moment:
                raise Killed
            return result

        return call

    written = mortal(checkpoint_module.write_tensors)
    monkeypatch.setattr(checkpoint_module, "write_tensors", written)
    monkeypatch.setattr(Path, "replace", mortal(Path.replace))
    monkeypatch.setattr(Run, "_write", mortal(Run._write))
    monkeypatch.setattr(Recorder, "saved", mortal(Recorder.saved))
    monkeypatch.setattr(loop_module, "update", mortal(loop_module.update))


@pytest.mark.parametrize("kind", ["pretrain", "distill"])
def test_a_run_killed_at_any_moment_ends_as_if_it_never_was(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = distill_objective() if kind == "distill" else None
    whole = finish(tmp_path / "whole", objective)
    checkpoint = load_file(tmp_path / "whole/checkpoint.safetensors")
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow, and no power fails here
    for moment in itertools.count(step=3 if kind == "pretrain" else 11):  # odd: before and after
        directory = tmp_path / str(moment)
        directory.mkdir()
        died, exported = 0, dict[str, Tensor]()
        # Twice: at this moment of the run, and a little later in the resumed one.
        for again in (moment, 9):
            with pytest.MonkeyPatch.context() as patch:
                die_at(again, patch)
                try:
                    finish(directory, objective, Recorder(exported=exported))
                except Killed:
                    died += 1
        finish(directory, objective, Recorder(exported=exported))
        assert_same_tensors(load_file(directory / "checkpoint.safetensors"), checkpoint)
        assert_same_tensors(exported, whole.exported)
        assert metrics(directory) == metrics(tmp_path / "whole")
        assert {p.name for p in directory.iterdir()} == {"checkpoint.safetensors", "metrics.jsonl"}
        if not died:
            break
    assert moment > 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [0, 2, 3])
def test_a_signal_ends_the_run_after_the_update_with_a_checkpoint(
    number: int, step: int, tmp_path: Path
) -> None:
    whole = finish(tmp_path / "whole")
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def interrupt(now: int) -> None:
        if now == step:
            os.kill(os.getpid(), number)

    stopped = Recorder(on_advance=interrupt)
    directory = tmp_path / "run"
    directory.mkdir()
    assert not Run(directory, SETTINGS, make_task(), stopped).train(Toy())
    assert stopped.steps[-1] == step + 1  # the update in progress was finished
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    resumed = finish(directory)
    assert resumed.steps == list(range(step + 1, 8))
    assert_same_tensors(resumed.exported, whole.exported)
    a, b = (load_file(tmp_path / d / "checkpoint.safetensors") for d in ("run", "whole"))
    assert_same_tensors(a, b)
    assert metrics(directory) == metrics(tmp_path / "whole")


def test_a_second_signal_acts_as_usual(tmp_path: Path) -> None:
    def impatient() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def interrupt(step: int) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    watcher = Recorder(on_advance=interrupt, on_saved=impatient)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            Run(tmp_path, SETTINGS, make_task(), watcher).train(Toy())
    finally:
        signal.signal(signal.SIGINT, before)


def test_training_works_outside_the_main_thread(tmp_path: Path) -> None:
    thread = threading.Thread(target=finish, args=(tmp_path,))
    thread.start()
    thread.join()
    assert len(metrics(tmp_path)) == 6


def test_counters_go_on_across_sessions(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outside.time, "perf_counter", itertools.count(500).__next__)
        finish(tmp_path / "one")
        for stop in (2, 4, 99):

            def interrupt(step: int, stop: int = stop) -> None:
                if step == stop:
                    os.kill(os.getpid(), signal.SIGINT)

            (tmp_path / "many").mkdir(exist_ok=True)
            Run(tmp_path / "many", SETTINGS, make_task(), Recorder(interrupt)).train(Toy())
    lines = [m for m in metrics(tmp_path / "many", set()) if "loss" in m]
    assert [m["tokens"] for m in lines] == [m["step"] * 2 * B * L for m in lines]
    seconds = [m["elapsed_seconds"] for m in lines]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert all(m["tokens_per_second"] > 0 for m in lines)


class NotFinite:
    """Pretraining, but of some batches the loss, or only its gradient, is not finite."""

    def __init__(self, what: str, *batches: int) -> None:
        self.what, self.bad = what, [batch(index) for index in batches]
        self.good = Pretrain(UniformSource(V), Polynomial())

    def loss(self, model: Any, ema: Any, x_1: Tensor, generator: Any) -> dict[str, Tensor]:
        parts = self.good.loss(model, ema, x_1, generator)
        if not any(torch.equal(x_1, other) for other in self.bad):
            return parts
        if self.what == "gradient":
            zero = model.out.bias.sum() * 0.0
            return {"loss": parts["loss"] + torch.sqrt(zero * zero)}  # 0, of slope 0 / 0
        return {"loss": parts["loss"] * float(self.what)}


@pytest.mark.parametrize("what", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("update", [0, 3, 6])
def test_an_update_that_is_not_finite_is_skipped_and_counted(
    what: str, update: int, tmp_path: Path
) -> None:
    """One of its two passes is bad; what the run keeps is as if it had not been there."""
    objective = NotFinite(what, 2 * update + 1)
    weights: list[dict[str, Tensor]] = []
    model = Toy()
    watcher = Recorder(lambda step: weights.append(copy.deepcopy(model.state_dict())))
    assert Run(tmp_path, SETTINGS, make_task(objective), watcher).train(model)
    for step, (before, after) in enumerate(itertools.pairwise(weights)):
        same = all(torch.equal(before[name], after[name]) for name in before)
        assert same == (step == update)
    lines = [m for m in metrics(tmp_path) if "loss" in m]
    assert [m.get("skipped", 0) for m in lines] == [
        int(low <= update < m["step"]) for low, m in zip((0, 2, 4, 6), lines, strict=True)
    ]
    assert all(math.isfinite(m["loss"]) for m in lines)
    assert all(p.isfinite().all() for p in watcher.exported.values())


def test_a_run_with_skipped_updates_resumes_to_the_last_bit(tmp_path: Path) -> None:
    objective = NotFinite("nan", 2, 3, 5, 9)
    whole = finish(tmp_path / "whole", objective)
    for stop in range(1, 6):

        def interrupt(step: int, stop: int = stop) -> None:
            if step == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        directory = tmp_path / str(stop)
        directory.mkdir()
        assert not Run(directory, SETTINGS, make_task(objective), Recorder(interrupt)).train(Toy())
        assert_same_tensors(finish(directory, objective).exported, whole.exported)
        files = (load_file(d / "checkpoint.safetensors") for d in (tmp_path / "whole", directory))
        assert_same_tensors(*({k: x.nan_to_num(-1.0) for k, x in file.items()} for file in files))
        assert metrics(directory) == metrics(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("first", [True, False])
def test_an_optimizer_that_is_told_to_skip_changes_nothing(kind: str, first: bool) -> None:
    def after(flags: list[bool]) -> tuple[Transformer, Any]:
        model = network("log2", "uniform")
        optimizer = make_optimizer(model, 0.1, kind)
        optimizer.set_learning_rate(0.01)
        good = itertools.count()
        for flag in flags:
            noise = generator(next(good) if flag else 99)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=noise) / float(flag)
            optimizer.step(torch.tensor(flag))
        return model, [optimizer.moments(p) for p in model.parameters()]

    skipping, plain = [False, True, True] if first else [True, False, True], [True, True]
    (a, kept), (b, expected) = after(skipping), after(plain)
    assert_same_tensors(a.state_dict(), b.state_dict())
    for one, other in zip(kept, expected, strict=True):
        assert_same_tensors(one, other)


@pytest.mark.parametrize("log_every", [1, 4, 100])
def test_ten_in_a_row_that_are_not_finite_stop_the_run_with_advice(
    log_every: int, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    settings = replace(SETTINGS, steps=40, log_every=log_every, evaluate_every=100)
    bad = [2 * update for update in range(5, 14)]  # nine, and later ten
    assert Run(kept, settings, make_task(NotFinite("nan", *bad)), Recorder()).train(Toy())
    bad += [2 * update for update in range(20, 30)]
    watcher = Recorder()
    with pytest.raises(TrainingError, match="not finite in 10 updates in a row") as caught:
        Run(tmp_path, settings, make_task(NotFinite("nan", *bad)), watcher).train(Toy())
    assert "\n" not in str(caught.value) and "checkpoint is kept" in str(caught.value)
    assert "learning_rate" in str(caught.value)
    assert 29 <= watcher.steps[-1] <= 33
    saved = load_file(tmp_path / "checkpoint.safetensors")
    assert all(x.isfinite().all() for name, x in saved.items() if not name.startswith("pending"))


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    model = Toy()

    def ruin(step: int) -> None:
        if step == 5:
            with torch.no_grad():
                model.out.bias[0] = math.inf

    with pytest.raises(TrainingError, match="its last checkpoint is kept"):
        Run(tmp_path, SETTINGS, make_task(), Recorder(ruin)).train(model)
    assert finish(tmp_path).steps[0] == 3


def test_evaluation_changes_neither_weights_nor_noise_nor_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Toy()
    state = TrainState(model.train(), Ema(model, 0.9), make_optimizer(model, 0.0), step=5)
    before = copy.deepcopy((model.state_dict(), state.ema.model.state_dict()))
    noise = torch.get_rng_state()
    run = Run(tmp_path, SETTINGS, make_task(), Recorder())
    run._evaluate(state)
    run._evaluate(state)
    assert torch.equal(torch.get_rng_state(), noise)
    assert model.training and not state.ema.model.training and state.ema.updates == 0
    assert not model.seen, "the average is evaluated, not the model"
    assert_same_tensors(model.state_dict(), before[0])
    assert_same_tensors(state.ema.model.state_dict(), before[1])
    first, second = metrics(tmp_path)
    assert first == second and first["step"] == 5


def test_evaluating_more_often_does_not_change_the_run(tmp_path: Path) -> None:
    runs = []
    for every in (1, 100):
        (tmp_path / str(every)).mkdir()
        settings = replace(SETTINGS, evaluate_every=every, log_every=every, checkpoint_every=every)
        watcher = Recorder()
        Run(tmp_path / str(every), settings, make_task(), watcher).train(Toy())
        runs.append(watcher.exported)
    assert_same_tensors(*runs)


def test_validation_does_not_depend_on_how_it_is_cut_into_batches(tmp_path: Path) -> None:
    model = Toy()
    state = TrainState(model, Ema(model, 0.9), make_optimizer(model, 0.0))
    task = replace(make_task(), validation=batch(7)[:3])
    for size in (1, 2, 3, 64):
        settings = replace(SETTINGS, batch_size=size)
        Run(tmp_path, settings, task, Recorder())._evaluate(state)
    whole, *others = (m["elbo_nats_per_token"] for m in metrics(tmp_path))
    assert others == pytest.approx([whole] * 3, rel=1e-5)


# ----------------------------------------------------------------------------------- checkpoint


def trained_state(steps: int = 2) -> TrainState[Toy]:
    model = Toy()
    state = TrainState(model, Ema(model, 0.9), make_optimizer(model, 0.1))
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator(state.step))
        state.optimizer.step()
        state.ema.update(model)
        state.step += 1
    return state


def fresh_state() -> TrainState[Toy]:
    model = Toy(9)
    return TrainState(model, Ema(model, 0.9), make_optimizer(model, 0.1))


def test_a_checkpoint_holds_the_whole_state(tmp_path: Path) -> None:
    state, path = trained_state(), tmp_path / "checkpoint.safetensors"
    state.elapsed_seconds = 12.5
    state.pending = {"loss": [torch.tensor(0.1), torch.tensor(0.7)], "kl": [torch.tensor(0.3)]}
    save_checkpoint(path, state)
    found = fresh_state()
    load_checkpoint(path, found)
    assert (found.step, found.ema.updates, found.elapsed_seconds) == (2, 2, 12.5)
    assert_same_tensors(found.model.state_dict(), state.model.state_dict())
    assert_same_tensors(found.ema.model.state_dict(), state.ema.model.state_dict())
    assert found.pending.keys() == state.pending.keys()
    assert all(
        torch.equal(torch.stack(found.pending[k]), torch.stack(v)) for k, v in state.pending.items()
    )
    for p, q in zip(state.model.parameters(), found.model.parameters(), strict=True):
        ours, theirs = state.optimizer.moments(p), found.optimizer.moments(q)
        assert ours.keys() == {"exp_avg", "exp_avg_sq"}
        assert_same_tensors(ours, theirs)


def test_a_checkpoint_from_before_these_fields_existed_still_loads(tmp_path: Path) -> None:
    state, path = trained_state(), tmp_path / "checkpoint.safetensors"
    facts = {"state": json.dumps({"step": 2, "ema_updates": 2})}
    save_checkpoint(path, state)
    save_file(load_file(path), path, metadata=facts)
    load_checkpoint(path, found := fresh_state())
    assert found.step == 2 and found.elapsed_seconds == 0.0 and found.pending == {}


def damaged(path: Path) -> dict[str, Callable[[], Any]]:
    data = path.read_bytes()
    tensors = {name: t.clone() for name, t in load_file(path).items()}  # not the mapped file
    facts = {"state": json.dumps({"step": 2, "ema_updates": 2})}

    def save(metadata: Any = facts, **changes: Tensor | None) -> None:
        changed = {k: v for k, v in {**tensors, **changes}.items() if v is not None}
        save_file(changed, path, metadata=metadata)

    return {
        "empty": lambda: path.write_bytes(b""),
        "in its length": lambda: path.write_bytes(data[:5]),
        "in its header": lambda: path.write_bytes(data[:100]),
        "in its tensors": lambda: path.write_bytes(data[:-7]),
        "one bit": lambda: path.write_bytes(data[:-7] + bytes([data[-7] ^ 1]) + data[-6:]),
        "noise": lambda: path.write_bytes(bytes(range(256)) * 9),
        "no metadata": lambda: save(None),
        "foreign metadata": lambda: save({"format": "pt"}),
        "metadata not JSON": lambda: save({"state": "{"}),
        "metadata not a dict": lambda: save({"state": "[1]"}),
        "step not a number": lambda: save({"state": '{"step": "x", "ema_updates": 1}'}),
        "missing weight": lambda: save(**{"model.out.bias": None}),
        "missing moment": lambda: save(**{"exp_avg.out.bias": None}),
        "other shape": lambda: save(**{"model.out.bias": torch.zeros(V + 1)}),
        "shape that would broadcast": lambda: save(**{"ema.out.bias": torch.zeros(1)}),
        "moment of another shape": lambda: save(**{"exp_avg_sq.out.bias": torch.zeros(1)}),
        "a directory": lambda: (path.unlink(), path.mkdir()),
    }


def test_a_damaged_checkpoint_gives_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, trained_state())
    for name, damage in damaged(path).items():
        damage()
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path, fresh_state())
        message = str(caught.value)
        assert str(path) in message and "delete it" in message and "\n" not in message, name


def test_the_last_checkpoints_stay_and_a_run_goes_on_from_an_older_one(tmp_path: Path) -> None:
    (whole := tmp_path / "whole").mkdir()
    Run(whole, SETTINGS, make_task(), Recorder()).train(Toy())
    (out := tmp_path / "out").mkdir()
    settings = replace(SETTINGS, checkpoint_every=1, keep_checkpoints=3)
    Run(out, settings, make_task(), Recorder()).train(Toy())
    name = "checkpoint.safetensors"
    older = ["checkpoint-5.safetensors", "checkpoint-6.safetensors"]
    assert sorted(path.name for path in out.glob("*.safetensors")) == [*older, name]
    (out / name).write_bytes((out / name).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"or put {older[1]} in its place"):
        Run(out, settings, make_task(), Recorder()).train(Toy())
    (out / older[0]).replace(out / name)
    Run(out, replace(settings, keep_checkpoints=1), make_task(), watcher := Recorder()).train(Toy())
    assert watcher.steps == [5, 6, 7]
    assert [path.name for path in out.glob("*.safetensors")] == [name]
    found, expected = load_file(out / name), load_file(whole / name)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("where", ["write", "rename"])
def test_a_full_disk_leaves_the_old_checkpoint_and_no_rest(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, trained_state())
    before = path.read_bytes()

    def full(first: Any, *args: Any, **kwargs: Any) -> None:
        if where == "write":
            first.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "write":
        monkeypatch.setattr(checkpoint_module, "write_tensors", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        save_checkpoint(path, trained_state(3))
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before


def test_a_write_that_the_system_refuses_leaves_the_old_checkpoint_and_no_rest(
    tmp_path: Path,
) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, trained_state())
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="Cannot write") as caught:
            save_checkpoint(path, trained_state(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before


def test_metrics_that_cannot_be_written_give_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl") as caught:
        finish(tmp_path)
    assert "\n" not in str(caught.value)


def test_lines_past_the_checkpoint_and_torn_ones_are_forgotten(tmp_path: Path) -> None:
    finish(tmp_path / "whole")
    directory = tmp_path / "run"

    def stop(step: int) -> None:
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        finish(directory, watcher=Recorder(stop))
    with (directory / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "loss": 1.5}\n3\n{"loss": 2}\n\xff\x00\n{"step": 2, "lo')
    finish(directory)
    assert metrics(directory) == metrics(tmp_path / "whole")


# ------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("steps", [0, -1]),
        ("batch_size", [0]),
        ("accumulate", [0]),
        ("log_every", [0]),
        ("evaluate_every", [0]),
        ("checkpoint_every", [0]),
        ("validation_sequences", [0]),
        ("warmup_steps", [-1]),
        ("learning_rate", [0.0, -1.0, math.nan, math.inf]),
        ("weight_decay", [-0.1, math.nan, math.inf]),
        ("clip_norm", [0.0, -1.0, math.nan]),
        ("ema_decay", [-0.1, 1.0, math.nan]),
        ("final_fraction", [-0.1, 1.1, math.nan]),
        ("seed", [-1, 2**63]),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(name: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=name) as caught:
            replace(SETTINGS, **{name: value})
        assert str(value).removesuffix(".0") in str(caught.value)


def test_numbers_at_the_edge_of_their_range_are_taken() -> None:
    replace(SETTINGS, warmup_steps=0, weight_decay=0.0, ema_decay=0.0, seed=2**63 - 1)
    replace(SETTINGS, final_fraction=0.0, clip_norm=math.inf, steps=1)


def test_an_average_is_taken_from_a_checkpoint_and_what_was_not_trained_stays(
    tmp_path: Path,
) -> None:
    file, model = tmp_path / "checkpoint.safetensors", torch.nn.Linear(2, 3)
    weight, bias = torch.arange(6.0).view(3, 2), model.bias.detach().clone()
    save_file({"ema.weight": weight, "model.weight": -weight}, file)
    load_average(file, model)
    assert torch.equal(model.weight, weight) and torch.equal(model.bias, bias)
    save_file({"ema.weight": weight, "ema.other": bias}, file)
    with pytest.raises(CheckpointError, match=r"another network: it has ema.other"):
        load_average(file, model)
    file.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="Cannot read"):
        load_average(file, model)
