"""Choosing layers: what is missed least goes first, and a run keeps what it began with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from language_models import save_lm
from test_causal import network
from torch import Tensor

from fsdfm.core.errors import ConfigError
from fsdfm.core.progress import untold
from fsdfm.model.causal import CausalNetwork
from fsdfm.model.io.causal_lm import load_causal_lm
from fsdfm.model.io.pretrained import load_pretrained
from fsdfm.recipes import depth
from fsdfm.recipes.depth import Depth, Probe, chosen_layers, left_out
from fsdfm.recipes.settings import AdaptSettings
from fsdfm.recipes.training import adapt
from fsdfm.study.autoregressive import Autoregressive
from fsdfm.text.packing import prepare
from fsdfm.text.settings import PrepareSettings
from fsdfm.text.store import TokenStore
from fsdfm.text.tokenizer import Tokenizer
from fsdfm.train.parallel import ALONE

LAYERS, LENGTH = 5, 24


def data(count: int = 4, vocab_size: int = 83) -> Tensor:
    return torch.randint(vocab_size, (count, LENGTH), generator=torch.Generator().manual_seed(1))


def quiet(model: CausalNetwork, number: int, share: float) -> None:
    """A layer that adds little to what passes it."""
    with torch.no_grad():
        for linear in (model.blocks[number].attn_out, model.blocks[number].mlp_out):
            linear.weight *= share


@torch.no_grad()
def test_a_language_models_loss_is_that_of_the_next_token() -> None:
    model, x_1 = network(attention="causal"), data()
    found = Probe(model, x_1).nats(Probe(model, x_1).start, range(3))
    exact = Autoregressive(model)
    assert found == pytest.approx(
        -sum(float(exact.log_probability(x.numpy()).mean()) for x in x_1) / len(x_1), rel=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("start_id", [7, None])
def test_a_flow_models_loss_is_that_of_hidden_tokens_at_times_spread_evenly(
    start_id: int | None,
) -> None:
    model, x_1 = network(start_id=start_id), data(8)
    probe = Probe(model, x_1)
    shares = probe.hidden.float().mean(1)
    assert (shares[:-1] > shares[1:] - 0.35).all() and shares[0] > 0.8 > 0.2 > shares[-1]
    x_t = x_1.masked_fill(probe.hidden, model.config.vocab_size)
    t = (torch.arange(8) + 0.5) / 8
    log_p = model(x_t, t, torch.full((8,), 2.0**-10))[..., :83].log_softmax(-1)
    nats = -log_p.gather(-1, x_1[..., None])[..., 0]
    means = [float(row[hidden].mean()) for row, hidden in zip(nats, probe.hidden, strict=True)]
    assert probe.nats(probe.start, range(3)) == pytest.approx(sum(means) / 8, rel=1e-5)


@torch.no_grad()
def believed(model: CausalNetwork) -> Tensor:
    """Data of which the network believes every hidden token: any layer that it has is missed."""
    x_1 = data()
    if model.config.left_to_right:
        return torch.tensor(Autoregressive(model).samples(LENGTH, range(4), temperature=0.0))
    probe, t = Probe(model, x_1), (torch.arange(4) + 0.5) / 4
    x_t = x_1.masked_fill(probe.hidden, model.config.vocab_size)
    likeliest = model(x_t, t, torch.full((4,), 2.0**-10))[..., :83].argmax(-1)
    return torch.where(probe.hidden, likeliest, x_1)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_what_adds_nothing_is_left_out_first_and_costs_nothing(attention: str) -> None:
    model = network(blocks=LAYERS, attention=attention)
    for number in (1, 3):
        quiet(model, number, 0.0)
    found = list(left_out(Probe(model, believed(model)), 2))
    assert (found[0].kept, found[2].kept) == ((0, 1, 2, 3, 4), (0, 2, 4))
    assert {each.without for each in found[:3]} == {None, 1, 3}
    assert found[2].nats == pytest.approx(found[0].nats, rel=1e-6)
    assert found[3].nats > 1.01 * found[2].nats
    assert [len(each.kept) for each in found] == [5, 4, 3, 2]


@torch.no_grad()
def test_each_turn_takes_the_best_of_those_that_it_tries() -> None:
    model = network(blocks=LAYERS, attention="causal")
    probe = Probe(model, data())
    kept = tuple(range(LAYERS))
    for each in list(left_out(probe, 2, looked_at=LAYERS))[1:]:
        ways = {n: tuple(k for k in kept if k != n) for n in kept}
        nats = {n: probe.nats(probe.start, way) for n, way in ways.items()}
        without = min(nats, key=nats.__getitem__)
        assert each == Depth(ways[without], without, pytest.approx(nats[without], rel=1e-6))  # type: ignore[arg-type]
        kept = each.kept


def test_later_turns_try_only_those_that_were_missed_least(monkeypatch: Any) -> None:
    tried: list[tuple[int, ...]] = []
    nats = Probe.nats

    def watched(self: Probe, x: Tensor, blocks: Any) -> float:
        tried.append(tuple(blocks))
        return nats(self, x, blocks)

    monkeypatch.setattr(Probe, "nats", watched)
    told: list[tuple[str, int, int]] = []
    model = network(blocks=LAYERS, attention="causal")
    list(left_out(Probe(model, data()), 2, lambda *each: told.append(each), looked_at=2))
    assert len(tried) == 1 + LAYERS + 2 + 2
    assert told == [("choosing layers", turn, 3) for turn in (1, 2, 3)]


# In `fsdfm adapt`.


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of five layers, and text in its tokens."""
    root = tmp_path_factory.mktemp("depth")
    save_lm(root / "lm", num_hidden_layers=LAYERS)
    (root / "text.txt").write_text("the miller saw a stranger at his door and ran off. " * 200)
    tokenizer = Tokenizer.from_json(load_causal_lm(str(root / "lm")).tokenizer_json)
    settings = PrepareSettings(validation_fraction=0.1)
    prepare([root / "text.txt"], root / "data", settings=settings, tokenizer=tokenizer)
    return root


def settings_of(place: Path, out: Path, **changes: Any) -> AdaptSettings:
    numbers: dict[str, Any] = {"steps": 2, "batch_size": 2, "context_length": 12, "device": "cpu"}
    numbers |= {"sample_every": 0, "checkpoint_every": 1, "validation_sequences": 2}
    given = {**numbers, **changes}
    return AdaptSettings(model=str(place / "lm"), data=place / "data", out=out, **given)


def kept_by(out: Path) -> str:
    found: str = json.loads((out / "run.json").read_text())["settings"]["layers"]
    return found


def choose(settings: AdaptSettings, place: Path, world: Any = ALONE) -> tuple[int, ...]:
    lm = load_causal_lm(settings.model)
    store = TokenStore.open(place / "data")
    tokenizer = Tokenizer.from_json(store.tokenizer_json)
    ids = range(tokenizer.vocab_size)
    return chosen_layers(settings, lm, ids, tokenizer.eos_id, store.train, world, untold)


@pytest.mark.parametrize("wanted", [1, 3])
def test_a_number_keeps_the_layers_that_are_missed_most(
    wanted: int, place: Path, tmp_path: Path, run: Run
) -> None:
    args = settings_of(place, tmp_path / "run", layers=str(wanted), steps=1, learning_rate=1e-12)
    chosen = choose(args, place)
    assert len(chosen) == wanted
    assert adapt(args)
    assert kept_by(args.out) == ",".join(map(str, chosen)) + "," * (wanted == 1)
    blocks = load_pretrained(args.out).model.blocks
    theirs = load_causal_lm(str(place / "lm")).model.model.layers
    for block, number in zip(blocks, chosen, strict=True):
        down = theirs[number].mlp.down_proj.weight
        torch.testing.assert_close(block.mlp_out.weight, down, rtol=0, atol=1e-6)
    # Its own settings repeat it, and the number names the same run.
    words = ("adapt", args.model, "--config", args.out / "config.toml", "--out", args.out)
    code, _, err = run(*words)
    assert code == 0 and "Finished already" in err


def test_a_run_that_goes_on_has_the_layers_that_it_began_with(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = settings_of(place, tmp_path / "run", layers="2")
    assert adapt(args)
    kept = kept_by(args.out)

    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("the layers are chosen already")

    monkeypatch.setattr(depth, "left_out", never)
    assert adapt(replace(args, steps=3))
    assert kept_by(args.out) == kept
    with pytest.raises(ConfigError, match="layers"):
        other = {"0,1", "0,2"} - {kept}
        adapt(replace(args, layers=other.pop()))
    with pytest.raises(AssertionError, match="chosen already"):
        adapt(replace(args, layers="3"))


def test_all_layers_are_no_choice(place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(depth, "left_out", None)
    for layers in (None, str(LAYERS), "3,1", "4,"):
        args = settings_of(place, tmp_path / "none", layers=layers)
        wanted = {"3,1": (1, 3), "4,": (4,)}.get(layers or "", tuple(range(LAYERS)))
        assert choose(args, place) == wanted


def test_the_first_process_chooses_for_all(place: Path, tmp_path: Path) -> None:
    args = settings_of(place, tmp_path / "none", layers="2")
    said: list[tuple[int, ...]] = []

    class Other:
        first = False

        def totals(self, *counts: int) -> list[int]:
            said.append(counts)
            return [1, 4]

    assert choose(args, place, Other()) == (1, 4)
    assert said == [(0, 0)]


def test_the_command_tells_how_far_the_choice_is(place: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "run"
    words = ("adapt", place / "lm", "--data", place / "data", "--out", out, "--layers", 3)
    numbers = ("--steps", 1, "--context-length", 12, "--batch-size", 2, "--sample-every", 0)
    code, _, err = run(*words, *numbers, "--validation-sequences", 2, "--device", "cpu")
    assert code == 0 and "choosing layers  2/2" in err
