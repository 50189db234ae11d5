"""The twin of a causal language model: what it sees, its engine, its students, its directory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from language_models import tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from fsdfm.core.errors import CheckpointError, ConfigError
from fsdfm.model import engine as engine_module
from fsdfm.model.causal import CausalConfig, CausalNetwork
from fsdfm.model.config import ModelConfig
from fsdfm.model.engine import Engine
from fsdfm.model.int8 import has_int8
from fsdfm.model.io.pretrained import load_pretrained, save_pretrained
from fsdfm.model.networks import build_network, config_from_dict, config_to_dict
from fsdfm.model.student import student_from_teacher

V, T, H = 83, 0.3, 0.125
needs_int8 = pytest.mark.skipif(not has_int8(), reason="this CPU has no fast 8-bit products")

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "tied": False},
    "qwen3": {"qk_norm": True, "head_size": 20},
    "no shift": {"start_id": None, "kv_heads": 4},
    "causal": {"attention": "causal", "tied": False},
    "joint": {"neighbours": 2, "step_embedding": "raw"},
}


def config(**changes: Any) -> CausalConfig:
    shape = {
        "vocab_size": V,
        "hidden_size": 48,
        "blocks": 3,
        "heads": 4,
        "cond_size": 16,
        "context_length": 64,
        "source": "mask",
        "step_embedding": "log2",
        "kv_heads": 2,
        "head_size": 12,
        "mlp_size": 56,
        "start_id": 7,
    }
    return CausalConfig(**{**shape, **changes})


def network(std: float = 0.15, **changes: Any) -> CausalNetwork:
    """Nothing is left at its silent zero, so every norm, bias and modulation is seen."""
    model = CausalNetwork(config(**changes))
    draw = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        mean = float("norm" in name)
        nn.init.normal_(parameter, mean=mean, std=std, generator=draw)
    return model.eval()


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(V + 1, (batch, length), generator=torch.Generator().manual_seed(seed))


def some_rows(batch: int, length: int, share: float = 0.3) -> Tensor:
    chosen = torch.rand(batch * length, generator=torch.Generator().manual_seed(2)) < share
    return chosen.nonzero()[:, 0]


@torch.no_grad()
def by_the_network(model: CausalNetwork, x: Tensor, rows: Tensor) -> Tensor:
    times = torch.full((len(x),), T), torch.full((len(x),), H)
    return model.body(x, *times).flatten(0, 1)[rows]


@torch.no_grad()
def seen(model: CausalNetwork, length: int = 6) -> list[list[bool]]:
    """Whether row i moves where token j is changed."""
    x, one = tokens(1, length) % V, torch.ones(1)
    before = model(x, T * one, H * one)[0]
    rows = []
    for j in range(length):
        changed = x.clone()
        changed[0, j] = V
        rows.append((model(changed, T * one, H * one)[0] - before).abs().amax(-1) > 1e-6)
    return torch.stack(rows, 1).tolist()


# What it is.


def test_every_row_sees_every_token_or_as_a_language_model_those_before_it() -> None:
    assert all(all(row) for row in seen(network()))
    assert all(all(row) for row in seen(network(start_id=None)))
    before = [[j < i for j in range(6)] for i in range(6)]
    assert seen(network(attention="causal")) == before
    itself = [[j <= i for j in range(6)] for i in range(6)]
    assert seen(network(attention="causal", start_id=None)) == itself


@pytest.mark.parametrize("shape", SHAPES)
def test_a_fresh_network_hears_neither_time_nor_step_size(shape: str) -> None:
    model, x = CausalNetwork(config(**SHAPES[shape])).eval(), tokens(2, 9)
    with torch.no_grad():
        here = model(x, torch.tensor([0.1, 0.2]), torch.tensor([0.5, 1.0]))
        there = model(x, torch.tensor([0.9, 0.6]), torch.tensor([0.01, 0.25]))
    assert torch.equal(here, there)
    trained, one = network(**SHAPES[shape]), torch.ones(2)
    with torch.no_grad():
        before = trained(x, T * one, H * one)
        assert (trained(x, 0.5 * one, H * one) - before).abs().max() > 0.01
        assert (trained(x, T * one, H / 8 * one) - before).abs().max() > 0.001


@torch.no_grad()
def test_sequences_of_a_batch_do_not_see_each_other() -> None:
    model, x = network(), tokens(3, 9)
    t, h = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.5, 0.25, 0.125])
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], h[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, model(x, t, h), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_reach_every_parameter(shape: str) -> None:
    """A joint head has an objective of its own: here its parameters stay."""
    torch.manual_seed(3)
    model = CausalNetwork(config(**SHAPES[shape]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, t, h = tokens(3, 9) % V, torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.5, 0.25, 0.125])
    reached: set[str] = set()
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(x, t, h).flatten(0, 1), x.flip(1).flatten()).backward()
        reached |= {
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and parameter.grad.abs().max() > 0
        }
        optimizer.step()
    wanted = {name for name, _ in model.named_parameters() if not name.startswith("joint.")}
    assert reached == wanted


def test_under_autocast_it_errs_by_rounding_alone() -> None:
    model, x, rows = network(0.1), tokens(2, 40), torch.arange(80)
    exact = by_the_network(model, x, rows)
    with torch.autocast("cpu", torch.bfloat16):
        found = by_the_network(model, x, rows)
    error = (found.float() - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.03


# The engine.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("batch", "at_once"), [(1, 1000), (4, 7), (4, 25), (4, 1000)])
def test_hidden_rows_of_the_engine_are_the_networks(
    shape: str, batch: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "ROWS_AT_ONCE", at_once)
    model, x = network(**SHAPES[shape]), tokens(batch, 11)
    ours = Engine(model, torch.float32)
    for rows in (torch.arange(x.numel()), some_rows(batch, 11), torch.tensor([x.numel() - 1])):
        found, wanted = ours.hidden(x, T, H, rows), by_the_network(model, x, rows)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.equal(ours.hidden(x, T, H / 4, rows), found)
    logits = ours.head(found)
    assert logits.shape == (1, V + 1)
    torch.testing.assert_close(logits, model.head(found).detach())


def test_the_engine_tells_its_rows_what_the_network_tells_them() -> None:
    model, x, at = network(neighbours=2), tokens(2, 11), torch.tensor([0, 5, 12])
    known = torch.rand(2, 11, generator=torch.Generator().manual_seed(1)) < 0.5
    rows = torch.randn(3, 48, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = model.told(rows, at, x, known)
    assert (wanted - rows).abs().max() > 0.1
    found = Engine(model, torch.float32).told(rows, at, x, known)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 2])
def test_bfloat16_is_as_near_to_float32_as_autocast_is(shape: str, batch: int) -> None:
    model, x = network(0.1, **SHAPES[shape]), tokens(batch, 60)
    rows = torch.arange(x.numel())
    exact = by_the_network(model, x, rows)
    with torch.autocast("cpu", torch.bfloat16):
        usual = by_the_network(model, x, rows)
    found = Engine(model, torch.bfloat16).hidden(x, T, H, rows)
    assert found.dtype == torch.bfloat16
    error, usual_error = ((y.float() - exact).norm() for y in (found, usual))
    assert error < 1.4 * usual_error  # two draws of one size: a dozen of them differ by 1.25


@needs_int8
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_8_bits_say_nearly_what_float32_says(shape: str, batch: int) -> None:
    model, x = network(0.1, **SHAPES[shape]), tokens(batch, 40)
    rows = torch.arange(0, x.numel(), 3)
    exact, ours = Engine(model, torch.float32), Engine(model, torch.int8)
    known = torch.rand(x.shape, generator=torch.Generator().manual_seed(4)) < 0.5
    truth = exact.head(exact.told(exact.hidden(x, T, H, rows), rows, x, known))
    found = ours.head(ours.told(ours.hidden(x, T, H, rows), rows, x, known))
    error = (found.float() - truth).norm() / truth.norm()
    assert 0.001 < error < 0.06


# Students.


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_student_starts_equal_to_its_teacher_at_every_step_size(tied: bool) -> None:
    teacher, x = network(step_embedding="none", tied=tied), tokens(2, 9)
    wanted = teacher(x, torch.full((2,), T), torch.ones(2))
    student = student_from_teacher(teacher, "log2").eval()
    assert student.config == replace(teacher.config, step_embedding="log2")
    for h in (1.0, 0.25, 2.0**-10):
        assert torch.equal(student(x, torch.full((2,), T), torch.full((2,), h)), wanted)
    joint = student_from_teacher(teacher, "none", neighbours=2).eval()
    assert torch.equal(joint(x, torch.full((2,), T), torch.ones(2)), wanted)
    rows = torch.randn(3, 48)
    at, known = torch.tensor([0, 5, 12]), torch.ones(2, 9, dtype=torch.bool)
    assert torch.equal(joint.told(rows, at, x, known), rows)


# Config and directory.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kv_heads": 3}, "heads=4 must be a multiple of kv_heads=3"),
        ({"kv_heads": 0}, "kv_heads must be a whole number"),
        ({"head_size": 7}, "head_size=7 must be even"),
        ({"head_size": 8.0}, "head_size must be a whole number"),
        ({"mlp_size": True}, "mlp_size must be a whole number"),
        ({"attention": "sideways"}, "bidirectional or causal, got 'sideways'"),
        ({"start_id": V}, f"start_id must be a token below {V}"),
        ({"start_id": -1}, "start_id"),
        ({"vocab_size": 0}, "vocab_size"),
    ],
)
def test_a_config_refuses_what_cannot_work(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(**changes)


def test_configs_say_which_network_they_are_of() -> None:
    twin, published = config(), ModelConfig(V, 48, 3, 4, 16)
    assert config_to_dict(twin)["network"] == "causal" and "network" not in config_to_dict(
        published
    )
    for each in (twin, published):
        assert config_from_dict(config_to_dict(each)) == each
        assert build_network(each).config is each
    with pytest.raises(ConfigError, match="network must be one of published, causal, got 'rnn'"):
        config_from_dict({"network": "rnn"})
    with pytest.raises(ConfigError, match="unknown fields kv_heads"):
        config_from_dict({**config_to_dict(published), "kv_heads": 2})
    values = config_to_dict(twin)
    del values["mlp_size"]
    with pytest.raises(ConfigError, match="mlp_size"):
        config_from_dict(values)


def test_only_masks_absorb() -> None:
    assert config().absorbing and not config(source="uniform").absorbing
    shape = (V, 48, 3, 4, 16)
    assert ModelConfig(*shape, source="mask").absorbing and not ModelConfig(*shape).absorbing


@pytest.mark.parametrize("shape", SHAPES)
def test_a_directory_keeps_the_network(shape: str, tmp_path: Path) -> None:
    text = tokenizer(300).to_json()
    model = network(**{**SHAPES[shape], "vocab_size": 300})
    save_pretrained(tmp_path / "m", model, tokenizer_json=text)
    found = load_pretrained(tmp_path / "m").model
    assert found.config == model.config and type(found) is CausalNetwork
    x = tokens(2, 9)
    with torch.no_grad():
        times = torch.full((2,), T), torch.full((2,), H)
        assert torch.equal(found(x, *times), model(x, *times))
    half = tmp_path / "half"
    save_pretrained(half, model, tokenizer_json=text, dtype=torch.bfloat16)
    assert load_pretrained(half).model.vocab_embed.weight.dtype == torch.float32


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    save_pretrained(
        tmp_path / "m", network(vocab_size=300), tokenizer_json=tokenizer(300).to_json()
    )
    path = tmp_path / "m" / "config.json"
    path.write_text(path.read_text().replace('"tied": true', '"tied": false'))
    with pytest.raises(CheckpointError, match=r"different models"):
        load_pretrained(tmp_path / "m")
