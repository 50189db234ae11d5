"""What test_other_device.py runs in a process of its own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from other_device import DEVICE, Elsewhere, OtherDevice, inside, moved
from torch import Tensor

from fsdfm.flow.grid import even_grid
from fsdfm.flow.loss import elbo_nats_per_token
from fsdfm.flow.path import make_source
from fsdfm.flow.posterior import INDEPENDENT, Grouped, Sequences
from fsdfm.flow.sampler import Drawing, Noise, sample
from fsdfm.flow.schedule import Polynomial
from fsdfm.flow.step import EXACT
from fsdfm.flow.target import TARGETS
from fsdfm.generate.options import SamplingOptions
from fsdfm.generate.track import Track, call, start
from fsdfm.model.causal import CausalConfig, CausalNetwork
from fsdfm.model.config import ModelConfig
from fsdfm.model.engine import Engine
from fsdfm.model.transformer import FlowNetwork, Transformer
from fsdfm.train.checkpoint import TrainState
from fsdfm.train.ema import Ema
from fsdfm.train.loop import Task, TrainSettings, update
from fsdfm.train.objective import Distill, Joint, Objective, Pretrain, even_weights
from fsdfm.train.optim import make_optimizer

V, L, B = 11, 12, 6
SHAPE: dict[str, Any] = {"vocab_size": V, "hidden_size": 16, "heads": 2}
OBJECTIVES = ("pretrain", *TARGETS, "joint")
CASES = [("published", "uniform"), ("published", "mask"), ("causal", "uniform"), ("causal", "mask")]


def network(kind: str, source: Any, joint: bool, blocks: int = 2) -> FlowNetwork:
    torch.manual_seed(1)
    shape = {**SHAPE, "blocks": blocks, "cond_size": 8, "source": source, "context_length": L}
    shape |= {"step_embedding": "none" if joint else "log2", "neighbours": 2 if joint else 0}
    if kind == "published":
        model: FlowNetwork = Transformer(ModelConfig(**shape))
    else:
        model = CausalNetwork(
            CausalConfig(**shape, kv_heads=1, head_size=8, mlp_size=24, start_id=0)
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def objective(name: str, source: Any) -> Objective:
    if name == "pretrain":
        return Pretrain(source, Polynomial(), frozen_share=0.5)
    if name == "joint":
        return Joint(source, Polynomial())
    return Distill(source, Polynomial(), TARGETS[name], EXACT, even_weights(0.5))


def updated(
    name: str, kind: str, source: str, device: torch.device, optimizer: str = "adamw"
) -> tuple[Tensor, FlowNetwork]:
    """The loss of one update, and the network after it; on the CPU or under OtherDevice."""
    model = network(kind, source, name == "joint", blocks=1)
    ema = Ema(model, 0.9)
    if device == DEVICE:
        moved(model), moved(ema.model)
    origin = make_source(source, V)
    state = TrainState(model, ema, make_optimizer(model, 0.1, optimizer))
    x_1 = torch.randint(V, (B, L), generator=torch.Generator().manual_seed(3))
    settings = TrainSettings(
        steps=9, batch_size=B, learning_rate=0.01, warmup_steps=0, accumulate=2
    )
    task = Task(
        objective=objective(name, origin),
        source=origin,
        schedule=Polynomial(),
        batch=lambda _: x_1,
        validation=x_1,
        device=device,
        autocast=torch.float32,
    )
    update(state, settings, task)
    return torch.stack(state.pending["loss"]), model


@pytest.mark.parametrize(("kind", "source"), CASES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_update_needs_no_float64_waits_for_nothing_and_is_the_cpus(
    name: str, kind: str, source: str
) -> None:
    with OtherDevice() as device:
        loss, model = updated(name, kind, source, DEVICE)
        assert not device.waits
    expected, same = updated(name, kind, source, torch.device("cpu"))
    torch.testing.assert_close(inside(loss), expected, rtol=1e-4, atol=1e-5)
    for p, q in zip(model.parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(inside(p), q.detach(), rtol=1e-3, atol=1e-3)


def test_muon_waits_for_nothing_either() -> None:
    with OtherDevice() as device:
        updated("pretrain", "published", "uniform", DEVICE, "muon")
        assert not device.waits


@pytest.mark.parametrize(("kind", "source"), CASES)
@pytest.mark.parametrize("joint", [False, True])
def test_the_bound_and_a_sample_need_no_float64(kind: str, source: str, joint: bool) -> None:
    origin = make_source(source, V)
    x_1 = torch.randint(V, (B, L), generator=torch.Generator().manual_seed(4))

    def found(place: torch.device) -> tuple[list[float], Tensor]:
        model = network(kind, source, joint).eval()
        data = x_1
        if place == DEVICE:
            moved(model)
            data = x_1.to(DEVICE)
        bound = list(elbo_nats_per_token(model, data, origin, times=3))
        noise, sampled = Noise(range(3)), Sequences(model, place)
        *_, last = sample(
            sampled,
            noise.start(origin, L),
            even_grid(4),
            noise,
            origin,
            drawing=Drawing(posterior=Grouped(sampled, 3)),
        )
        return bound, last.x

    with OtherDevice():
        bound, x = found(DEVICE)
    expected, same = found(torch.device("cpu"))
    assert bound == pytest.approx(expected, rel=1e-4)
    assert torch.equal(x, same)


@pytest.mark.parametrize(("kind", "source"), CASES)
@pytest.mark.parametrize("joint", [False, True])
def test_a_call_waits_for_its_tokens_and_for_nothing_before(
    kind: str, source: str, joint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Elsewhere, "float64", True)  # as CUDA has; texts are drawn in it
    how = SamplingOptions(steps=4, draws=3 if joint else 1)

    def texts(place: torch.device, count: int) -> Tensor:
        model = network(kind, source, joint).eval()
        if place == DEVICE:
            moved(model)
        engine = Engine(model, torch.float32)
        asked: Any = SimpleNamespace(
            engine=engine,
            config=model.config,
            state_device=place,
            posterior=lambda how: Grouped(engine, how.draws) if joint else INDEPENDENT,
        )
        tracks = []
        for seed in range(count):
            noise = torch.Generator().manual_seed(seed)
            x, free = start(asked, noise, L), torch.ones(L, dtype=torch.bool)
            tracks.append(Track(x, free, even_grid(4).tolist(), how, how.controls(), noise))
        calls = sum(call(asked, tracks) for _ in range(4))
        assert calls == 4
        return torch.stack([track.x for track in tracks])

    for count in (1, 3):
        with OtherDevice() as device:
            found = texts(DEVICE, count)
        assert device.waits == {"aten._to_copy.default": 2 * 4}  # tokens, and what is noted of them
        assert torch.equal(found, texts(torch.device("cpu"), count))


def test_the_device_of_these_tests_refuses_and_counts() -> None:
    with OtherDevice() as device:
        x = torch.arange(4.0, device=DEVICE)
        with pytest.raises(TypeError, match="no float64"):
            x.double()
        with pytest.raises(TypeError, match="no float64"):
            torch.zeros(2, dtype=torch.float64, device=DEVICE)
        with pytest.raises(AssertionError, match="mixes devices"):
            x + torch.ones(4)
        assert not device.waits
        mask = x > 1.0
        waits = [
            lambda: bool(mask.any()),
            lambda: x[mask],
            lambda: mask.nonzero(),
            lambda: x.to("cpu"),
            lambda: x.sum().item(),
            lambda: x.masked_select(mask),
        ]
        for count, wait in enumerate(waits, start=1):
            wait()
            assert len(device.waits) >= 1 and sum(device.waits.values()) >= count
        before = sum(device.waits.values())
        x[torch.tensor([0, 2]).to(DEVICE)] = 1.0
        torch.where(mask, x, 0.0).sum()
        assert sum(device.waits.values()) == before
