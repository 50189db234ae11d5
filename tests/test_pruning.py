"""Fewer layers and neurons: what others can stand in for goes, and what is lost is made up for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from test_rounding import (
    PUBLISHED,
    TOKENIZER,
    TWIN,
    correlated,
    few,
    network,
    random_weight,
    saved,
)
from test_rounding import data as data
from torch import Tensor

from fsdfm.core.errors import ConfigError
from fsdfm.model import pruning
from fsdfm.model.causal import CausalNetwork
from fsdfm.model.io.pretrained import load_pretrained, save_pretrained
from fsdfm.model.pruning import fewest_lost, pruned
from fsdfm.model.rounding import Example
from fsdfm.recipes.depth import missed_most
from fsdfm.recipes.pruning import prune
from fsdfm.text.store import TokenStore

SIZE = 64


def twin(**changes: Any) -> CausalNetwork:
    model = network(replace(TWIN, **changes))
    assert isinstance(model, CausalNetwork)
    return model


@torch.no_grad()
def distance(one: CausalNetwork, other: CausalNetwork, batches: list[Example]) -> float:
    """Of the logits at the rows that count."""
    return sum(
        float((one(e.x_t, e.t, e.t) - other(e.x_t, e.t, e.t)).flatten(0, 1)[e.rows].square().sum())
        for e in batches
    )


def alone(weight: Tensor, gram: Tensor, missing: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `fewest_lost`, but nothing of other blocks is made up for."""
    return fewest_lost(weight, gram, torch.zeros_like(missing), count)


def test_what_stays_is_the_least_squares_answer() -> None:
    weight, a = random_weight(20, 96).double(), correlated(400, 96).double()
    m = correlated(400, 20).double()
    kept, found = fewest_lost(weight, a.T @ a, m.T @ a, 40)
    assert torch.equal(kept, kept.unique()) and found.shape == (20, 40)
    # As rows to fit, the damping wants each column to stay what it was.
    damping = (pruning.DAMPING * a.square().sum(0).mean()).sqrt() * torch.eye(96).double()
    rows, wanted = torch.cat((a, damping)), torch.cat((a @ weight.T + m, damping @ weight.T))
    best = torch.linalg.lstsq(rows[:, kept], wanted).solution.T
    torch.testing.assert_close(found, best, rtol=1e-8, atol=1e-8)


def test_columns_that_others_stand_in_for_go_first() -> None:
    weight, a = random_weight(20, 64), correlated(400, 64, rank=64)
    a[:, 7], a[:, 11], a[:, 30] = a[:, 3] - 2 * a[:, 5], 0.0, a[:, 40]
    kept, found = fewest_lost(weight, a.T @ a, torch.zeros(20, 64), 61)
    assert len({3, 5, 7} & set(kept.tolist())) == 2 and 11 not in kept
    assert len({30, 40} & set(kept.tolist())) == 1
    exact, ours = a @ weight.T, a[:, kept] @ found.T
    assert float((ours - exact).square().sum()) < 1e-4 * float(exact.square().sum())


def test_choosing_and_making_up_lose_less_than_keeping_the_largest() -> None:
    weight, a = random_weight(48, 192), correlated(600, 192)
    gram = a[:400].T @ a[:400]
    largest = (weight.square().sum(0) * gram.diagonal()).topk(96).indices
    kept, found = fewest_lost(weight, gram, torch.zeros(48, 192), 96)
    for some in (a[:400], a[400:]):  # those it looked at, and others of the same law
        exact = some @ weight.T
        plain = some[:, largest] @ weight[:, largest].T
        ours = some[:, kept] @ found.T
        assert (ours - exact).square().sum() < 0.3 * (plain - exact).square().sum()


def test_inputs_that_never_come_do_no_harm() -> None:
    kept, found = fewest_lost(random_weight(8, 32), torch.zeros(32, 32), torch.zeros(8, 32), 20)
    torch.testing.assert_close(found, random_weight(8, 32)[:, kept])


@pytest.mark.parametrize(
    "changes", [{}, {"tied": False}, {"qkv_bias": True, "qk_norm": True}, {"start_id": None}]
)
def test_neurons_that_say_nothing_are_not_missed(changes: dict[str, Any], data: Path) -> None:
    model, dead = twin(**changes), torch.arange(0, TWIN.mlp_size, 2)
    for block in model.blocks:
        with torch.no_grad():
            block.mlp_in.weight[TWIN.mlp_size + dead] = 0.0
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    batches = few(data, TWIN)
    told: list[tuple[str, int, int]] = []
    small = pruned(model, batches, mlp_size=SIZE, progress=lambda *each: told.append(each))
    assert told == [("pruning", 1, 2), ("pruning", 2, 2)]
    assert small.config == replace(model.config, mlp_size=SIZE) and not small.training
    weights = small.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), "the network stays as it is"
        assert ".mlp_" in name or torch.equal(weight, weights[name])
    alive = [n for n in range(TWIN.mlp_size) if n % 2]
    for whole, narrow in zip(model.blocks, small.blocks, strict=True):
        rows = [*alive, *(TWIN.mlp_size + n for n in alive)]
        assert torch.equal(narrow.mlp_in.weight, whole.mlp_in.weight[rows])
    e = batches[0]
    with torch.no_grad():
        theirs, ours = model(e.x_t, e.t, e.t), small(e.x_t, e.t, e.t)
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=1e-3)


def test_later_blocks_make_up_for_what_earlier_ones_lost(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = twin(blocks=4)
    batches, others = few(data, TWIN)[:6], few(data, TWIN)[6:]
    ours = pruned(model, batches, mlp_size=SIZE)

    monkeypatch.setattr(pruning, "fewest_lost", alone)
    each = pruned(model, batches, mlp_size=SIZE)
    assert distance(ours, model, others) < 0.97 * distance(each, model, others)


@pytest.mark.parametrize("stay", [(0, 2, 4), (0, 1), (1, 4)])
def test_layers_that_add_nothing_are_not_missed(stay: tuple[int, ...], data: Path) -> None:
    model = twin(blocks=5)
    with torch.no_grad():
        for number in {*range(5)} - {*stay}:
            model.blocks[number].attn_out.weight.zero_()
            model.blocks[number].mlp_out.weight.zero_()
    small, e = pruned(model, few(data, TWIN)[:4], layers=stay), few(data, TWIN)[5]
    assert small.config == replace(model.config, blocks=len(stay))
    weights = small.state_dict()
    for place, number in enumerate(stay):
        for name, weight in model.blocks[number].state_dict().items():
            torch.testing.assert_close(weights[f"blocks.{place}.{name}"], weight)
    with torch.no_grad():
        torch.testing.assert_close(
            small(e.x_t, e.t, e.t), model(e.x_t, e.t, e.t), atol=1e-3, rtol=1e-3
        )


@pytest.mark.parametrize("mlp_size", [None, SIZE])
@pytest.mark.parametrize("stay", [(0, 2), (2, 3)])
def test_layers_that_stay_make_up_for_those_that_do_not(
    stay: tuple[int, ...], mlp_size: int | None, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = twin(blocks=4)
    batches, others = few(data, TWIN)[:6], few(data, TWIN)[6:]
    ours = pruned(model, batches, layers=stay, mlp_size=mlp_size)
    monkeypatch.setattr(pruning, "fewest_lost", alone)
    each = pruned(model, batches, layers=stay, mlp_size=mlp_size)
    assert distance(ours, model, others) < 0.9 * distance(each, model, others)


def test_networks_and_sizes_that_cannot_be_are_one_line(data: Path) -> None:
    model, batches = twin(), few(data, TWIN)
    with pytest.raises(ConfigError, match="only networks from fsdfm adapt"):
        pruned(network(PUBLISHED), batches)
    with pytest.raises(ConfigError, match="at least one example"):
        pruned(model, [])
    for size in (0, 129, 1000):
        with pytest.raises(ConfigError, match=f"mlp_size must be from 1 to 128, .* got {size}"):
            pruned(model, batches, mlp_size=size)
    for layers in ((), (1, 0), (0, 0), (-1,), (0, 2)):
        with pytest.raises(ConfigError, match=r"layers must be some of 0 to 1, ascending, got"):
            pruned(model, batches, layers=layers)
    with torch.no_grad():
        model.blocks[1].norm2.weight[3] = torch.nan
    with pytest.raises(ConfigError, match="inputs of layer 1 that are not finite"):
        pruned(model, batches, mlp_size=SIZE)


# `fsdfm prune`.


def test_the_command_writes_a_model_that_remembers_and_goes_on(
    data: Path, tmp_path: Path, run: Run
) -> None:
    model, small, out = saved(tmp_path / "model"), tmp_path / "small", tmp_path / "run"
    code, said, err = run("prune", model, small, "--data", data, "--mlp-size", SIZE)
    assert code == 0 and f"fsdfm pretrain --init {small}" in said and "2/2" in err
    found = load_pretrained(small)
    assert found.generation == {"steps": 4, "temperature": 0.7}
    assert found.ancestors == ("SmolLM2-135M",) and found.model.config.neighbours == 2
    assert f"{sum(p.numel() for p in found.model.parameters()):,} parameters" in said
    assert run("generate", "--model", small, "--length", 16)[0] == 0
    numbers = ("--steps", 1, "--batch-size", 2, "--context-length", 16, "--sample-every", 0)
    more = ("--data", data, "--out", out, "--validation-sequences", 2, "--device", "cpu")
    assert run("pretrain", "--init", small, *more, *numbers)[0] == 0
    assert load_pretrained(out).model.config.mlp_size == SIZE


def test_the_command_refuses_in_one_line(data: Path, tmp_path: Path, run: Run) -> None:
    model, out = saved(tmp_path / "model"), tmp_path / "out"
    left = saved(tmp_path / "left", replace(TWIN, attention="causal", neighbours=0))
    published = saved(tmp_path / "published", PUBLISHED)
    (taken := tmp_path / "file").write_text("")
    (going := tmp_path / "run").mkdir()
    (going / "run.json").write_text("{}")
    for argv, what in (
        ((model, model, "--mlp-size", SIZE), "is the model itself"),
        ((model, out, "--mlp-size", 129), "--mlp-size must be from 1 to 128"),
        ((model, out, "--mlp-size", 128), "ask for fewer layers or neurons"),
        ((model, out), "Nothing to prune"),
        ((model, out, "--layers", "0,1"), "Nothing to prune"),
        ((model, out, "--layers", "3"), "--layers must be from 1 to 2"),
        ((model, out, "--mlp-size", 0), "--mlp-size must be a whole number >= 1"),
        ((left, out, "--mlp-size", SIZE), "predicts the next token alone"),
        ((published, out, "--mlp-size", SIZE), "only networks from fsdfm adapt"),
        ((tmp_path / "none", out, "--mlp-size", SIZE), str(tmp_path / "none")),
        ((model, taken, "--layers", 1), f"Cannot write {taken} "),
        ((model, going, "--layers", 1), "is the directory of a run"),
    ):
        code, said, err = run("prune", *argv, "--data", data)
        assert (code, said) == (2, "") and what in err and err.count("\n") == 1
    code, _, err = run("prune", model, out, "--mlp-size", SIZE, "--data", tmp_path / "none")
    assert code == 2 and "fsdfm prepare" in err and not out.exists()
    assert load_pretrained(model).model.config == TWIN


@pytest.mark.parametrize("source", ["mask", "uniform"])
def test_a_number_of_layers_keeps_those_that_are_missed_most(
    source: str, data: Path, tmp_path: Path, run: Run
) -> None:
    model = twin(blocks=4, source=source)
    with torch.no_grad():
        model.blocks[2].attn_out.weight.zero_()
        model.blocks[2].mlp_out.weight.zero_()
    split = TokenStore.open(data).train
    x_1 = split.batch(0, batch_size=16, length=32, seed=0)
    kept = missed_most(model, x_1, 2)
    assert 2 not in kept
    where, out = tmp_path / "model", tmp_path / "out"
    save_pretrained(where, model, tokenizer_json=TOKENIZER.to_json())
    code, _, err = run("prune", where, out, "--data", data, "--layers", 2)
    assert code == 0 and "choosing layers  2/2" in err and "pruning  2/2" in err
    blocks = load_pretrained(out).model.blocks
    for block, number in zip(blocks, kept, strict=True):
        assert torch.equal(block.qkv.weight, model.blocks[number].qkv.weight)


def test_what_is_returned_is_what_is_written(data: Path, tmp_path: Path) -> None:
    small = prune(saved(tmp_path / "model"), tmp_path / "small", data, layers="1,", mlp_size=SIZE)
    written = load_pretrained(tmp_path / "small").model.state_dict()
    assert all(torch.equal(w, written[name]) for name, w in small.state_dict().items())
