"""Weights at rest in few bits: codes in groups, each group with its own scale.

A weight of 3 to 8 bits is a scale times the level that its code stands for. Levels lie between -1
and 1, denser near 0, where weights are; the scale of each GROUP numbers, of either sign, is the one
of a few that loses least. Eight codes fill `bits` bytes. Loading makes float32 of them: this is for
files, not for products.

Source: arXiv 2305.14314 (NF4) for levels by the law of the weights; Lloyd, 1982, for placing them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

GROUP = 64
"""Weights that share a scale; float16, so a quarter of a bit a weight."""
TOGETHER = 8
"""Codes that are packed together."""
SMALLEST = 4096
"""Tensors with fewer numbers stay in float16."""
SHRINKINGS = tuple(sign * (1.0 - 0.04 * k) for k in range(9) for sign in (1.0, -1.0))
"""Scales to try, as parts of a group's largest number."""
GROUPS_AT_ONCE = 1 << 12
"""Small enough for a CPU's cache."""
SMALLEST_SCALE = 2.0**-17
"""A smaller float16 has too few digits to come back."""
PLACING = 1000
"""Times that levels are moved to the means of what is nearest to them."""


@dataclass(frozen=True, slots=True)
class Packed:
    """One tensor in few bits."""

    codes: Tensor
    """uint8, shape (numbers / 8 * bits,)."""
    scales: Tensor
    """float16, shape (numbers / GROUP,)."""
    levels: Tensor
    """What a code stands for, in scales: float32, shape (2 ** bits,)."""


def packable(tensor: Tensor) -> bool:
    """Whether a tensor is large enough to pay, and fills its groups."""
    return tensor.ndim == 2 and tensor.numel() >= SMALLEST and tensor.numel() % GROUP == 0


def bits_of(name: str, tensor: Tensor, bits: Mapping[str, int]) -> int | None:
    """Bits of a weight, by the first prefix that its name begins with; None: it is not packed."""
    if not packable(tensor):
        return None
    return next((count for prefix, count in bits.items() if name.startswith(prefix)), None)


def pack(tensor: Tensor, bits: int) -> Packed:
    """Round a tensor to codes.

    Args:
        tensor: `packable`.
        bits: of a code, from 3 to 8.
    """
    groups, levels = tensor.detach().float().reshape(-1, GROUP), best_levels(bits)
    codes, scales = [], []
    for some in groups.split(GROUPS_AT_ONCE):  # type: ignore[no-untyped-call]
        scale = best_scales(some, levels)
        scales.append(scale)
        codes.append(coded(some, scale.float(), levels))
    return join(torch.cat(codes), torch.cat(scales), levels)


def join(codes: Tensor, scales: Tensor, levels: Tensor) -> Packed:
    """Numbers of levels, the float16 scales of their groups, and the levels."""
    bits = (len(levels) - 1).bit_length()
    return Packed(_squeeze(codes.flatten(), bits), scales.flatten(), levels)


def unpack(packed: Packed, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The tensor again, float32, to rounding.

    Raises:
        ValueError: codes, scales or levels that do not fill the shape.
    """
    numbers = prod(shape)
    if (
        numbers % GROUP
        or packed.codes.shape != (numbers // TOGETHER * bits,)
        or packed.scales.shape != (numbers // GROUP,)
        or packed.levels.shape != (2**bits,)
    ):
        raise ValueError(f"{len(packed.codes)} bytes do not fill {list(shape)} at {bits} bits")
    weights = packed.levels[_spread(packed.codes, bits).to(torch.int32)].view(-1, GROUP)
    return weights.mul_(packed.scales.float()[:, None]).view(shape)


@functools.cache
def best_levels(bits: int) -> Tensor:
    """Where rounding loses least of normal numbers over the largest of their group: (2 ** bits,).

    Ascending from -1 to 1; one of them is 0, so that zeros stay.
    """
    groups = torch.randn(1 << 13, GROUP, generator=torch.Generator().manual_seed(0)).double()
    x = (groups / groups.abs().amax(1, keepdim=True)).flatten().sort().values
    sums = torch.cat((x.new_zeros(1), x.cumsum(0)))
    levels = torch.linspace(-1.0, 1.0, 2**bits, dtype=torch.float64)
    zero = (len(levels) - 1) // 2
    levels[1:-1] -= levels[zero].clone()
    for _ in range(PLACING):
        ends = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        ends = torch.cat((ends.new_zeros(1), ends, ends.new_full((1,), len(x))))
        counts = ends.diff()
        means = torch.where(counts > 0, sums[ends].diff() / counts.clamp_min(1), levels)
        levels[1:-1] = means[1:-1]
        levels[zero] = 0.0
    return levels.float()


def even_levels(bits: int) -> Tensor:
    """Those of files of format version 2: whole numbers, (2 ** bits,)."""
    top = 2 ** (bits - 1) - 1
    return torch.arange(-top, top + 2, dtype=torch.float32)


def best_scales(groups: Tensor, levels: Tensor, cost: Tensor | None = None) -> Tensor:
    """The scale of each group that loses least, float16, (groups, 1).

    Args:
        groups: numbers, (groups, GROUP).
        levels: what codes stand for, from -1 to 1.
        cost: of a squared error, by place in the group, (GROUP,); None: the same everywhere.
    """
    largest = groups.abs().amax(1, keepdim=True)
    best = torch.full_like(largest, torch.inf)
    scales = torch.zeros_like(largest, dtype=torch.float16)
    for part in SHRINKINGS:
        scale = (largest * part).to(torch.float16)
        scale = torch.where(scale.abs() < SMALLEST_SCALE, SMALLEST_SCALE, scale).to(torch.float16)
        kept = levels[coded(groups, scale.float(), levels)].mul_(scale.float())
        errors = kept.sub_(groups).square_()
        lost = errors.sum(1, keepdim=True) if cost is None else errors @ cost[:, None]
        better = lost < best
        best, scales = torch.where(better, lost, best), torch.where(better, scale, scales)
    return scales


def coded(groups: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """The numbers of the levels that are nearest to some numbers, int32."""
    between = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(groups / scale, between, out_int32=True)


def _squeeze(codes: Tensor, bits: int) -> Tensor:
    """Codes (n,) -> bytes: eight codes are one whole number of 8 bits numbers, lowest first."""
    number = torch.zeros(len(codes) // TOGETHER, dtype=torch.int64)
    for i, code in enumerate(codes.view(-1, TOGETHER).unbind(1)):
        number |= code.to(torch.int64) << (bits * i)
    return (
        torch.stack([(number >> (8 * i)) & 255 for i in range(bits)], 1).to(torch.uint8).flatten()
    )


def _spread(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `_squeeze`, uint8."""
    number = torch.zeros(len(packed) // bits, dtype=torch.int64)
    for i, byte in enumerate(packed.view(-1, bits).unbind(1)):
        number |= byte.to(torch.int64) << (8 * i)
    codes = torch.empty(len(number), TOGETHER, dtype=torch.uint8)
    for i in range(TOGETHER):
        codes[:, i] = (number >> (bits * i)) & (2**bits - 1)
    return codes.flatten()
