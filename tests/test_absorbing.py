"""The absorbing mask source: what is revealed stays, and only what is hidden is learned."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from fsdfm.flow.grid import even_grid
from fsdfm.flow.loss import (
    LATEST_TIME,
    POSITION_LOSSES,
    cross_entropy,
    elbo_nats_per_token,
    generalized_kl,
    path_loss,
)
from fsdfm.flow.path import Batch, MaskSource, Source, UniformSource, make_source, mixed
from fsdfm.flow.posterior import Grouped, Sequences
from fsdfm.flow.sampler import Drawing, Noise, State, sample
from fsdfm.flow.schedule import Polynomial
from fsdfm.flow.step import EXACT, MOVERS, STEP_RULES
from fsdfm.flow.target import TARGETS, Jumper, TargetRule
from fsdfm.model.causal import CausalConfig, CausalNetwork
from fsdfm.model.engine import Engine
from fsdfm.model.student import student_from_teacher
from fsdfm.train.objective import (
    Distill,
    Joint,
    Pretrain,
    even_weights,
    frozen_at_random,
    known_at_random,
)

P_1 = torch.tensor([0.55, 0.25, 0.15, 0.05], dtype=torch.float64)
ENTROPY_NATS = float(-(P_1 * P_1.log()).sum())
V = len(P_1)
ABSORBING = MaskSource(V)


class Independent:
    """Hidden positions have P_1; of the others the network has learned nothing: nonsense."""

    def __init__(self) -> None:
        self.shown: list[Tensor] = []

    def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        self.shown.append(x_t)
        nonsense = 30.0 * torch.eye(V + 1, dtype=torch.float64)[(x_t + 1) % V]
        masked = torch.cat((P_1.log(), P_1.new_full((1,), 40.0)))  # a mask id is likeliest of all
        return torch.where((x_t == V)[..., None], masked, nonsense)

    def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
        return rows

    def head(self, rows: Tensor) -> Tensor:
        return rows

    def head_parameters(self) -> tuple[Tensor, None]:
        return torch.eye(V + 1, dtype=torch.float64), None


def network(**changes: object) -> CausalNetwork:
    """A small one with every parameter at work."""
    shape = {
        "vocab_size": V,
        "hidden_size": 16,
        "blocks": 2,
        "heads": 2,
        "cond_size": 8,
        "context_length": 32,
        "source": "mask",
        "kv_heads": 1,
        "head_size": 8,
        "mlp_size": 24,
        "start_id": 0,
    }
    model = CausalNetwork(CausalConfig(**{**shape, **changes}))  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=draw)
    return model


def data(batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(P_1, batch * length, True, generator=generator).view(batch, length)


# The source.


def test_only_the_mask_source_absorbs() -> None:
    assert make_source("mask", V) == ABSORBING and ABSORBING.absorbing
    assert make_source("uniform", V) == UniformSource(V) and not UniformSource(V).absorbing
    with pytest.raises(ValueError, match="must be one of uniform, mask, got noise"):
        make_source("noise", V)


# The sampler.


def walk(
    model: Sequences | Engine,
    steps: int,
    drawing: Drawing,
    *,
    seeds: range = range(6),
    length: int = 40,
    given: Tensor | None = None,
) -> list[State]:
    noise = Noise(seeds)
    x_0, frozen = noise.start(ABSORBING, length), None
    if given is not None:
        frozen = given < V
        x_0 = torch.where(frozen, given, x_0)
    states = sample(
        model,
        x_0,
        even_grid(steps),
        noise,
        ABSORBING,
        drawing=drawing,
        frozen=frozen,
    )
    return list(states)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 50])
@pytest.mark.parametrize(("rule", "movers"), list(itertools.product(STEP_RULES, MOVERS)))
def test_what_is_revealed_stays_and_every_position_is_drawn_once(
    steps: int, rule: str, movers: str
) -> None:
    drawing = Drawing(rule=STEP_RULES[rule], movers=MOVERS[movers])
    for model in (Sequences(Independent()), Engine(network(), torch.float32)):
        states = walk(model, steps, drawing)
        for before, after in itertools.pairwise(states):
            revealed = before.x < V
            assert torch.equal(after.x[revealed], before.x[revealed])
            drawn = int((before.x != after.x).sum())
            assert after.head_rows - before.head_rows == drawn
        assert (states[0].x == V).all() and (states[-1].x < V).all()
        assert states[-1].head_rows == 6 * 40 and states[-1].calls <= steps


@pytest.mark.parametrize("rule", STEP_RULES)
def test_what_is_given_stays_and_is_not_drawn(rule: str) -> None:
    given = data(6, 40)
    given[:, 10:30] = V
    states = walk(Sequences(Independent()), 5, Drawing(STEP_RULES[rule]), given=given)
    for state in states:
        assert torch.equal(state.x[given < V], given[given < V])
    assert (states[-1].x < V).all() and states[-1].head_rows == 6 * 20


def test_nothing_is_asked_where_all_is_given() -> None:
    model, given = Independent(), data(6, 40)
    *_, last = walk(Sequences(model), 4, Drawing(), given=given)
    assert torch.equal(last.x, given) and last.calls == last.head_rows == 0 and not model.shown


def test_a_position_that_holds_data_at_the_start_stays_without_being_frozen() -> None:
    noise = Noise([1])
    x_0 = torch.tensor([[V, 2, V, 0]])
    *_, last = sample(Sequences(Independent()), x_0, even_grid(3), noise, ABSORBING)
    assert last.x[0, [1, 3]].tolist() == [2, 0] and last.head_rows == 2


@pytest.mark.parametrize("steps", [1, 3, 16])
@pytest.mark.parametrize("rule", STEP_RULES)
def test_the_law_of_one_token_is_kept_at_every_budget(steps: int, rule: str) -> None:
    drawing = Drawing(STEP_RULES[rule])
    states = walk(Sequences(Independent()), steps, drawing, seeds=range(40), length=500)
    share = torch.bincount(states[-1].x.flatten(), minlength=V).double() / 20_000
    error = 4.5 * (P_1 * (1 - P_1) / 20_000).sqrt()
    assert ((share - P_1).abs() < error).all()


def test_how_much_is_hidden_follows_the_path() -> None:
    states = walk(Sequences(Independent()), 5, Drawing(), seeds=range(40), length=500)
    for state in states:
        hidden = float((state.x == V).double().mean())
        error = 4.5 * math.sqrt(state.t * (1 - state.t) / 20_000)
        assert abs(hidden - (1.0 - state.t)) <= error


def test_groups_of_a_joint_head_know_what_was_revealed_before() -> None:
    known_at_call: list[Tensor] = []

    class Watched(Sequences):
        def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
            known_at_call.append(known)
            assert torch.equal(known, x < V)
            return rows

    model = Watched(Independent())
    walk(model, 4, Drawing(posterior=Grouped(model, 3)))
    assert len(known_at_call) == 12 and known_at_call[-1].any() and not known_at_call[0].any()


# The losses.


@pytest.mark.parametrize("name", POSITION_LOSSES)
def test_a_path_loss_counts_the_hidden_positions_that_are_not_frozen(name: str) -> None:
    x_1 = torch.tensor([[0, 1, 2, 3], [0, 0, 1, 3]])
    x_t = torch.tensor([[V, 1, V, 3], [V, V, 1, V]])
    frozen = torch.zeros(2, 4, dtype=torch.bool)
    frozen[1, :1] = True
    t = torch.tensor([0.2, 0.6], dtype=torch.float64)
    for mask, at in ((None, [0, 2, 4, 5, 7]), (frozen, [0, 2, 5, 7])):
        batch = on_path(x_t, x_1, t, ABSORBING, mask)
        assert batch.places.tolist() == at
        found = path_loss(Independent(), batch, V, Polynomial(), POSITION_LOSSES[name])
        nats = -P_1.log()[x_1.flatten()[at]]
        g = 1.0 / (1.0 - t.repeat_interleave(4)[at]) if name == "generalized_kl" else 1.0
        assert float(found) == pytest.approx(float((g * nats).mean()), rel=1e-6)


def on_path(x_t: Tensor, x_1: Tensor, t: Tensor, source: Source, frozen: Tensor | None) -> Batch:
    batch = mixed(torch.full_like(x_1, V), x_1, x_t < V, t, t, source)
    assert torch.equal(batch.x_t, x_t)
    return batch if frozen is None else batch.given(frozen)


def test_the_uniform_source_counts_all_that_is_not_frozen() -> None:
    x_t, x_1, t = torch.tensor([[0, V, 1]]), torch.tensor([[0, 2, 1]]), torch.tensor([0.5])
    assert on_path(x_t, x_1, t, UniformSource(V), None).places.tolist() == [0, 1, 2]
    frozen = torch.tensor([[True, False, False]])
    assert on_path(x_t, x_1, t, UniformSource(V), frozen).places.tolist() == [1, 2]


def test_the_bound_on_independent_tokens_is_their_entropy() -> None:
    repeats, estimates = 24, []
    for seed in range(repeats):
        x_1 = data(8, 512, 100 + seed)
        nats = list(elbo_nats_per_token(Independent(), x_1, ABSORBING, times=8, seed=seed))
        estimates.append(sum(nats) / 8)
    mean, spread = torch.tensor(estimates).mean(), torch.tensor(estimates).std()
    assert abs(float(mean) - ENTROPY_NATS) < 4.5 * float(spread) / math.sqrt(repeats)
    assert float(spread) < 0.1 * ENTROPY_NATS


class Whole(Polynomial):
    """A path on which everything has been revealed."""

    def kappa(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def rate(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


def test_the_bound_of_a_block_that_happens_to_be_shown_whole_is_0() -> None:
    x_1, schedule = torch.zeros(2, 3, dtype=torch.int64), Whole()
    assert list(elbo_nats_per_token(Independent(), x_1, ABSORBING, schedule, times=3)) == [0.0] * 3


# Training.


def updated(objective: Pretrain | Distill | Joint, model: CausalNetwork, x_1: Tensor) -> set[str]:
    """Names of what an update changes; the loss must be finite and so must the gradient."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    parts = objective.loss(model, model, x_1, torch.Generator().manual_seed(4))
    parts["loss"].backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert all(bool(p.isfinite()) for p in parts.values())
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


@pytest.mark.parametrize("loss", [generalized_kl, cross_entropy])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_teacher_is_updated_whole(loss: object, share: float) -> None:
    model = network()
    objective = Pretrain(ABSORBING, Polynomial(), loss, share)  # type: ignore[arg-type]
    changed = updated(objective, model, data(16, 12))
    assert changed == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_target_updates_a_student(target: str, tied: bool) -> None:
    model = student_from_teacher(network(tied=tied), "log2")
    objective = Distill(ABSORBING, Polynomial(), TARGETS[target], EXACT, even_weights())
    changed = updated(objective, model, data(24, 12))
    assert {"vocab_embed.weight", "blocks.1.qkv.weight", "dt_embedding.mlp.2.weight"} <= changed


@pytest.mark.parametrize("tied", [True, False])
def test_a_joint_head_leaves_the_body_as_it_is(tied: bool) -> None:
    teacher = network(tied=tied)
    model = student_from_teacher(teacher, "none", neighbours=2)
    changed = updated(Joint(ABSORBING, Polynomial()), model, data(16, 12))
    head = set() if tied else {"output_layer.linear.weight"}
    assert changed == head | {"joint.out.weight", "joint.out.bias"}  # the rest wakes later
    x, times = data(2, 9), torch.tensor([0.3, 0.6])
    with torch.no_grad():
        assert torch.equal(model.body(x, times, times), teacher.body(x, times, times))


def test_a_joint_head_is_trained_on_hidden_positions_and_knows_the_others() -> None:
    asked: list[tuple[Tensor, Tensor, Tensor]] = []

    class Watched(Independent):
        def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
            asked.append((at, x, known))
            return rows

    x_1, model = data(200, 16), Watched()
    Joint(ABSORBING, Polynomial()).loss(model, model, x_1, torch.Generator().manual_seed(2))
    ((at, x, known),), (x_t,) = asked, model.shown
    assert torch.equal(x, x_1) and bool(known[x_t < V].all())
    assert torch.equal(at, (~known).flatten().nonzero()[:, 0])
    more = known & (x_t == V)  # what the groups before have drawn in this very call
    drawn = known_at_random(200, 16, torch.Generator().manual_seed(9)).float().mean()
    assert 0.5 * drawn < float(more.float().sum() / (x_t == V).float().sum()) < 1.5 * drawn


@pytest.mark.parametrize("kind", ["pretrain", "pretrain frozen", "joint", *TARGETS])
def test_a_batch_with_nothing_hidden_gives_no_loss_and_no_gradient(kind: str) -> None:
    model, x_1, schedule = network(), torch.ones(6, 9, dtype=torch.int64), Whole()
    objective: Pretrain | Distill | Joint
    if kind in TARGETS:
        model = student_from_teacher(model, "log2")
        objective = Distill(ABSORBING, schedule, TARGETS[kind], EXACT, even_weights())
    elif kind == "joint":
        model = student_from_teacher(model, "none", neighbours=2)
        objective = Joint(ABSORBING, schedule)
    else:
        share = float("frozen" in kind)
        objective = Pretrain(ABSORBING, schedule, generalized_kl, share)
    parts = objective.loss(model, model, x_1, torch.Generator().manual_seed(1))
    assert all(float(value.detach()) == 0.0 for value in parts.values())
    parts["loss"].backward()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        assert parameter.grad is None or not parameter.grad.any()


# Targets.


def jumper(model: Independent, x_t: Tensor, rule: str = "exact") -> Jumper:
    generator = torch.Generator().manual_seed(1)
    return Jumper(model, Polynomial(), STEP_RULES[rule], ABSORBING, generator, x_t == V)


@pytest.mark.parametrize("rule", STEP_RULES)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_jumps_inside_a_target_move_hidden_positions_alone(target: TargetRule, rule: str) -> None:
    model, x_t = Independent(), data(2, 400)
    x_t[:, ::2] = V
    h = torch.tensor([0.5, 1.0], dtype=torch.float64)
    target(jumper(model, x_t, rule), x_t, torch.zeros_like(h), h)
    assert len(model.shown) > 1
    for before, after in itertools.pairwise(model.shown):
        shown = before < V
        assert torch.equal(after[shown], before[shown])
        assert (after[~shown] < V).any()  # some are revealed


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_no_target_asks_a_network_about_what_a_jump_has_revealed(target: TargetRule) -> None:
    """There it has learned nothing; a constant posterior must come back as it is."""
    x_t = torch.full((2, 300), V)
    h = torch.tensor([0.5, 1.0], dtype=torch.float64)
    model = Independent()
    made = target(jumper(model, x_t), x_t, torch.zeros_like(h), h)
    p = made.mix(made.logits(model, slice(0, 600), V), slice(0, 600), slice(0, 600))
    torch.testing.assert_close(p, P_1.float().expand(600, -1), rtol=0, atol=1e-6)


class Clocked(Independent):
    """A posterior that depends on the time: P_1 to a power."""

    def posterior(self, t: float) -> Tensor:
        return (P_1.log() * (1.0 + 2.0 * t)).softmax(-1)

    def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        rows = super().body(x_t, t, h)
        power = torch.where(x_t == V, 1.0 + 2.0 * t.double()[:, None], 1.0)
        return rows * power[..., None]


@pytest.mark.parametrize(("t", "h"), [(0.0, 1.0), (0.0, 0.5), (0.25, 0.5), (0.5, 0.125)])
def test_the_semigroup_target_is_two_absorbing_half_steps_on_average(t: float, h: float) -> None:
    length, model = 40_000, Clocked()
    times, steps = (torch.tensor([value], dtype=torch.float64) for value in (t, h))
    x_t = torch.full((1, length), V)
    made = TARGETS["semigroup"](jumper(model, x_t), x_t, times, steps)
    rows = slice(0, length)
    p = made.mix(made.logits(model, rows, V), rows, rows).double()
    first, second = h / 2 / (1 - t), h / 2 / (1 - t - h / 2)
    lands_early = first / (first + (1 - first) * second)
    wanted = lands_early * model.posterior(t) + (1 - lands_early) * model.posterior(t + h / 2)
    assert (model.posterior(t) - model.posterior(t + h / 2)).abs().max() > 0.02
    error = 4.5 * p.std(0) / math.sqrt(length) + 1e-6
    assert ((p.mean(0) - wanted).abs() < error).all()


# What is given in training.


def test_given_parts_have_four_patterns_and_are_never_all() -> None:
    frozen = frozen_at_random(20_000, 9, 1.0, torch.Generator().manual_seed(0))
    assert not frozen.all(1).any()
    edges = torch.cat((~frozen[:, :1], frozen[:, 1:] == frozen[:, :-1]), 1)
    assert ((~edges).sum(1) <= 3).all()  # at most three parts, so at most two borders inside
    start, end = frozen[:, 0], frozen[:, -1]
    inner = frozen.any(1) & ~start & ~end
    shares = [(start & ~end), (end & ~start), (start & end), inner]
    # Cuts of 9 positions: `after` gives none where the later cut is the last, and so on; a
    # prefix is empty where a cut is 0, and a whole middle that touches an end looks like one.
    for each, share in zip(shares, frozen_shares(9), strict=True):
        error = 4.5 * math.sqrt(share * (1 - share) / 20_000)
        assert abs(float(each.float().mean()) - share) < error
    gaps = (~frozen & (start & end)[:, None]).long()
    assert (gaps.diff(dim=1).clamp_min(0).sum(1) <= 1).all()  # both ends leave one gap


def frozen_shares(length: int) -> list[float]:
    """Of rows: only the start given, only the end, both ends, neither end but some; by counting."""
    counts = [0.0] * 4
    for a, b in itertools.product(range(length), repeat=2):
        first, second = min(a, b), max(a, b)
        patterns = [
            [i < first for i in range(length)],
            [i > second for i in range(length)],
            [i < first or i > second for i in range(length)],
            [first <= i <= second and second - first < length - 1 for i in range(length)],
        ]
        for row in patterns:
            kind = {(True, False): 0, (False, True): 1, (True, True): 2}.get((row[0], row[-1]), 3)
            counts[kind] += any(row) / (4 * length**2)
    return counts


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_rows_has_given_parts(share: float) -> None:
    frozen = frozen_at_random(20_000, 64, share, torch.Generator().manual_seed(1))
    nothing = 1.0 - sum(frozen_shares(64))  # a part may be empty
    wanted = share * (1.0 - nothing)
    error = 4.5 * math.sqrt(wanted * (1 - wanted) / 20_000)
    assert abs(float(frozen.any(1).float().mean()) - wanted) <= error


def test_one_position_is_never_given() -> None:
    assert not frozen_at_random(500, 1, 1.0, torch.Generator().manual_seed(2)).any()


@pytest.mark.parametrize("source", [ABSORBING, MaskSource(V), UniformSource(V)], ids=repr)
def test_given_parts_are_shown_and_not_learned(source: Source) -> None:
    model, x_1 = Independent(), data(300, 10)
    seen: list[Tensor] = []

    def loss(logits: Tensor, x_t: Tensor, there: Tensor, g: Tensor) -> Tensor:
        seen.append(x_t)
        return logits.sum(-1)

    objective = Pretrain(source, Polynomial(), loss, 1.0)
    objective.loss(model, model, x_1, torch.Generator().manual_seed(3))
    ((x_t,), generator) = model.shown, torch.Generator().manual_seed(3)
    plain = Pretrain(source, Polynomial(), loss)
    plain.loss(model, model, x_1, generator)
    frozen = frozen_at_random(300, 10, 1.0, generator)  # what comes next from the same numbers
    assert torch.equal(x_t, torch.where(frozen, x_1, model.shown[1]))
    counted = ~frozen & (x_t == V) if source.absorbing else ~frozen
    assert sum(map(len, seen[:1])) == int(counted.sum()) and torch.equal(seen[0], x_t[counted])


def test_times_stop_short_of_the_end() -> None:
    shown: list[Tensor] = []

    class Watched(Independent):
        def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
            shown.append(t)
            return super().body(x_t, t, h)

    model = Watched()
    objective = Pretrain(ABSORBING, Polynomial())
    parts = objective.loss(model, model, data(5000, 4), torch.Generator().manual_seed(5))
    assert shown[0].max() <= LATEST_TIME + 1e-7 and bool(parts["loss"].isfinite())
