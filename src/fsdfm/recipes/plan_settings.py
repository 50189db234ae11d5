"""What a plan can be told: a training on paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fsdfm.core.errors import ConfigError
from fsdfm.core.options import AT_LEAST_1, POSITIVE, Range, check, option
from fsdfm.core.registry import Names
from fsdfm.model.config import PRESETS


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """A training on paper, and the machine that it is for."""

    preset: str = option("0.17B", choices=PRESETS)
    """Shape of the network."""
    task: Literal["pretrain", "distill"] = "pretrain"
    """Whose published recipe gives the numbers: the teacher's, or the student's."""
    vocab_size: int = option(50_257, within=AT_LEAST_1)
    """Tokens; GPT-2's."""
    context_length: int = option(1024, within=AT_LEAST_1)
    """Tokens of a sequence."""
    batch_size: int | None = option(None, within=AT_LEAST_1, unset="the recipe's")
    """Sequences of an update, over all devices."""
    passes: int | None = option(None, within=AT_LEAST_1, unset="as few as fit")
    """Forward passes in which a device goes through its sequences."""
    tokens: float | None = option(None, within=POSITIVE, unset="the recipe's")
    """To train on, in all."""
    optimizer: str = option("adamw", choices=Names("fsdfm.train.optim.OPTIMIZERS"))
    """muon keeps one moment of the matrices in the blocks, AdamW two."""
    sharding: Literal["none", "fsdp"] = "none"
    """none: a device holds all; fsdp: its part of weights, gradients, moments and average."""
    gpus: int = option(8, within=AT_LEAST_1)
    """Devices."""
    gpus_per_node: int = option(8, within=AT_LEAST_1)
    """Devices that share the fast links."""
    gpu_memory_gb: float = option(80.0, within=POSITIVE)
    """Of a device, in 10^9 bytes."""
    peak_tflops: float = option(989.0, within=POSITIVE)
    """Of a device in bfloat16, dense; an H100's."""
    utilisation: float = option(0.4, within=Range(0, 1, above=True))
    """Share of the peak that computing reaches. A guess, until a run of yours has told."""
    link_gb: float = option(450.0, within=POSITIVE)
    """Of a device to the others of its node, in 10^9 bytes a second and direction; NVLink's."""
    network_gb: float = option(50.0, within=POSITIVE)
    """Of a device to other nodes; 50 is 400 Gb/s."""

    def __post_init__(self) -> None:
        check(self)
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ConfigError(
                f"gpus={self.gpus} is not a number of whole nodes of {self.gpus_per_node}: choose "
                "another gpus or gpus_per_node.",
                "gpus",
                "gpus_per_node",
            )
