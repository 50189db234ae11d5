"""What is asked of every side, the shapes of its network, and what a run comes to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from fsdfm.bench import reference
from fsdfm.bench.settings import SHAPES
from fsdfm.core.errors import ConfigError
from fsdfm.model.causal import CausalConfig
from fsdfm.model.config import PRESETS, ModelConfig
from fsdfm.model.io.directory import bundled, resolve
from fsdfm.model.io.pretrained import read_config, read_generation
from fsdfm.model.networks import build_network
from fsdfm.model.transformer import FlowNetwork

NEIGHBOURS = 3
"""Of a joint head, as `fsdfm distill` has it."""
FEW_TOKENS = 8
"""Of the run that comes before all timed ones."""


@dataclass(frozen=True, slots=True)
class Job:
    """What every side is asked to do in one run."""

    batch: int
    """Sequences."""
    length: int
    """Tokens of a sequence."""
    steps: int
    """Model calls of a sampler, or updates of a training run."""
    rule: reference.Rule = "published"
    """Step rule of a sampler."""
    sampling: dict[str, Any] | None = None
    """What the model's generation.json says, for a sampler with a joint head."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run came to."""

    tokens: int
    """Written, or trained on."""
    flops: float | None
    """Of its matrix products and attention; None where they are not counted."""


class Side(Protocol):
    """One way to do a job."""

    def run(self, job: Job, seed: int) -> Cost:
        """Do the job."""
        ...

    def warm_up(self, job: Job) -> Job:
        """The least of the job that compiles and caches all that it needs."""
        ...

    def peak(self, job: Job) -> Job:
        """The least of the job that takes as much memory as all of it."""
        ...


ADAPTED = CausalConfig(
    vocab_size=12_288,
    hidden_size=576,
    blocks=12,
    heads=9,
    cond_size=32,
    source="mask",
    step_embedding="log2",
    kv_heads=3,
    head_size=64,
    mlp_size=1536,
    rotary_base=100_000.0,
    start_id=0,
)
"""12 layers of SmolLM2-135M with a vocabulary that was cut; it draws as the bundled model does."""


def shape(name: str) -> ModelConfig:
    """The network to measure, without a joint head and told of h.

    Args:
        name: one of SHAPES, with the vocabulary that it is used with; or a model directory.

    Raises:
        ConfigError: another name.
        CheckpointError: a directory that holds no model.
    """
    if name == "adapted":
        return ADAPTED
    if name in PRESETS:
        vocab_size = {"tiny": 4096, "small": 8192}.get(name, 50_257)
        sizes: dict[str, Any] = PRESETS[name]
        return ModelConfig(vocab_size, **sizes, source="mask", step_embedding="log2")
    if name != "bundled" and not Path(name).is_dir():
        raise ConfigError(
            f"The shape must be one of {', '.join(SHAPES)}, or a model directory, got {name}."
        )
    config, _ = read_config(resolve(name))
    return replace(config, step_embedding="log2", neighbours=0)


def with_joint_head(config: ModelConfig) -> ModelConfig:
    """The network with a joint head, as `fsdfm distill` makes one."""
    return replace(config, neighbours=NEIGHBOURS, step_embedding="none")


def sampling(name: str) -> dict[str, Any] | None:
    """What generation.json says where the shape is that of a model; adapted has the bundled one's.

    Args:
        name: as for `shape`.

    Raises:
        CheckpointError: an unreadable file.
    """
    if name in PRESETS:
        return None
    return read_generation(bundled() if name == "adapted" else resolve(name))


def random_model(config: ModelConfig) -> FlowNetwork:
    """A network whose every branch does something: fresh ones start with silent blocks."""
    torch.manual_seed(0)
    model = build_network(config)
    for parameter in model.parameters():
        if parameter.ndim == 2 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


# Sampling.


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that a clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
