"""Linear layers in 8 bits: twice the rate of bfloat16 on CPUs with VNNI or AMX.

Weights are rounded once, each output's to its own scale; inputs on the way, all rows to one scale.
The products are oneDNN's, by the operators that torch.compile calls; they have no public name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LEVELS = 127
"""Largest 8-bit weight."""
STEPS = 254
"""Of the unsigned 8-bit inputs, from least to most; one is left for the zero's own rounding."""
NUMBERS_AT_ONCE = 2**18
"""Inputs that are rounded at a time: their float32 copies stay in cache."""


def has_int8() -> bool:
    """Whether this CPU multiplies 8-bit numbers fast, and this PyTorch can be asked to."""
    try:
        features = torch.cpu.get_capabilities()
        if not any(features.get(f) for f in ("avx512_vnni", "avx_vnni", "amx_int8")):
            return False
        x = torch.eye(16)
        product = int8_linear(x, torch.ones(16), torch.float32)(x)
    except (RuntimeError, AttributeError):  # another PyTorch, or no oneDNN
        return False
    return bool((product - x - 1.0).abs().max() < 0.02)


def int8_linear(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, gelu: bool = False
) -> Callable[[Tensor], Tensor]:
    """x (..., K) -> x W^T + b.

    Args:
        weight: (N, K).
        bias: (N,), or None.
        dtype: of the result.
        gelu: whether tanh-GELU follows; here it costs nothing.
    """
    multiplied = qlinear(weight, bias, dtype, gelu=gelu)
    outputs = len(weight)  # not the weight itself: a closure would hold it

    def product(x: Tensor) -> Tensor:
        return multiplied(*_round(x.flatten(0, -2))).view(*x.shape[:-1], outputs)

    return product


def qlinear(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, gelu: bool = False
) -> Callable[[Tensor, float, int], Tensor]:
    """The product alone: (x8 (rows, K) unsigned 8-bit, scale, zero) -> scale (x8 - zero) W^T + b.

    Args:
        weight, bias, dtype, gelu: see `int8_linear`.
    """
    weight, b = weight.detach().float(), None if bias is None else bias.detach().float()
    scales = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / LEVELS
    rounded = (weight / scales[:, None]).round_().to(torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(rounded, None)
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    after: tuple[str, list[float], str] = ("gelu", [], "tanh") if gelu else ("none", [], "")

    def product(x8: Tensor, scale: float, zero: int) -> Tensor:
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            x8, scale, zero, packed, scales, zeros, b, 1.0, 0, dtype, *after
        )
        return y

    return product


def _round(x: Tensor) -> tuple[Tensor, float, int]:
    """x (rows, K) as scale (x8 - zero), x8 unsigned 8-bit."""
    low, high = torch.aminmax(x)
    least, most = min(float(low), 0.0), max(float(high), 0.0)
    scale = (most - least) / STEPS
    if not 0.0 < scale < float("inf"):  # all zeros; or no numbers, of which nothing can be made
        least, scale = 0.0, 1.0
    zero = round(-least / scale)
    x8 = torch.empty(x.shape, dtype=torch.uint8)
    count = max(1, NUMBERS_AT_ONCE // x.shape[1])
    for start in range(0, len(x), count):
        # Adding a half and cutting the fraction rounds.
        some = (x[start : start + count].float() * (1.0 / scale)).add_(zero + 0.5)
        x8[start : start + count] = some
    return x8, scale, zero
