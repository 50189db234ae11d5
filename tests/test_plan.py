"""`fsdfm plan`: each formula against a small case that is measured."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fsdfm.core.errors import ConfigError
from fsdfm.flow.path import make_source
from fsdfm.flow.schedule import Polynomial
from fsdfm.flow.step import STEP_RULES
from fsdfm.flow.target import TARGETS
from fsdfm.model.config import PRESETS, ModelConfig
from fsdfm.model.layers import SINUSOIDS
from fsdfm.model.transformer import Transformer
from fsdfm.recipes.cost import activation_bytes, sequence_flops, state_bytes, work
from fsdfm.recipes.plan import SCALES, forecast
from fsdfm.recipes.plan_settings import PlanSettings
from fsdfm.train.checkpoint import TrainState
from fsdfm.train.ema import Ema
from fsdfm.train.loop import Task, update
from fsdfm.train.next_token import NextToken
from fsdfm.train.objective import Distill, Joint, Objective, Pretrain, even_weights
from fsdfm.train.optim import make_optimizer
from fsdfm.train.settings import TrainSettings

V, L, B = 23, 16, 32
CONFIG = ModelConfig(V, 32, 2, 2, 16, context_length=L)
SOURCE, SCHEDULE = make_source("uniform", V), Polynomial()


def data(count: int = B) -> torch.Tensor:
    return torch.randint(V, (count, L), generator=torch.Generator().manual_seed(1))


def updated(config: ModelConfig, objective: Objective, optimizer: str) -> TrainState[Transformer]:
    """The state after one update."""
    model = Transformer(config)
    state = TrainState(model, Ema(model, 0.9), make_optimizer(model, 0.0, optimizer))
    x_1, device = data(4), torch.device("cpu")
    task = Task(objective, SOURCE, SCHEDULE, lambda _: x_1, x_1, device, torch.float32)
    update(state, TrainSettings(steps=1, learning_rate=0.1), task)
    return state


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["none", "log2", "raw"])
def test_bytes_of_weights_moments_and_average_are_those_of_a_run(kind: Any, optimizer: str) -> None:
    config = replace(CONFIG, step_embedding=kind)
    state = updated(config, Pretrain(SOURCE, SCHEDULE), optimizer)
    with torch.device("meta"):
        model = Transformer(config)
    found = state_bytes(model, make_optimizer(model, 0.0, optimizer))
    held = [p for p in state.model.parameters()]
    assert found.parameters == sum(p.numel() for p in held)
    assert found.weights == found.gradients == sum(p.nbytes for p in held)
    assert found.average == sum(p.nbytes for p in state.ema.model.parameters())
    moments = [m for p in held for m in state.optimizer.moments(p).values()]
    if kind == "none":  # fusers and embeddings of h get no gradient from such a loss
        assert found.optimizer == sum(m.nbytes for m in moments)
    linear = [m for m in state.model.modules() if isinstance(m, torch.nn.Linear)]
    assert found.casts == sum(2 * p.numel() for m in linear for p in m.parameters())


def test_parameters_are_those_of_the_formula_written_out() -> None:
    for preset, shape in PRESETS.items():
        d, n, c = shape["hidden_size"], shape["blocks"], shape["cond_size"]
        block = 4 * d * d + (8 * d * d + 5 * d) + 2 * d + 6 * d * (c + 1)
        ends = 2 * 50_257 * d + 50_257 + d + 2 * d * (c + 1)
        time = SINUSOIDS * c + c + c * c + c
        plan = forecast(PlanSettings(preset=preset))
        assert plan.state.parameters == n * block + ends + time
    assert round(plan.state.parameters / 1e9, 1) == 1.7


def counted(config: ModelConfig, objective: Objective, seed: int) -> int:
    """FLOPs of an update's passes, as torch counts them."""
    torch.manual_seed(0)
    model, ema = Transformer(config), Transformer(config).requires_grad_(False)
    x_1, draws = data(), torch.Generator().manual_seed(seed)
    # The plain products: a fused kernel computes its scores again for the gradient.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        objective.loss(model, ema, x_1, draws)["loss"].backward()
    return flops.get_total_flops()


def test_flops_of_pretraining_are_those_that_torch_counts() -> None:
    objective = Pretrain(SOURCE, SCHEDULE)
    formula = B * sequence_flops(CONFIG, work(objective), L)
    # The sinusoids need no gradient: of all products, this one is missing.
    assert counted(CONFIG, objective, 0) == formula - 2 * B * SINUSOIDS * CONFIG.cond_size


@pytest.mark.parametrize("name", ["joint", *TARGETS])
def test_flops_of_distilling_are_those_that_torch_counts_up_to_chance(name: str) -> None:
    config = replace(CONFIG, step_embedding="none" if name == "joint" else "log2")
    if name == "joint":
        config = replace(config, neighbours=2)
        objective: Objective = Joint(SOURCE, SCHEDULE)
    else:
        rule = STEP_RULES["exact"]
        objective = Distill(SOURCE, SCHEDULE, TARGETS[name], rule, even_weights())
    formula = B * sequence_flops(config, work(objective), L)
    found = sum(counted(config, objective, seed) for seed in range(2)) / 2
    assert found == pytest.approx(formula, rel=0.04)  # shares of rows are drawn


def test_work_is_counted_from_what_an_objective_does() -> None:
    plain = work(Pretrain(SOURCE, SCHEDULE))
    assert (plain.passes, plain.free, plain.rows, plain.free_rows) == (1, 0, 1, 0)
    assert work(NextToken(V)) == plain
    absorbing = make_source("mask", V)
    assert work(Pretrain(absorbing, SCHEDULE)).rows == pytest.approx(0.5, abs=0.02)
    # Half of the rows at the smallest step need no target; the others take four passes.
    whole = work(Distill(SOURCE, SCHEDULE, TARGETS["rk4"]))
    assert (whole.passes, whole.free) == (1, 2)
    joint = work(Joint(SOURCE, SCHEDULE))
    assert (joint.passes, joint.free) == (0, 1) and 0.5 < joint.rows < 0.9


@pytest.mark.parametrize("blocks", [1, 3])
def test_activations_are_those_that_autograd_keeps(blocks: int) -> None:
    config = ModelConfig(V, 64, blocks, 2, 16)
    model, sequences, length = Transformer(config), 8, 256
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    x = torch.zeros(sequences, length, dtype=torch.int64)
    t = torch.full((sequences,), 0.3)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        hidden = model.body(x, t, t)
    assert hidden.requires_grad
    with torch.device("meta"):
        shape = Transformer(config)
    casts = state_bytes(shape, make_optimizer(shape, 0.0)).casts
    casts -= 2 * sum(p.numel() for p in shape.output_layer.linear.parameters())
    found = sum(storage.nbytes() for storage in kept.values()) - casts
    # Means and deviations of norms, and what a sequence is conditioned on, are left out.
    assert found == pytest.approx(activation_bytes(config, sequences * length), rel=0.02)


def test_a_plan_says_when_the_papers_count_is_reached() -> None:
    settings = PlanSettings(preset="1.7B", gpus=8, utilisation=0.5)
    plan = forecast(settings)
    assert plan.tokens == 1e6 * 128 * 1024 and plan.updates == 1e6
    by = {scale.gpus: scale for scale in plan.scales}
    assert set(by) == set(SCALES)
    seconds = plan.tokens * plan.flops_a_token / (989e12 * 0.5)
    assert by[1].days == by[1].days_hidden == pytest.approx(seconds / 86_400)
    assert by[8].days_hidden == pytest.approx(by[1].days / 8) and by[8].days > by[8].days_hidden
    assert by[8].bytes_inside == 2 * 7 / 8 * 4 * plan.state.parameters
    assert by[8].bytes_outside == 0
    assert by[64].bytes_outside == 2 * 7 / 8 * 4 * plan.state.parameters / 8
    assert by[1000].batch_size == 1000  # one sequence a device
    student = forecast(replace(settings, task="distill"))
    assert student.tokens == 5e5 * 96 * 1024 and student.flops_a_token > 1.5 * plan.flops_a_token


def test_sharding_divides_what_is_held_and_less_memory_takes_more_passes() -> None:
    whole = forecast(PlanSettings(preset="1.3B"))
    parts = forecast(PlanSettings(preset="1.3B", sharding="fsdp"))
    assert parts.memory.optimizer == whole.memory.optimizer // 8
    assert parts.memory.activations == whole.memory.activations
    assert parts.memory.total < whole.memory.total and parts.fits and whole.fits
    small = forecast(PlanSettings(preset="1.3B", gpu_memory_gb=40))
    assert small.fits and small.passes > whole.passes and small.sequences < whole.sequences
    tiny = forecast(PlanSettings(preset="1.3B", gpu_memory_gb=16))
    assert not tiny.fits and tiny.sequences == 1
    with pytest.raises(ConfigError, match="gpus=12 is not a number of whole nodes of 8"):
        PlanSettings(gpus=12)


def test_the_command_prints_a_table_and_one_object(run: Run) -> None:
    code, out, err = run("plan", "--preset", "1.7B", "--gpus", "8")
    assert (code, err) == (0, "")
    assert "1,705,201,233 parameters" in out and "fits in 80 GB" in out
    assert "--batch-size 64 --accumulate 2" in out and "1,000" in out
    code, out, _ = run("plan", "--preset", "1.7B", "--gpus", "8", "--gpu-memory-gb", "24", "--json")
    plan = json.loads(out)
    assert code == 0 and not plan["fits"] and plan["settings"]["preset"] == "1.7B"
    assert plan["memory"]["weights"] == 4 * plan["state"]["parameters"]
    assert [scale["gpus"] for scale in plan["scales"]] == [1, 8, 64, 1000]
    code, _, err = run("plan", "--gpus", "12")
    assert code == 2 and "--gpus 12" in err
