"""Weights at rest in few bits: codes in groups, each group with its own scale.

A weight of 3 to 8 bits is scale times a whole number, from -(2 ** (bits - 1)) + 1 up; the scale of
each GROUP numbers is the one of a few that loses least. Eight codes fill `bits` bytes. Loading
makes float32 of them: this is for files, not for products.
"""

from __future__ import annotations

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
SHRINKINGS = tuple(1.0 - 0.04 * k for k in range(9))
"""Scales to try, as parts of the one that reaches a group's largest number."""
GROUPS_AT_ONCE = 1 << 12
"""Small enough for a CPU's cache."""
SMALLEST_SCALE = 2.0**-17
"""A smaller float16 has too few digits for a largest code of 127 to come back."""


@dataclass(frozen=True, slots=True)
class Packed:
    """One tensor in few bits."""

    codes: Tensor
    """uint8, shape (numbers / 8 * bits,)."""
    scales: Tensor
    """float16, shape (numbers / GROUP,)."""


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
    top = 2 ** (bits - 1) - 1
    groups = tensor.detach().float().reshape(-1, GROUP)
    codes, scales = [], []
    for some in groups.split(GROUPS_AT_ONCE):  # type: ignore[no-untyped-call]
        scale = best_scales(some, top)
        scales.append(scale)
        codes.append(rounded(some, scale.float(), top))
    return join(torch.cat(codes), torch.cat(scales), bits)


def join(codes: Tensor, scales: Tensor, bits: int) -> Packed:
    """Whole numbers from -(2 ** (bits - 1)) + 1 up, and the float16 scales of their groups."""
    codes = codes.flatten().add(2 ** (bits - 1) - 1).to(torch.uint8)
    return Packed(_squeeze(codes, bits), scales.flatten())


def unpack(packed: Packed, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The tensor again, float32, to rounding.

    Raises:
        ValueError: codes or scales that do not fill the shape.
    """
    numbers = prod(shape)
    if (
        numbers % GROUP
        or packed.codes.shape != (numbers // TOGETHER * bits,)
        or packed.scales.shape != (numbers // GROUP,)
    ):
        raise ValueError(f"{len(packed.codes)} bytes do not fill {list(shape)} at {bits} bits")
    top = 2 ** (bits - 1) - 1
    codes = _spread(packed.codes, bits).view(-1, GROUP).to(torch.float32).sub_(top)
    return codes.mul_(packed.scales.float()[:, None]).view(shape)


def best_scales(groups: Tensor, top: int, cost: Tensor | None = None) -> Tensor:
    """The scale of each group that loses least, float16, (groups, 1).

    Args:
        groups: numbers, (groups, GROUP).
        top: largest code.
        cost: of a squared error, by place in the group, (GROUP,); None: the same everywhere.
    """
    largest = groups.abs().amax(1, keepdim=True) / top
    best = torch.full_like(largest, torch.inf)
    scales = torch.zeros_like(largest, dtype=torch.float16)
    for part in SHRINKINGS:
        scale = (largest * part).to(torch.float16).clamp_min(SMALLEST_SCALE)
        kept = rounded(groups, scale.float(), top).mul_(scale.float())
        errors = kept.sub_(groups).square_()
        lost = errors.sum(1, keepdim=True) if cost is None else errors @ cost[:, None]
        better = lost < best
        best, scales = torch.where(better, lost, best), torch.where(better, scale, scales)
    return scales


def rounded(groups: Tensor, scale: Tensor, top: int) -> Tensor:
    """Codes of numbers under their scales, as float32."""
    return (groups / scale).round_().clamp_(-top, top)


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
