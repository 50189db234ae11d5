"""Blocks and the joint head as the engine runs them: products alone, in the format they run in.

What a block makes of its condition is computed once a step. Matrices are held by their products
alone.

Shapes: B sequences, L positions, D hidden, C width of the condition, H heads and G heads of keys
and values of width d, R neighbours, N rows.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fsdfm.model.causal import CausalBlock, CausalNetwork
from fsdfm.model.int8 import beside_int8
from fsdfm.model.joint import JointHead
from fsdfm.model.layers import fuse
from fsdfm.model.products import gelu_linear, linear
from fsdfm.model.smoothing import Factors, smoothing
from fsdfm.model.together import Modulation
from fsdfm.model.transformer import Block


class Layer(Protocol):
    """A block as the engine runs it."""

    def modulation(self, c: Tensor) -> Modulation:
        """The block's share of a condition, (1, C)."""
        ...

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, L, H, d), keys and values (B, L, G, d), not yet turned."""
        ...

    def out(self, x: Tensor) -> Tensor:
        """What attention adds, (B, L, D)."""
        ...

    def mlp(self, x: Tensor) -> Tensor:
        """What the MLP adds, (B, L, D)."""
        ...


class TwinLayer:
    """The block of a causal language model."""

    def __init__(self, block: nn.Module, dtype: torch.dtype, even: Factors | None) -> None:
        assert isinstance(block, CausalBlock)
        self.block, self.even = block, even
        qkv, mlp_in = block.qkv.weight, block.mlp_in.weight
        if even is not None:
            qkv, mlp_in = qkv * even.attention, mlp_in * even.mlp
        self._qkv = linear(qkv, block.qkv.bias, dtype)
        self._out = linear(block.attn_out.weight, None, dtype)
        self._mlp_in = linear(mlp_in, None, dtype)
        # A product of two numbers has outliers, which would leave 8 bits nothing for the rest.
        gated = beside_int8() if dtype == torch.int8 else dtype
        self._mlp_out = linear(block.mlp_out.weight, None, gated)
        leave_out(block, "qkv", "attn_out", "mlp_in", "mlp_out")

    def modulation(self, c: Tensor) -> Modulation:
        """See `Layer`."""
        shift1, scale1, shift2, scale2 = self.block.modulations(c)[0].chunk(4)
        norm1 = self.block.norm1.weight * (1.0 + scale1), shift1
        norm2 = self.block.norm2.weight * (1.0 + scale2), shift2
        if self.even is not None:
            norm1 = norm1[0] / self.even.attention, norm1[1] / self.even.attention
            norm2 = norm2[0] / self.even.mlp, norm2[1] / self.even.mlp
        return Modulation(norm1, None, norm2, None)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Layer`."""
        return self.block.split(self._qkv(x))

    def out(self, x: Tensor) -> Tensor:
        """See `Layer`."""
        return self._out(x)

    def mlp(self, x: Tensor) -> Tensor:
        """See `Layer`."""
        gate, up = self._mlp_in(x).chunk(2, -1)
        return self._mlp_out(F.silu(gate).mul_(up))


def twin_layers(model: CausalNetwork, dtype: torch.dtype) -> list[Layer]:
    """The blocks of a causal language model's twin."""
    factors = smoothing(model) if dtype == torch.int8 else [None] * len(model.blocks)
    return [TwinLayer(b, dtype, even) for b, even in zip(model.blocks, factors, strict=True)]


class PublishedLayer:
    """A published block; q, k and v are one product."""

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        assert isinstance(block, Block)
        self.block, self.heads = block, block.heads
        qkv = torch.cat([linear.weight for linear in (block.qw, block.kw, block.vw)])
        up, down = block.mlp[0], block.mlp[2]
        assert isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
        self.qkv = linear(qkv, None, dtype)
        self._out = linear(block.attn_out.weight, None, dtype)
        self.up = gelu_linear(up.weight, up.bias, dtype)
        self.down = linear(down.weight, down.bias, dtype)
        leave_out(block, "qw", "kw", "vw", "attn_out", "mlp")

    def modulation(self, c: Tensor) -> Modulation:
        """See `Layer`."""
        block = self.block
        shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(
            fuse(block.condition_fuser, c)
        )[0].chunk(6)
        return Modulation(
            (block.norm1.weight * (1.0 + scale1), shift1),
            gate1,
            (block.norm2.weight * (1.0 + scale2), shift2),
            gate2,
        )

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Layer`."""
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).unbind(2)
        return q, k, v

    def out(self, x: Tensor) -> Tensor:
        """See `Layer`."""
        return self._out(x)

    def mlp(self, x: Tensor) -> Tensor:
        """See `Layer`."""
        return self.down(self.up(x))


class Joint:
    """The joint head; what reads the neighbours and what reads the row are one product."""

    def __init__(self, joint: JointHead, dtype: torch.dtype) -> None:
        both = torch.cat((joint.tokens.weight, joint.row.weight), 1)
        self.inner = gelu_linear(both, joint.tokens.bias, dtype)
        self.out = linear(joint.out.weight, joint.out.bias, dtype)

    def told(self, rows: Tensor, around: Tensor) -> Tensor:
        """Rows (N, D), their neighbours (N, 2 R D) -> (N, D)."""
        return rows + self.out(self.inner(torch.cat((around.to(rows.dtype), rows), 1)))


def leave_out(module: nn.Module, *names: str) -> None:
    """Let go of parts, where the module has them."""
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
