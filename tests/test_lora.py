"""LoRA: what it adds, what it leaves, and the adapter that it is saved as."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from language_models import save_lm
from safetensors.torch import load_file, save_file
from steering_fixtures import twin_network
from test_generator import WORDS, network
from test_training_commands import SMALL, TINY, make_data, make_model, metrics

from fsdfm.core.errors import CheckpointError, ConfigError, FsdfmError
from fsdfm.generate.loading import load, load_with_network
from fsdfm.model.config import PRESETS
from fsdfm.model.io.adapter import add_adapter, base_digest, merge_adapter, save_adapter
from fsdfm.model.io.pretrained import load_pretrained
from fsdfm.model.lora import LowLinear, add_lora, merge, pairs
from fsdfm.model.transformer import FlowNetwork
from fsdfm.recipes.settings import AdaptSettings, PretrainSettings
from fsdfm.recipes.training import adapt, pretrain
from fsdfm.text.packing import prepare
from fsdfm.text.settings import PrepareSettings
from fsdfm.text.tokenizer import Tokenizer, train_bpe
from fsdfm.train import loop as loop_module
from fsdfm.train.ema import Ema

ADAPTER = {"adapter.json", "adapter.safetensors", "checkpoint.safetensors", "metrics.jsonl"}
ADAPTER |= {"run.json", "config.toml"}
TOKENIZER = train_bpe([WORDS * 20], 300)
NETWORKS: dict[str, Callable[[], FlowNetwork]] = {
    "published": lambda: network(TOKENIZER),
    "twin": lambda: twin_network(TOKENIZER),
}


@pytest.fixture(autouse=True)
def _tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", TINY)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(data, tmp_path_factory.mktemp("base") / "model")


def args(data: Path, base: Path, out: Path, **changes: Any) -> PretrainSettings:
    values = {**SMALL, "learning_rate": 0.02, "lora": 2, "ema_decay": 0.5, **changes}
    return PretrainSettings(data=data, init=base, out=out, **values)


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def logits(model: FlowNetwork) -> torch.Tensor:
    x = torch.arange(24).view(2, 12) % model.config.vocab_size
    t, h = torch.tensor([0.1, 0.6]), torch.tensor([0.5, 0.25])
    with torch.no_grad():
        found: torch.Tensor = model(x, t, h)
    return found


def assert_same_function(one: FlowNetwork, other: FlowNetwork) -> None:
    """Up to float32's rounding, at the scale of the logits."""
    theirs = logits(other)
    torch.testing.assert_close(logits(one), theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0.0)


@pytest.mark.parametrize("kind", NETWORKS)
def test_it_starts_as_the_network_and_merged_it_is_the_same_function(kind: str) -> None:
    model, plain = NETWORKS[kind](), NETWORKS[kind]()
    before = logits(model)
    add_lora(model, 3, seed=1)
    assert torch.equal(logits(model), before)
    draw = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, LowLinear):
            torch.nn.init.normal_(module.b, std=0.3, generator=draw)
    merge(plain, pairs(model), "here")
    assert (logits(model) - before).abs().max() > 0.05
    assert_same_function(plain, model)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_narrow_matrix_has_a_pair_of_its_own_rank(kind: str, tmp_path: Path) -> None:
    model, plain = NETWORKS[kind](), NETWORKS[kind]()
    shapes = {name: p.shape for name, p in plain.named_parameters()}
    sides = [min(s) for name, s in shapes.items() if name.startswith("blocks.") and len(s) == 2]
    rank = min(sides) + 1
    add_lora(model, rank, seed=1)
    found = pairs(model)
    ranks = {name: len(t) for name, t in found.items() if name.endswith(".a")}
    assert set(ranks.values()) == {rank - 1, rank}
    for name, own in ranks.items():
        assert own == min(rank, *shapes[name.removesuffix("a") + "weight"])
    for module in model.modules():
        if isinstance(module, LowLinear):
            torch.nn.init.normal_(module.b, std=0.3)
    save_adapter(tmp_path, model, base_digest(plain))
    assert json.loads((tmp_path / "adapter.json").read_text())["rank"] == rank
    add_adapter(plain, tmp_path)
    assert_same_function(plain, model)


@pytest.mark.parametrize("kind", NETWORKS)
def test_only_the_pairs_are_trained_and_the_average_shares_the_rest(kind: str) -> None:
    model = NETWORKS[kind]()
    add_lora(model, 2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"a", "b"}
    x, t = torch.arange(12)[None], torch.tensor([0.3])
    model(x, t, t).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    assert len(trained) == len(pairs(model)) > 8
    ema = Ema(model, 0.5)
    for (name, ours), theirs in zip(ema.model.named_parameters(), model.parameters(), strict=True):
        assert (ours is theirs) == (name not in trained)


def test_a_run_leaves_the_base_and_saves_the_adapter_alone(
    run: Run, data: Path, base: Path, tmp_path: Path
) -> None:
    before, out = contents(base), tmp_path / "adapter"
    assert pretrain(args(data, base, out))
    assert contents(base) == before
    assert {p.name for p in out.iterdir()} == ADAPTER
    facts = json.loads((out / "adapter.json").read_text())
    assert (facts["rank"], facts["base_sha256"]) == (2, base_digest(load_pretrained(base).model))
    tensors = load_file(out / "adapter.safetensors")
    assert any(bool(t.any()) for name, t in tensors.items() if name.endswith(".b"))
    kept = load_file(out / "checkpoint.safetensors")
    assert not any("vocab_embed" in name or "original" in name for name in kept)
    # The adapter is the average, as a run's model is.
    assert all(torch.equal(kept[f"ema.{name}"], t) for name, t in tensors.items())
    merged = tmp_path / "merged"
    code, said, err = run("merge", base, out, merged)
    assert (code, err) == (0, "") and f"fsdfm generate --model {merged}" in said
    argv = "--length", 12, "--steps", 4, "--seed", 1
    code, text, err = run("generate", "--model", base, "--adapter", out, *argv)
    assert (code, err) == (0, "")
    assert run("generate", "--model", merged, *argv)[1] == text
    assert run("generate", "--model", base, *argv)[1] != text
    both = load_with_network(base, adapter=out)[1].model, load_pretrained(merged).model
    torch.testing.assert_close(logits(both[0]), logits(both[1]), atol=1e-5, rtol=1e-5)


def test_a_run_that_died_ends_bit_identical_to_one_never_stopped(
    data: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = args(data, base, tmp_path / "whole")
    assert pretrain(whole)
    real, saves = loop_module.save_checkpoint, []

    class Died(BaseException):
        pass

    def dying(path: Path, state: Any) -> None:
        saves.append(state.step)
        if len(saves) == 2:
            raise Died
        real(path, state)

    monkeypatch.setattr(loop_module, "save_checkpoint", dying)
    part = replace(whole, out=tmp_path / "part")
    with pytest.raises(Died):
        pretrain(part)
    assert pretrain(part)
    assert saves == [3, 6, 6, 7]
    for name in ("adapter.safetensors", "checkpoint.safetensors"):
        one, two = (load_file(r.out / name) for r in (whole, part))
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert (part.out / "adapter.json").read_bytes() == (whole.out / "adapter.json").read_bytes()
    assert metrics(part.out) == metrics(whole.out)
    other = replace(part, lora=3)
    with pytest.raises(ConfigError, match="lora 2 -> 3"):
        pretrain(other)


def test_adapting_keeps_the_model_that_the_adapter_is_of(
    run: Run, data: Path, tmp_path: Path
) -> None:
    save_lm(tmp_path / "lm")
    tokenizer = Tokenizer.from_file(tmp_path / "lm" / "tokenizer.json")
    prepare(
        [data.parent / "text.jsonl"],
        tmp_path / "data",
        settings=PrepareSettings(validation_fraction=0.2),
        tokenizer=tokenizer,
    )
    out = tmp_path / "out"
    settings = AdaptSettings(
        model=str(tmp_path / "lm"), data=tmp_path / "data", out=out, lora=2, **SMALL
    )
    assert adapt(settings)
    assert {p.name for p in out.iterdir()} == ADAPTER | {"base"}
    facts = json.loads((out / "adapter.json").read_text())
    assert base_digest(load_pretrained(out / "base").model) == facts["base_sha256"]
    argv = "--model", out / "base", "--adapter", out, "--length", 8, "--steps", 2
    code, text, _ = run("generate", *argv)
    assert code == 0 and text


def refusal(work: Callable[[], Any]) -> str:
    with pytest.raises(FsdfmError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_is_refused_in_one_line(
    run: Run, data: Path, base: Path, tmp_path: Path
) -> None:
    model = load_pretrained(base).model
    sha = base_digest(model)
    add_lora(model, 2)
    good = tmp_path / "good"
    save_adapter(good, model, sha)
    other = make_model(data, tmp_path / "other", seed=1)
    code, out, err = run("generate", "--model", other, "--adapter", good, "--length", 4)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert (
        f"was trained on another model: give the one that it names (base_sha256 {sha[:12]}" in err
    )
    code, _, err = run("merge", other, good, tmp_path / "merged")
    assert code == 2 and "another model" in err and not (tmp_path / "merged").exists()
    assert "is not an adapter" in refusal(lambda: load(base, adapter=base))
    assert "is not an adapter" in refusal(lambda: load(base, adapter=tmp_path / "none"))
    assert "is the base itself" in refusal(lambda: merge_adapter(base, good, base))
    assert "is the adapter itself" in refusal(lambda: merge_adapter(base, good, good))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert "directory of a run" in refusal(lambda: merge_adapter(base, good, tmp_path / "run"))
    (good / "adapter.safetensors").write_bytes(b"x" * 30)
    assert "is a damaged adapter" in refusal(lambda: load(base, adapter=good))
    save_adapter(good, model, sha)
    facts = json.loads((good / "adapter.json").read_text())
    (good / "adapter.json").write_text(json.dumps({**facts, "base_sha256": "0" * 64}))
    assert "with its own pairs" in refusal(lambda: load(base, adapter=good))
    (good / "adapter.json").write_text("[" * 10_000 + "]" * 10_000)
    assert "is a damaged adapter" in refusal(lambda: load(base, adapter=good))
    del facts["base_sha256"]
    (good / "adapter.json").write_text(json.dumps(facts))
    save_file(load_file(good / "adapter.safetensors"), good / "adapter.safetensors")
    assert "with its own pairs" in refusal(lambda: load(base, adapter=good))
    with pytest.raises(ConfigError, match="lora changes a model that there is: give init too"):
        PretrainSettings(data=data, out=tmp_path / "o", lora=2)
    huge = args(data, base, tmp_path / "o", lora=16)
    assert "lora saves nothing from a rank of 16 on" in refusal(lambda: pretrain(huge))


def test_pairs_that_do_not_fit_change_nothing() -> None:
    model = NETWORKS["published"]()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    trained = NETWORKS["published"]()
    add_lora(trained, 2)
    found = pairs(trained)
    name = next(iter(found))
    for bad in ({}, {**found, name: found[name][:, 1:]}, {**found, name: found[name] * torch.inf}):
        with pytest.raises(CheckpointError, match="do not fit the network"):
            merge(model, bad, "here")
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert base_digest(model) == base_digest(NETWORKS["published"]())


def test_add_adapter_adds_what_was_saved(tmp_path: Path) -> None:
    model, plain = NETWORKS["twin"](), NETWORKS["twin"]()
    sha = base_digest(model)
    add_lora(model, 2, seed=3)
    for module in model.modules():
        if isinstance(module, LowLinear):
            torch.nn.init.constant_(module.b, 0.01)
    save_adapter(tmp_path, model, sha)
    before = logits(plain)
    add_adapter(plain, tmp_path)
    assert (logits(plain) - before).abs().max() > 0.01
    assert_same_function(plain, model)
