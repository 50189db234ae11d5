"""Matrix products whose weights are in the format of the products from the start."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fsdfm.model.int8 import beside_int8, int8_linear

USUAL_ROWS = 512
"""Rows that oneDNN lays a weight out for; others work too."""


def linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """x -> W x + b in the format of the products."""
    if dtype == torch.int8:
        return int8_linear(weight, bias, beside_int8())
    w, b = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
    return lambda x: F.linear(x, w, b)


def gelu_linear(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """x -> tanh-GELU(W x + b), in one pass where oneDNN is there: on its own it is a third of W x.

    oneDNN's fused product is what torch.compile calls, too; it has no public name.
    """
    if dtype == torch.int8:
        return int8_linear(weight, bias, beside_int8(), gelu=True)
    weight, bias = (p.detach().to(dtype) for p in (weight, bias))

    def plain(x: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")

    def fused(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "gelu", [], "tanh")
        return y

    if weight.device.type != "cpu":
        return plain
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, USUAL_ROWS)
        fused(weight.new_zeros(1, weight.shape[1]))
    except (RuntimeError, AttributeError):  # no oneDNN, or another PyTorch
        return plain
    return fused
