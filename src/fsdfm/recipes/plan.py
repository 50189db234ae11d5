"""What a training takes before it is begun: memory, FLOPs, days, and more devices on paper."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fsdfm.flow.loss import POSITION_LOSSES
from fsdfm.flow.path import make_source
from fsdfm.flow.schedule import Polynomial
from fsdfm.flow.step import STEP_RULES
from fsdfm.flow.target import TARGETS
from fsdfm.model.config import PRESETS, ModelConfig
from fsdfm.model.transformer import Transformer
from fsdfm.recipes.cost import (
    FLOAT,
    HALF,
    State,
    activation_bytes,
    logits_bytes,
    sequence_flops,
    state_bytes,
    work,
)
from fsdfm.recipes.plan_settings import PlanSettings
from fsdfm.recipes.settings import PRETRAINED, RECIPES
from fsdfm.train.objective import STEP_WEIGHTS, Distill, Objective, Pretrain
from fsdfm.train.optim import make_optimizer

PUBLISHED = "published"
SCALES = (1, 8, 64, 1000)
"""Devices of the projection."""
BACKWARD = 2 / 3
"""Of an update's computing, what may hide the sums of gradients."""
SECONDS_A_DAY = 86_400.0


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on a device at the peak of an update, by part; their sum is an upper bound."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    casts: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(asdict(self).values())


@dataclass(frozen=True, slots=True)
class Scale:
    """The same training on some number of devices."""

    gpus: int
    batch_size: int
    """Sequences of an update: the recipe's, or one a device where these are more."""
    compute_seconds: float
    """Of an update."""
    bytes_inside: float
    """That a device sends within its node in an update."""
    bytes_outside: float
    """That a device sends to other nodes."""
    communication_seconds: float
    efficiency: float
    """Computing over computing and communication, nothing hidden."""
    efficiency_hidden: float
    """The same, with communication during the backward pass."""
    days: float
    """To the tokens asked for, nothing hidden."""
    days_hidden: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """What `forecast` found out."""

    settings: PlanSettings
    state: State
    """Of a device that holds all."""
    batch_size: int
    passes: int
    sequences: int
    """Of a device in one pass."""
    memory: Memory
    flops_a_token: float
    tokens: float
    updates: float
    scales: list[Scale]
    """The devices asked for, and SCALES."""

    @property
    def fits(self) -> bool:
        """Whether the sum of the parts is less than a device has."""
        return self.memory.total <= self.settings.gpu_memory_gb * 1e9

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            **asdict(self),
            "memory": {**asdict(self.memory), "total": self.memory.total},
            "fits": self.fits,
        }


def forecast(settings: PlanSettings) -> Forecast:
    """Plan a training from formulas; nothing is allocated."""
    config, objective = _network(settings), _objective(settings)
    with torch.device("meta"):
        model = Transformer(config)
    state = state_bytes(model, make_optimizer(model, 0.0, settings.optimizer))
    recipe = PRETRAINED[PUBLISHED] if settings.task == "pretrain" else asdict(RECIPES[PUBLISHED])
    batch_size = settings.batch_size or recipe["batch_size"]
    tokens = settings.tokens
    if tokens is None:
        tokens = float(recipe["steps"] * recipe["batch_size"] * settings.context_length)
    done, length = work(objective), settings.context_length
    flops = sequence_flops(config, done, length)
    each = math.ceil(batch_size / settings.gpus)
    passes, memory = _memory(settings, config, state, each, calls=done.free)
    counts = sorted({settings.gpus, *SCALES})
    return Forecast(
        settings=settings,
        state=state,
        batch_size=batch_size,
        passes=passes,
        sequences=math.ceil(each / passes),
        memory=memory,
        flops_a_token=flops / length,
        tokens=tokens,
        updates=tokens / (batch_size * length),
        scales=[_scale(settings, state, flops, batch_size, tokens, gpus) for gpus in counts],
    )


def _network(settings: PlanSettings) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            **PRESETS[settings.preset],
            "vocab_size": settings.vocab_size,
            "context_length": settings.context_length,
            "step_embedding": "none" if settings.task == "pretrain" else "raw",
        }
    )


def _objective(settings: PlanSettings) -> Objective:
    source, schedule = make_source("uniform", settings.vocab_size), Polynomial()
    if settings.task == "pretrain":
        return Pretrain(source, schedule)
    recipe = RECIPES[PUBLISHED]
    return Distill(
        source,
        schedule,
        TARGETS[recipe.target],
        STEP_RULES[recipe.target_rule],
        STEP_WEIGHTS[recipe.step_weights](),
        POSITION_LOSSES[recipe.loss],
    )


def _memory(
    settings: PlanSettings, config: ModelConfig, state: State, sequences: int, calls: float
) -> tuple[int, Memory]:
    """How many passes, and the memory of one of them.

    Args:
        settings: number and kind of devices.
        config: shape of the network.
        state: of a device that holds all.
        sequences: of a device in an update.
        calls: of the network without a gradient, for targets.
    """
    parts = settings.gpus if settings.sharding == "fsdp" else 1
    # Sharded weights come together two blocks at a time, in bfloat16; and for a whole pass those of
    # the ends, in float32: the network's, and the average's where targets are asked of it.
    casts = state.casts
    if parts > 1:
        ends = 2 * config.embedding_rows * config.hidden_size
        casts = 2 * casts // config.blocks + (HALF + FLOAT * (2 if calls else 1)) * ends
    asked = range(1, sequences + 1) if settings.passes is None else (settings.passes,)
    for passes in asked:
        tokens = math.ceil(sequences / passes) * settings.context_length
        kept = activation_bytes(config, tokens)
        kept += round(calls * tokens * config.hidden_size * FLOAT)  # what a target is made of
        memory = Memory(
            weights=state.weights // parts,
            gradients=state.gradients // parts,
            optimizer=state.optimizer // parts,
            average=state.average // parts,
            casts=casts,
            activations=kept,
            logits=logits_bytes(config, tokens),
        )
        if memory.total <= settings.gpu_memory_gb * 1e9:
            break
    return passes, memory


def _scale(
    settings: PlanSettings, state: State, flops: float, batch_size: int, tokens: float, gpus: int
) -> Scale:
    """The training on some devices.

        seconds = FLOPs / (peak x utilisation) + bytes inside / link + bytes outside / network

    A sum over N devices of which n share a node sends, of each device, 2 (n - 1) / n of the bytes
    inside and, with the n devices of a node sharing the work, 2 (m - 1) / m / n of them outside,
    m = N / n. Sharded, weights are gathered twice in bfloat16 and gradients are summed once.

    Args:
        settings: rates of devices and links.
        state: of a device that holds all.
        flops: of training on one sequence.
        batch_size: sequences of an update.
        tokens: to train on.
        gpus: N.
    """
    near = min(gpus, settings.gpus_per_node)
    far = max(1, math.ceil(gpus / near))
    batch_size = max(batch_size, gpus)
    each = math.ceil(batch_size / gpus)  # the device with most of them is waited for
    compute = each * flops / (settings.peak_tflops * 1e12 * settings.utilisation)
    summed: float = 2 * state.gradients
    if settings.sharding == "fsdp":
        summed = state.gradients + 2 * HALF / FLOAT * state.weights
    inside = (near - 1) / near * summed
    outside = (far - 1) / far * summed / near
    talk = inside / (settings.link_gb * 1e9) + outside / (settings.network_gb * 1e9)
    hidden = max(0.0, talk - BACKWARD * compute)
    updates = tokens / (batch_size * settings.context_length)
    return Scale(
        gpus=gpus,
        batch_size=batch_size,
        compute_seconds=compute,
        bytes_inside=inside,
        bytes_outside=outside,
        communication_seconds=talk,
        efficiency=compute / (compute + talk),
        efficiency_hidden=compute / (compute + hidden),
        days=updates * (compute + talk) / SECONDS_A_DAY,
        days_hidden=updates * (compute + hidden) / SECONDS_A_DAY,
    )
