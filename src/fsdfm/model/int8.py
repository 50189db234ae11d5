"""Linear layers in 8 bits: twice the rate of bfloat16 on CPUs with VNNI or AMX.

Weights are rounded once, each output's to its own scale; inputs on the way, each row to its own. So
a row has the same product alone and among others, to the bit: sums of whole numbers do not round.
Where GELU is inside the product nothing can be multiplied between the two, so all rows have one
scale there. The products are oneDNN's, by the operators that torch.compile calls; they have no
public name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fsdfm.core.device import cpu_features, preferred_dtype

LEVELS = 127
"""Largest 8-bit number, of a weight and of an input from its middle."""
MIDDLE = 128
"""What stands for an input of 0 where each row has a scale: the products read unsigned inputs."""
STEPS = 254
"""From least to most where all rows have one scale; one is left for the zero's own rounding."""
SMALLEST = 1e-30
"""Scale of a row of zeros."""
NUMBERS_AT_ONCE = 2**18
"""Inputs that are rounded at a time: their float32 copies stay in cache."""


def has_int8() -> bool:
    """Whether this CPU multiplies 8-bit numbers fast, and this PyTorch can be asked to."""
    try:
        if not any(cpu_features().get(f) for f in ("avx512_vnni", "avx_vnni", "amx_int8")):
            return False
        x = torch.eye(16)
        product = int8_linear(x, torch.ones(16), torch.float32)(x)
    except (RuntimeError, AttributeError):  # another PyTorch, or no oneDNN
        return False
    return bool((product - x - 1.0).abs().max() < 0.02)


def beside_int8() -> torch.dtype:
    """Format of what is not in 8 bits, on this CPU."""
    return preferred_dtype(torch.device("cpu"))


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
    outputs = len(weight)  # not the weight itself: a closure would hold it
    multiplied = qlinear(weight, bias if gelu else None, dtype, gelu=gelu)
    after = None if gelu or bias is None else bias.detach().to(dtype)

    def product(x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if gelu:
            y = multiplied(*_rounded_together(rows))
        else:
            x8, scales = _rounded_each(rows, dtype)
            y = multiplied(x8, 1.0, MIDDLE).mul_(scales)
        return (y if after is None else y.add_(after)).view(*x.shape[:-1], outputs)

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


def _rounded_each(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (rows, K) as scales (x8 - MIDDLE), x8 unsigned 8-bit, scales (rows, 1) in a format."""
    largest = x.abs().amax(1, keepdim=True).float()
    # A little more than it has to be, so that rounded to the format it is no less.
    scales = (largest * ((1.0 + 2.0**-8) / LEVELS)).clamp_min_(SMALLEST).to(dtype)
    return _in_parts(x, 1.0 / scales.float(), MIDDLE), scales


def _rounded_together(x: Tensor) -> tuple[Tensor, float, int]:
    """x (rows, K) as scale (x8 - zero), x8 unsigned 8-bit."""
    low, high = torch.aminmax(x)
    least, most = min(float(low), 0.0), max(float(high), 0.0)
    scale = (most - least) / STEPS
    if not 0.0 < scale < float("inf"):  # all zeros; or no numbers, of which nothing can be made
        least, scale = 0.0, 1.0
    zero = round(-least / scale)
    return _in_parts(x, torch.tensor(1.0 / scale).expand(len(x), 1), zero), scale, zero


def _in_parts(x: Tensor, factors: Tensor, zero: int) -> Tensor:
    """x (rows, K) times factors (rows, 1), plus zero, to the nearest unsigned 8-bit numbers."""
    x8 = torch.empty(x.shape, dtype=torch.uint8)
    count = max(1, NUMBERS_AT_ONCE // x.shape[1])
    for start in range(0, len(x), count):
        some = slice(start, start + count)
        # Adding a half and cutting the fraction rounds.
        x8[some] = (x[some].float() * factors[some]).add_(zero + 0.5)
    return x8
