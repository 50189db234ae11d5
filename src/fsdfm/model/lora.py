"""LoRA: a matrix of the blocks is its own weight, which stays, plus a product of two thin ones.

    W' = W + B A

A starts random and B at zero, so that the network starts as it was. Every linear layer of the
blocks has a pair; embedding, head and norms stay.

Shapes: R rank, I columns and O rows of a matrix.

Source: LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fsdfm.core.errors import CheckpointError, ConfigError
from fsdfm.model.transformer import FlowNetwork


class LowLinear(nn.Linear):
    """A linear layer whose weight stays, beside a pair that is trained.

        x W'^T = x W^T + (x A^T) B^T

    So no gradient of a whole matrix is ever made.

    Args:
        linear: whose weight and bias these are.
        rank: R.
        noise: that A is drawn from.
    """

    def __init__(self, linear: nn.Linear, rank: int, noise: torch.Generator) -> None:
        nn.Module.__init__(self)  # makes no weight: there is one
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        a = torch.randn((rank, self.in_features), generator=noise) * self.in_features**-0.5
        self.a = nn.Parameter(a.to(self.weight.device))
        self.b = nn.Parameter(self.weight.new_zeros((self.out_features, rank)))

    def forward(self, x: Tensor) -> Tensor:
        """In the format of the products, as the layer alone."""
        return super().forward(x) + F.linear(F.linear(x, self.a), self.b)


def add_lora(model: FlowNetwork, rank: int, seed: int = 0) -> None:
    """Freeze a network, and give every linear layer of its blocks a pair that can be trained.

    Args:
        model: changed in place.
        rank: R. A matrix whose smaller side is less has a pair of that rank.
        seed: of the pairs.

    Raises:
        ConfigError: a rank with which every matrix would be such a one.
    """
    noise = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    linears = list(_linears(model))
    if rank >= (most := max(min(linear.weight.shape) for _, linear in linears)):
        raise ConfigError(
            f"lora saves nothing from a rank of {most} on, the smaller side of the largest "
            f"matrices: give a smaller one, got {rank}.",
            "lora",
        )
    for name, linear in linears:
        parent, _, child = name.rpartition(".")
        low = LowLinear(linear, min(rank, *linear.weight.shape), noise)
        setattr(model.get_submodule(parent), child, low)


def pairs(model: FlowNetwork) -> dict[str, Tensor]:
    """A (R, I) and B (O, R) of every layer that has them, by its name with .a and .b."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LowLinear):
            found |= {f"{name}.a": module.a.detach(), f"{name}.b": module.b.detach()}
    return found


@torch.no_grad()
def merge(model: FlowNetwork, tensors: Mapping[str, Tensor], where: str) -> None:
    """Add pairs to the weights of a network.

    Args:
        model: changed in place.
        tensors: as `pairs` gives them.
        where: what to call their origin in an error.

    Raises:
        CheckpointError: pairs that do not fit the network, are missing, or are not finite.
    """
    linears = dict(_linears(model))
    wanted = {f"{name}.{part}" for name in linears for part in "ab"}
    fits = wanted == tensors.keys()
    for name, linear in linears.items() if fits else ():
        a, b = tensors[f"{name}.a"], tensors[f"{name}.b"]
        shape = (b.shape[:1] + a.shape[1:], b.shape[1:])
        fits = fits and shape == (linear.weight.shape, a.shape[:1])
    if not fits or not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise CheckpointError(f"{where} is damaged: its pairs do not fit the network.")
    for name, linear in linears.items():
        a, b = (tensors[f"{name}.{part}"].to(linear.weight) for part in "ab")
        linear.weight += b @ a


def _linears(model: FlowNetwork) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("blocks."):
            yield name, module
