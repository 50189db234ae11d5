"""Rotary position embedding, half-split rotation."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Cosines and sines of position times frequency, kept for the longest length seen.

    Args:
        head_dim: width of one attention head, even.
        base: the slowest frequency is about 1 / base.
    """

    inv_freq: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, base: float = 10_000.0) -> None:
        super().__init__()
        inv_freq = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("cos", torch.empty(0, head_dim), persistent=False)
        self.register_buffer("sin", torch.empty(0, head_dim), persistent=False)

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin for positions 0 .. length - 1, each (length, head_dim), float32."""
        if self.cos.shape[0] < length:
            positions = torch.arange(length, dtype=torch.float32, device=self.inv_freq.device)
            angles = torch.outer(positions, self.inv_freq).repeat(1, 2)
            self.cos, self.sin = angles.cos(), angles.sin()
        return self.cos[:length], self.sin[:length]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head: x cos + (-x_2, x_1) sin, where x = (x_1, x_2) are its two halves.

    Args:
        x: queries or keys, shape (B, heads, L, head_dim).
        cos, sin: tables of shape (L, head_dim).

    Returns:
        Same shape and dtype as x.
    """
    half = x.shape[-1] // 2
    # Rolled by half a head is (x_2, x_1); unlike slices, its gradient needs no zeros to add to.
    signed = torch.cat((-sin[:, :half], sin[:, half:]), dim=-1)
    return x * cos.to(x.dtype) + x.roll(half, dims=-1) * signed.to(x.dtype)
