"""The joint head: what it is told, how it is trained, and what drawing in groups does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fsdfm.core.errors import ConfigError
from fsdfm.flow.grid import even_grid
from fsdfm.flow.path import UniformSource, make_source
from fsdfm.flow.posterior import Grouped, Sequences, split
from fsdfm.flow.sampler import Drawing, Noise, sample
from fsdfm.flow.schedule import Polynomial
from fsdfm.flow.step import EXACT, STEP_RULES, StepRule
from fsdfm.flow.target import TARGETS
from fsdfm.model.config import ModelConfig
from fsdfm.model.engine import Engine
from fsdfm.model.io.pretrained import load_pretrained, save_pretrained
from fsdfm.model.joint import neighbourhood
from fsdfm.model.student import student_from_teacher
from fsdfm.model.transformer import Transformer
from fsdfm.train.objective import Distill, Joint, Pretrain, even_weights, known_at_random

V, L = 5, 6


def network(neighbours: int = 2, source: str = "uniform") -> Transformer:
    """With every zero filled, as after training."""
    torch.manual_seed(0)
    shape = {"vocab_size": V, "hidden_size": 16, "blocks": 1, "heads": 2, "cond_size": 8}
    model = Transformer(
        ModelConfig.from_dict({**shape, "neighbours": neighbours, "source": source})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def test_a_neighbourhood_is_what_lies_on_both_sides_within_the_sequence() -> None:
    x = torch.arange(10).view(2, 5)
    known = torch.ones(2, 5, dtype=torch.bool)
    known[1, 3] = False
    tokens, there = neighbourhood(x, known, torch.tensor([0, 2, 7, 9]), 2)
    assert tokens[1].tolist() == [0, 1, 3, 4] and there[1].all()
    assert there[0].tolist() == [False, False, True, True]  # no sequence before the first
    assert tokens[2].tolist() == [5, 6, 8, 9]
    assert there[2].tolist() == [True, True, False, True]
    assert there[3].tolist() == [True, False, False, False]  # 8 is not known; the end
    # Position 5 opens the second sequence: 4 and 3 belong to the first.
    assert neighbourhood(x, known, torch.tensor([5]), 2)[1].tolist() == [[False, False, True, True]]


def test_a_new_joint_head_tells_nothing_and_a_trained_one_listens_to_what_is_known() -> None:
    x, at = torch.arange(L)[None] % V, torch.tensor([2, 3])
    known = torch.tensor([[False, True, False, False, False, False]])
    teacher = network(0)
    fresh = student_from_teacher(teacher, "none", neighbours=2)
    rows = torch.randn(2, 16)
    assert torch.equal(fresh.told(rows, at, x, known), rows)
    assert torch.equal(teacher.told(rows, at, x, known), rows)
    model = network()
    told = model.told(rows, at, x, known)
    hidden_changed, known_changed = x.clone(), x.clone()
    hidden_changed[0, 4], known_changed[0, 1] = 0, 3
    assert torch.equal(model.told(rows, at, hidden_changed, known), told)
    assert not torch.allclose(model.told(rows, at, known_changed, known), told)


def test_a_joint_head_of_another_reach_gives_one_line() -> None:
    with pytest.raises(ConfigError, match="sees 2 neighbours, not 3: give neighbours=2"):
        student_from_teacher(network(2), "none", neighbours=3)


@pytest.mark.parametrize("lost", [True, False])
def test_a_teacher_with_other_tensors_is_refused(
    lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = network(0)
    tensors = teacher.state_dict()
    if lost:
        del tensors["vocab_embed.weight"]
    else:
        tensors["blocks.9.extra"] = torch.zeros(1)
    monkeypatch.setattr(teacher, "state_dict", lambda: tensors)
    name = "vocab_embed.weight" if lost else "blocks.9.extra"
    with pytest.raises(ConfigError, match=f"do not agree in {name}"):
        student_from_teacher(teacher, "none", neighbours=2)


def test_the_engine_tells_its_rows_the_same() -> None:
    model, x, at = network(), torch.arange(2 * L).view(2, L) % V, torch.tensor([0, 5, 7])
    known = torch.rand(2, L, generator=torch.Generator().manual_seed(1)) < 0.5
    rows = torch.randn(3, 16)
    expected = model.told(rows, at, x, known)
    exact = Engine(model, torch.float32).told(rows, at, x, known)
    torch.testing.assert_close(exact, expected)
    coarse = Engine(model, torch.bfloat16).told(rows.bfloat16(), at, x, known)
    assert coarse.dtype == torch.bfloat16
    torch.testing.assert_close(coarse.float(), expected, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("draws", [1, 2, 3, 8])
def test_groups_split_the_movers_by_position_from_left_to_right(draws: int) -> None:
    position = torch.tensor([0, 1, 2, 5, 0, 3, 4])
    parts = [*split(position, draws)]
    assert torch.cat(parts).sort().values.tolist() == list(range(7))
    classes = [set((position[part] % draws).tolist()) for part in parts]
    assert all(len(each) == 1 for each in classes)
    order = [each.pop() for each in classes]
    assert order == sorted(order)


class Twins(nn.Module):
    """Two tokens, each pair of neighbours equal: marginals are even, and the joint head knows."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        return torch.zeros(*x_t.shape, 2)

    def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
        self.calls.append((at, x, known.clone()))
        left = at - 1
        sure = known.flatten()[left.clamp_min(0)] & (at % 2 == 1)
        spike = 50.0 * torch.nn.functional.one_hot(x.flatten()[left.clamp_min(0)], 2).float()
        return rows + spike * sure[:, None]

    def head(self, rows: Tensor) -> Tensor:
        return rows


def twins_of(draws: int, **options: Any) -> tuple[Tensor, Twins, Any]:
    model, noise = Twins(), Noise(range(200))
    *_, last = sample(
        Sequences(model),
        options.pop("x_0", noise.start(UniformSource(2), 4)),
        even_grid(1),
        noise,
        UniformSource(2),
        drawing=Drawing(posterior=Grouped(model, draws)),
        **options,
    )
    return last.x, model, last


def test_one_call_that_draws_in_two_groups_gets_a_joint_law_right() -> None:
    alone, _, _ = twins_of(1)
    assert 0.35 < float((alone[:, 0] == alone[:, 1]).float().mean()) < 0.65
    together, model, last = twins_of(2)
    assert torch.equal(together[:, 0], together[:, 1])
    assert torch.equal(together[:, 2], together[:, 3])
    # Both tokens, independent pairs, one call of the body, no more rows of the head.
    assert 0.35 < float(together[:, 0].float().mean()) < 0.65
    assert 0.35 < float((together[:, 0] == together[:, 2]).float().mean()) < 0.65
    assert last.calls == 1 and last.head_rows == 200 * 4
    (first_at, _, nothing), (second_at, _, some) = model.calls
    assert not nothing.any() and (first_at % 2 == 0).all()
    assert torch.equal(some.flatten().nonzero()[:, 0], first_at) and (second_at % 2 == 1).all()


def test_frozen_positions_are_known_from_the_start() -> None:
    x_0 = torch.ones(200, 4, dtype=torch.int64)
    frozen = torch.zeros(200, 4, dtype=torch.bool)
    frozen[:, 0] = True
    x, model, _ = twins_of(2, x_0=x_0, frozen=frozen)
    assert (x[:, 1] == 1).all()
    assert torch.equal(model.calls[0][2], frozen)


def test_one_group_passes_through_the_joint_head_too_and_knows_what_is_frozen() -> None:
    """Training always does: without it, nobody trained the function that is drawn from."""
    ((at, _, known),) = twins_of(1)[1].calls
    assert len(at) == 200 * 4 and not known.any()
    frozen = torch.zeros(200, 4, dtype=torch.bool)
    frozen[:, 0] = True
    x, model, _ = twins_of(1, x_0=torch.ones(200, 4, dtype=torch.int64), frozen=frozen)
    assert (x[:, 1] == 1).all() and torch.equal(model.calls[0][2], frozen)


@pytest.mark.parametrize("rule", STEP_RULES.values(), ids=STEP_RULES)
def test_a_rule_that_leaves_movers_where_they_are_is_refused_several_groups(rule: StepRule) -> None:
    """A mover that stays is not drawn, but its neighbours would be told that it was."""
    p, x_t = torch.tensor([[0.7, 0.3]]), torch.tensor([0])
    stays = not torch.equal(rule.land(p, x_t, torch.tensor([0.4])), p)
    Drawing(rule, posterior=Grouped(Twins(), 1))
    if not stays:
        Drawing(rule, posterior=Grouped(Twins(), 2))
        return
    with pytest.raises(ConfigError, match=f"step={rule.name} cannot go with draws=2") as caught:
        Drawing(rule, posterior=Grouped(Twins(), 2))
    assert "\n" not in str(caught.value)


def test_no_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match="draws must be at least 1"):
        Grouped(Twins(), 0)


class Listening(Twins):
    """Notes which rows are trained on."""

    def head_parameters(self) -> tuple[Tensor, Tensor]:
        return torch.eye(2), torch.zeros(2)


def test_training_asks_for_positions_that_are_not_known_and_shows_data() -> None:
    model = Listening()
    x_1 = torch.randint(2, (400, 8), generator=torch.Generator().manual_seed(0))
    objective = Joint(UniformSource(2), Polynomial())
    parts = objective.loss(model, model, x_1, torch.Generator().manual_seed(1))
    ((at, x, known),) = model.calls
    assert torch.equal(x, x_1) and float(parts["loss"]) > 0.0
    assert torch.equal(at, (~known).flatten().nonzero()[:, 0])
    assert 0.1 < float(known.float().mean()) < 0.6


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_prompts_and_the_rims_of_gaps_are_known_and_shown_in_a_part_of_the_rows(
    share: float,
) -> None:
    """As `fill` gives them: data in the state too, left and right of a gap at once."""
    states: list[Tensor] = []

    class Seen(Listening):
        def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
            states.append(torch.where(t[:, None] == 0.0, x_t, 0))  # at 0 the path shows no data
            return super().body(x_t, t, h)

        def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
            self.calls.append((at, x, known))
            return rows

    def nothing(logits: Tensor, *_: Tensor) -> Tensor:
        return 0.0 * logits.sum(-1)

    model, x_1 = Seen(), torch.full((4000, 12), 7)  # no token of the source
    objective = Joint(UniformSource(5), Polynomial(), nothing, 0.9, share)
    objective.loss(model, model, x_1, torch.Generator().manual_seed(1))
    shown, ((_, _, known),) = states[0] == 7, model.calls
    rows = float(shown.any(1).float().mean())
    assert not (shown & ~known).any() and (known & ~shown).any()
    assert (rows == 0.0) if share == 0.0 else (0.25 < rows < 0.4)
    around = shown[:, 0] & shown[:, -1] & ~known.all(1)
    alone = shown[:, 0] & ~shown[:, -1]
    assert bool(around.any()) == bool(alone.any()) == (share > 0.0)


def test_what_is_known_follows_the_groups_and_is_nothing_in_a_part_of_the_rows() -> None:
    known = known_at_random(4000, 32, torch.Generator().manual_seed(0), "fixed")
    nothing = (~known.any(1)).float().mean()
    assert 0.25 < float(nothing) < 0.55  # the share of 0, no group drawn, a small share of one
    assert not known[:, -1].any()  # the last of 2, 4, ..., 32 groups is never known
    assert float(known[:, 0].float().mean()) > float(known[:, 30].float().mean())


def test_at_random_seams_every_position_is_known_as_often() -> None:
    known = known_at_random(4000, 32, torch.Generator().manual_seed(0)).float().mean(0)
    error = (known.mean() * (1.0 - known.mean()) / 4000) ** 0.5
    assert ((known - known.mean()).abs() < 4.5 * error).all()


def test_a_joint_head_learns_what_neighbours_say() -> None:
    """Texts are random pairs of equal tokens: the one that is drawn first says all."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    shape = {"vocab_size": V, "hidden_size": 32, "blocks": 1, "heads": 2, "cond_size": 8}
    model = Transformer(ModelConfig.from_dict({**shape, "neighbours": 1}))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    objective = Joint(UniformSource(V), Polynomial())
    for _ in range(400):
        x_1 = torch.randint(V, (128, 1), generator=generator).expand(-1, 2)
        loss = objective.loss(model, model, x_1, generator)["loss"]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    equal = {}
    for draws in (1, 2):
        noise = Noise(range(300))
        *_, last = sample(
            Sequences(model.eval()),
            noise.start(UniformSource(V), 2),
            even_grid(1),
            noise,
            UniformSource(V),
            drawing=Drawing(posterior=Grouped(model, draws)),
        )
        equal[draws] = float((last.x[:, 0] == last.x[:, 1]).float().mean())
    assert equal[1] < 0.4 and equal[2] > 0.9, equal


def test_a_directory_keeps_the_joint_head_and_older_ones_load_without(tmp_path: Path) -> None:
    model = network()
    vocabulary = {f"w{i}": i for i in range(V)}
    spec = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    text = json.dumps({"version": "1.0", "added_tokens": [], "model": spec})
    save_pretrained(tmp_path / "m", model, tokenizer_json=text, generation={"draws": 4})
    loaded = load_pretrained(tmp_path / "m")
    assert loaded.model.config.neighbours == 2 and loaded.generation["draws"] == 4
    assert torch.equal(loaded.model.joint.out.weight, model.joint.out.weight)
    assert "neighbours" not in network(0).config.to_dict()


@pytest.mark.parametrize("source", ["uniform", "mask"])
@pytest.mark.parametrize("kind", ["pretrain", "joint", *TARGETS])
def test_every_objective_trains_the_joint_head(kind: str, source: str) -> None:
    """What is drawn from and judged passes through it, so what is trained does."""
    model, origin = network(source=source), make_source(source, V)
    x_1 = torch.randint(V, (24, L), generator=torch.Generator().manual_seed(1))
    objective: Pretrain | Joint | Distill
    if kind in TARGETS:
        objective = Distill(origin, Polynomial(), TARGETS[kind], EXACT, even_weights(0.0))
    else:
        objective = (Pretrain if kind == "pretrain" else Joint)(origin, Polynomial())
    parts = objective.loss(model, model, x_1, torch.Generator().manual_seed(2))
    parts["loss"].backward()  # type: ignore[no-untyped-call]
    assert all(
        p.grad is not None and p.grad.any()
        for p in (model.joint.out.weight, model.joint.row.weight)
    )
