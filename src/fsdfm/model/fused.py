"""Pieces of a causal language model's block, each as one function with its gradient in closed form.

As plain autograd they store and re-read several float32 copies of every row. Here they work on one
sequence at a time, whose numbers stay in cache, and give rows in the format of the products.
torch.compile gets the plain expressions: it fuses them itself, and cannot trace what writes into a
part of a tensor.

Shapes: B sequences, L positions, D hidden, M width of the MLP, H heads of width d.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fsdfm.model.rotary import rotate


def product_dtype(x: Tensor) -> torch.dtype:
    """The format that autocast gives to products on x's device; x's own without autocast."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def modulated_rms(
    x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, dtype: torch.dtype
) -> Tensor:
    """x / sqrt(mean(x ** 2) + epsilon) weight + bias, computed in float32.

    Args:
        x: (B, L, D), float32.
        weight, bias: of each sequence, (B, D), float32; or one for all of them, (1, D).
        epsilon: keeps rows of zeros finite.
        dtype: of the result.

    Returns:
        (B, L, D).
    """
    if torch.compiler.is_compiling():
        normed = F.rms_norm(x, x.shape[-1:], eps=epsilon)
        return torch.addcmul(bias[:, None], normed, weight[:, None]).to(dtype)
    y: Tensor = _ModulatedRms.apply(  # type: ignore[no-untyped-call]
        x, weight.expand(len(x), -1), bias.expand(len(x), -1), epsilon, dtype
    )
    return y


class _ModulatedRms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, dtype: torch.dtype
    ) -> Tensor:
        scale = x.new_empty((*x.shape[:2], 1))
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        for each, w, b, s, out in zip(x, weight, bias, scale, y, strict=True):
            torch.linalg.vector_norm(each, dim=-1, keepdim=True, out=s)
            s.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
            out.copy_(torch.addcmul(b, each * s, w))
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        d_x, d_weight, d_bias = (torch.empty_like(each) for each in (x, weight, weight))
        for i in range(len(x)):
            normed, grad = x[i] * scale[i], grads[0][i].to(x.dtype)
            torch.sum(grad, 0, out=d_bias[i])
            part = grad * normed
            torch.sum(part, 0, out=d_weight[i])
            mean = (part @ weight[i]).div_(x.shape[-1])
            out = torch.mul(grad, weight[i], out=d_x[i])
            out.addcmul_(normed, mean[:, None], value=-1.0).mul_(scale[i])
        return d_x, d_weight, d_bias, None, None


def swiglu(x: Tensor) -> Tensor:
    """SiLU(gate) up, where x = (gate, up): (B, L, 2 M) -> (B, L, M)."""
    if torch.compiler.is_compiling():
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up
    y: Tensor = _SwiGlu.apply(x)  # type: ignore[no-untyped-call]
    return y


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        y = x.new_empty((*x.shape[:-1], x.shape[-1] // 2))
        for each, out in zip(x, y, strict=True):
            gate, up = each.chunk(2, -1)
            torch.mul(F.silu(gate), up, out=out)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        d_x = torch.empty_like(x)
        for each, grad, out in zip(x, grads[0], d_x, strict=True):
            gate, up = each.chunk(2, -1)
            d_gate, d_up = out.chunk(2, -1)
            torch.mul(F.silu(gate), grad, out=d_up)
            d_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return d_x


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, heads first.

    Args:
        x: queries or keys, (B, L, H, d).
        cos, sin: tables, (L, d), whose two halves are equal.

    Returns:
        x cos + (-x_2, x_1) sin, where x = (x_1, x_2); (B, H, L, d), contiguous.
    """
    half = x.shape[-1] // 2
    if torch.compiler.is_compiling():
        return rotate(x.transpose(1, 2), cos, sin).contiguous()
    y: Tensor = _Turned.apply(x, cos[:, :half].to(x.dtype), sin[:, :half].to(x.dtype))  # type: ignore[no-untyped-call]
    return y


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        batch, length, heads, width = x.shape
        y = x.new_empty((batch, heads, length, width))
        return _turn(x.transpose(1, 2), cos, sin, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        (grad,) = grads
        batch, heads, length, width = grad.shape
        d_x = grad.new_empty((batch, length, heads, width))
        _turn(grad, cos, -sin, d_x.transpose(1, 2))
        return d_x, None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    low, high = out.chunk(2, -1)
    torch.mul(first, cos, out=low)
    low.addcmul_(second, sin, value=-1.0)
    torch.mul(second, cos, out=high)
    high.addcmul_(first, sin)
    return out
