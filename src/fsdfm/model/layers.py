"""Parts that networks share: embeddings of time and step size, norms, modulations.

Shapes: B sequences, L positions, D hidden width, C width of the condition.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fsdfm.model.config import ModelConfig

SINUSOIDS = 256


class ScalarEmbedding(nn.Module):
    """One number per sequence -> C features: sinusoids (cos first), Linear, SiLU, Linear."""

    def __init__(self, cond_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(SINUSOIDS, cond_size), nn.SiLU(), nn.Linear(cond_size, cond_size)
        )

    def forward(self, value: Tensor) -> Tensor:
        """value (B,) -> (B, C)."""
        half = SINUSOIDS // 2
        exponents = torch.arange(half, dtype=torch.float32, device=value.device) / half
        angles = value.float()[:, None] * torch.exp(-math.log(10_000.0) * exponents)
        features: Tensor = self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1))
        return features


class Norm(nn.Module):
    """Layer norm with a weight and no bias, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x.float(), x.shape[-1:], self.weight.float())


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, with one shift and scale (B, D) for all positions of a sequence.

    What comes out goes into products: under autocast it is converted here, once for all of them.
    """
    x = torch.addcmul(shift[:, None], x, 1.0 + scale[:, None])
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def fuse(linear: nn.Linear | None, c: Tensor) -> Tensor:
    """The published student narrows its (B, 2 C) condition anew in every block; others pass it."""
    return c if linear is None else F.silu(linear(c))


def fuser(config: ModelConfig) -> nn.Linear | None:
    if config.step_embedding != "raw":
        return None
    return nn.Linear(2 * config.cond_size, config.cond_size)
