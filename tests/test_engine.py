"""The engine says what the network says, at the rows it is asked for."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fsdfm.model import engine as engine_module
from fsdfm.model.causal import CausalConfig, CausalNetwork
from fsdfm.model.config import ModelConfig
from fsdfm.model.engine import Engine
from fsdfm.model.int8 import has_int8
from fsdfm.model.networks import build_network
from fsdfm.model.transformer import Transformer

T, H = 0.3, 0.125


def network(**changes: Any) -> Transformer:
    """Nothing is left at its silent zero, so every modulation, gate and bias is seen."""
    shape = {"vocab_size": 83, "hidden_size": 48, "blocks": 3, "heads": 3, "cond_size": 16}
    model = Transformer(ModelConfig(**{**shape, "step_embedding": "log2", **changes}))
    draw = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15, generator=draw)
    return model.eval()


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(83, (batch, length), generator=torch.Generator().manual_seed(seed))


def some_rows(batch: int, length: int, share: float = 0.3) -> Tensor:
    chosen = torch.rand(batch * length, generator=torch.Generator().manual_seed(2)) < share
    return chosen.nonzero()[:, 0]


def by_the_network(model: Transformer, x: Tensor, rows: Tensor) -> Tensor:
    times = torch.full((len(x),), T), torch.full((len(x),), H)
    with torch.no_grad():
        return model.body(x, *times).flatten(0, 1)[rows]


@pytest.mark.parametrize("step_embedding", ["none", "raw", "log2"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("at_once", [7, 25, 1000])
def test_hidden_rows_are_the_networks(
    step_embedding: str, batch: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "ROWS_AT_ONCE", at_once)  # groups of 1, 2 and 4 sequences
    model, x = network(step_embedding=step_embedding), tokens(batch, 11)
    ours = Engine(model, torch.float32)
    for rows in (torch.arange(x.numel()), some_rows(batch, 11), torch.tensor([x.numel() - 1])):
        found = ours.hidden(x, T, H, rows)
        torch.testing.assert_close(found, by_the_network(model, x, rows), rtol=1e-4, atol=1e-5)


def test_the_step_size_and_the_time_are_heard() -> None:
    model, x, rows = network(), tokens(1, 9), torch.arange(9)
    ours = Engine(model, torch.float32)
    here = ours.hidden(x, T, H, rows)
    assert (ours.hidden(x, T, H / 2, rows) - here).abs().max() > 0.01
    assert (ours.hidden(x, T + 0.2, H, rows) - here).abs().max() > 0.01


def test_a_step_smaller_than_training_shows_is_told_as_the_smallest() -> None:
    model, x, rows = network(), tokens(1, 9), torch.arange(9)
    ours = Engine(model, torch.float32)
    smallest = ours.hidden(x, T, 2.0**-10, rows)
    assert torch.equal(ours.hidden(x, T, 2.0**-20, rows), smallest)
    assert not torch.equal(ours.hidden(x, T, 2.0**-9, rows), smallest)


TIMES = (0.3, 0.0, 0.875, 0.3, 0.5), (0.125, 0.25, 0.125, 0.125, 0.5)


@pytest.mark.parametrize("kind", ["published", "shifted twin", "causal twin"])
@pytest.mark.parametrize("lengths", [(11, 11, 11, 11, 11), (7, 11, 2, 1, 9), (3, 3, 3, 3, 3)])
@pytest.mark.parametrize("at_once", [1, 20, 1000])
def test_sequences_of_several_times_and_lengths_are_what_each_is_alone(
    kind: str, lengths: tuple[int, ...], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "ROWS_AT_ONCE", at_once)
    model = network() if kind == "published" else twin(kind)
    ours, x = Engine(model, torch.float32), tokens(5, 11)
    free = torch.rand(5, 11, generator=torch.Generator().manual_seed(4)) < 0.6
    free = free & (torch.arange(11) < torch.tensor(lengths)[:, None])
    rows = free.flatten().nonzero()[:, 0]
    found = ours.hidden(x, *TIMES, rows, lengths).split(free.sum(1).tolist())
    for b, (size, t, h) in enumerate(zip(lengths, *TIMES, strict=True)):
        alone = ours.hidden(x[b : b + 1, :size], t, h, free[b].nonzero()[:, 0])
        torch.testing.assert_close(found[b], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["published", "twin without a start", "causal twin"])
def test_a_text_of_masks_alone_is_one_row(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(source="mask") if kind == "published" else twin(kind)
    assert model.config.mask_id == 83
    if kind == "twin without a start":
        model.config = replace(model.config, start_id=None)
    x, rows = tokens(4, 11), torch.arange(44)
    x[1], x[3] = 83, 83
    x[2, :-1] = 83  # all but one
    times = torch.full((4,), T), torch.full((4,), H)
    with torch.no_grad():
        right = model.body(x, *times).flatten(0, 1)
    ours, passed = Engine(model, torch.float32), []
    project = ours.layers[0].project
    monkeypatch.setattr(ours.layers[0], "project", lambda y: passed.append(y.shape) or project(y))
    torch.testing.assert_close(ours.hidden(x, T, H, rows), right, rtol=1e-4, atol=1e-5)
    # Once for both texts; not at all where a start token tells the masks apart.
    assert passed.count((1, 1, 48)) == (kind != "causal twin")
    assert sum(shape[0] * shape[1] for shape in passed) == (48 if kind == "causal twin" else 23)
    assert torch.equal(ours.hidden(x[1:2], T, H, rows[:11]), ours.hidden(x, T, H, rows)[11:22])


def twin(kind: str) -> CausalNetwork:
    """A twin of a causal model, of which nothing is silent."""
    shape: dict[str, Any] = {"vocab_size": 83, "hidden_size": 48, "blocks": 3, "heads": 4}
    shape |= {"cond_size": 16, "kv_heads": 2, "head_size": 12, "mlp_size": 64, "start_id": 0}
    attention: Any = "causal" if kind == "causal twin" else "bidirectional"
    config = CausalConfig(**shape, source="mask", step_embedding="log2", attention=attention)
    model, draw = CausalNetwork(config), torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15, generator=draw)
    return model.eval()


@pytest.mark.parametrize("source", ["uniform", "mask"])
def test_logits_are_the_networks(source: str) -> None:
    model = network(source=source)
    rows = torch.randn(6, 48, generator=torch.Generator().manual_seed(3))
    found = Engine(model, torch.float32).head(rows)
    assert found.shape == (6, 83 + (source == "mask"))
    torch.testing.assert_close(found, model.head(rows))


@pytest.mark.parametrize("fused", [True, False])
def test_bfloat16_is_as_near_to_float32_as_autocast_is(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused:  # a CPU without oneDNN
        monkeypatch.delattr(torch.ops.mkldnn, "_linear_pointwise", raising=False)

        def missing(*_: Any) -> Tensor:
            raise NotImplementedError

        monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", missing, raising=False)
    model, x = network(), tokens(2, 300)
    rows = torch.arange(x.numel())
    exact = by_the_network(model, x, rows)
    with torch.autocast("cpu", torch.bfloat16):
        usual = by_the_network(model, x, rows)
    found = Engine(model, torch.bfloat16).hidden(x, T, H, rows)
    assert found.dtype == torch.bfloat16
    error, usual_error = ((y.float() - exact).square().mean().sqrt() for y in (found, usual))
    assert error < 1.2 * usual_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_gets_the_same_bits_alone_and_in_a_batch(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "ROWS_AT_ONCE", 80)  # sequences of 60 go one by one
    ours, x = Engine(network(), dtype), tokens(3, 60)
    rows = torch.cat([some_rows(1, 60) + 60 * b for b in (0, 2)])  # nothing moves in one of them
    together = ours.hidden(x, T, H, rows)
    alone = [ours.hidden(x[b : b + 1], T, H, some_rows(1, 60)) for b in (0, 2)]
    assert torch.equal(together, torch.cat(alone))


TWIN = CausalConfig(83, 48, 2, 4, 16, 64, neighbours=2, kv_heads=2, head_size=12, mlp_size=32)
PUBLISHED = ModelConfig(83, 48, 2, 3, 16, 64, neighbours=2, step_embedding="log2")


@pytest.mark.parametrize("config", [TWIN, replace(TWIN, tied=False), PUBLISHED])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_matrix_is_held_once_in_the_format_of_its_product(
    config: ModelConfig, dtype: torch.dtype
) -> None:
    if dtype == torch.int8 and not has_int8():
        pytest.skip("this CPU has no fast 8-bit products")
    model = build_network(config)
    held = {n: StorageWeakRef(p.untyped_storage()) for n, p in model.named_parameters()}
    ours = Engine(model, dtype)
    assert list(dict(model.named_parameters())) == list(held)  # the network is whole
    del model
    gc.collect()
    left = {name for name, storage in held.items() if not storage.expired()}
    read_as_they_are = (
        "time_embed",
        "dt_embed",
        "modulation",
        "Modulation",
        "norm",
        "bias",
        "fuser",
    )
    assert {n for n in left if not any(part in n for part in read_as_they_are)} == set()
    assert {n for n in held if n.endswith("norm1.weight")} <= left
    assert ours.model.vocab_embed.weight.dtype == ours.dtype
    assert ours.head(ours.hidden(tokens(1, 9), T, H, torch.arange(9))).isfinite().all()
