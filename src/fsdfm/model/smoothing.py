"""Inputs of 8-bit products made even, so that one scale serves all of a row.

A few hidden numbers of a language model are ten times as large as the others, the same ones at
every position. One scale for a row then leaves the others few levels. Here each input of the
products behind a norm is divided by a factor, and its column of the weights multiplied by it: the
product is the same, and the norm, which has a weight for each number anyway, does the dividing.

Source: SmoothQuant, arXiv 2211.10438.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fsdfm.model.causal import CausalBlock, CausalNetwork

SHARE = 0.75
"""How much of the unevenness goes from the inputs to the weights, in powers of it."""
LENGTH = 64
"""Of the text that tells which numbers are large; what it says does not matter."""
SMALLEST = 1e-5
"""A range below it is taken for this one."""
LEAST = 0.02
"""Of a factor, in those of a block's mean: what was silent here may be loud at another time."""


class Factors(NamedTuple):
    """What the inputs of a block's products are divided by, (D,) each."""

    attention: Tensor
    mlp: Tensor


@torch.no_grad()
def smoothing(model: CausalNetwork) -> list[Factors]:
    """Factors of every block, from one pass over random tokens, half of them masked, if any can be.

    Args:
        model: the network, on a CPU.
    """
    ranges: dict[nn.Module, Tensor] = {}

    def seen(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        ranges[module] = inputs[0].detach().float().abs().flatten(0, -2).amax(0)

    blocks = [block for block in model.blocks if isinstance(block, CausalBlock)]
    products = [product for block in blocks for product in (block.qkv, block.mlp_in)]
    watched = [product.register_forward_pre_hook(seen) for product in products]
    try:
        config, draw = model.config, torch.Generator().manual_seed(0)
        length = min(LENGTH, config.context_length)
        tokens = torch.randint(config.vocab_size, (1, length), generator=draw)
        if config.mask_id is not None:
            tokens[:, ::2] = config.mask_id
        model.body(tokens, torch.full((1,), 0.5), torch.full((1,), 0.125))
    finally:
        for one in watched:
            one.remove()
    each = [_factor(ranges[product], product.weight) for product in products]
    return [Factors(*pair) for pair in zip(each[::2], each[1::2], strict=True)]


def _factor(inputs: Tensor, weight: Tensor) -> Tensor:
    """From the ranges of the inputs, (K,), and of their columns of a weight, (N, K)."""
    columns = weight.float().abs().amax(0)
    factor = inputs.clamp_min(SMALLEST) ** SHARE / columns.clamp_min(SMALLEST) ** (1.0 - SHARE)
    return (factor / factor.mean()).clamp_min(LEAST)
