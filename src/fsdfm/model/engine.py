"""A network made ready to sample: what is the same for every row is computed once.

All sequences of a sampler's step share t and h. So the condition is one row; a layer norm, its
weight and the modulation after it are one layer norm; weights are in the format of the products
from the start; and the last block, once it has its keys and values, runs on the rows that may move
(where a sequence passes alone).

Shapes: B sequences, L positions, N rows (some of the B L positions), D hidden, H heads of width d.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fsdfm.model.attention import attend
from fsdfm.model.int8 import int8_linear
from fsdfm.model.transformer import Block, JointHead, Transformer, fuse, known_around, neighbourhood

SMALLEST_STEP = 2.0**-10
"""Training shows no smaller step; a grid may have some, and the network is told this one."""
ROWS_AT_ONCE = 512
"""Positions that pass the blocks together on a CPU: more are no faster, and take more memory."""

NormWeights = tuple[Tensor, Tensor]
"""Weight and bias of a layer norm, each (D,), float32."""


class Engine:
    """p(. given x, t, h) at the rows that a sampler asks for.

    It equals `Transformer` under autocast but for rounding. The network's weights must not change
    afterwards: the engine has converted some of them.

    Args:
        model: the network, on the device to run on.
        dtype: of the matrix products; int8 (on a CPU with `has_int8`) rounds what goes into linear
            layers to 8 bits, and does the rest in bfloat16.
    """

    def __init__(self, model: Transformer, dtype: torch.dtype) -> None:
        self.model = model
        self.device = model.vocab_embed.weight.device
        self.dtype = torch.bfloat16 if dtype == torch.int8 else dtype
        self.layers = [_Layer(block, dtype) for block in model.blocks]
        head = model.output_layer.linear
        self._head = _linear(head.weight, head.bias, dtype)
        self._joint = _Joint(model.joint, dtype) if model.config.neighbours else None
        # A CPU takes as many sequences at a time as pay; any other device all of them.
        self.rows_at_once = ROWS_AT_ONCE if self.device.type == "cpu" else None

    @torch.no_grad()
    def hidden(self, x: Tensor, t: float, h: float, rows: Tensor) -> Tensor:
        """Final hidden rows.

        Args:
            x: token ids, int64, shape (B, L).
            t: time of all sequences, in [0, 1].
            h: step size of all sequences, in (0, 1]; less than SMALLEST_STEP is told as that.
            rows: which of the B L positions, ascending, int64, shape (N,).

        Returns:
            (N, D), for `head`.
        """
        x, rows = x.to(self.device), rows.to(self.device)
        modulations, final = self._modulations(t, h)
        length = x.shape[1]
        group = max(1, (self.rows_at_once or x.numel()) // length)
        if group >= len(x):
            return self._rows(x, rows, modulations, final)
        starts = range(0, x.numel(), group * length)
        edges = torch.searchsorted(rows, torch.tensor([*starts, x.numel()])).tolist()
        parts = []
        for i, start in enumerate(starts):
            wanted = rows[edges[i] : edges[i + 1]] - start
            if len(wanted):
                few = x[i * group : (i + 1) * group]
                parts.append(self._rows(few, wanted, modulations, final))
        return torch.cat(parts)

    @torch.no_grad()
    def head(self, rows: Tensor) -> Tensor:
        """Logits of hidden rows, (N, D) -> (N, V), or V + 1 columns with the mask source."""
        return self._head(rows)

    @torch.no_grad()
    def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
        """See `Transformer.told`."""
        if self._joint is None:
            return rows
        at, x, known = at.to(self.device), x.to(self.device), known.to(self.device)
        tokens, there = neighbourhood(x, known, at, self.model.config.neighbours)
        return self._joint.told(rows, known_around(self.model.vocab_embed(tokens), there))

    def _modulations(self, t: float, h: float) -> tuple[list[_Modulation], NormWeights]:
        """What (t, h) makes of every block, and of the final norm."""
        # Filled in place: copies from the host would be waited for.
        times = (
            torch.full((1,), value, dtype=torch.float32, device=self.device)
            for value in (t, max(h, SMALLEST_STEP))
        )
        c = self.model.condition(*times)
        output = self.model.output_layer
        shift, scale = output.adaLN_modulation(fuse(output.condition_fuser, c))[0].chunk(2)
        final = (output.norm_final.weight * (1.0 + scale), shift)
        return [layer.modulation(c) for layer in self.layers], final

    def _rows(
        self, tokens: Tensor, rows: Tensor, modulations: list[_Modulation], final: NormWeights
    ) -> Tensor:
        """Hidden rows of sequences that are computed together: tokens (B, L), rows (N,)."""
        cos, sin = (
            table[:, None].to(self.dtype) for table in self.model.rotary_emb.tables(tokens.shape[1])
        )
        x = self.model.vocab_embed(tokens).float()
        for layer, m in zip(self.layers, modulations, strict=True):
            q, k, v = layer.project(self._norm(x, m.norm1))
            k = _rotate(k, cos, sin)
            if layer is self.layers[-1] and len(tokens) == 1:
                # From here on a row matters to itself alone.
                x, q, cos, sin = x[:, rows], q[:, rows], cos[rows], sin[rows]
                rows = torch.arange(len(rows), device=rows.device)
            x = torch.addcmul(
                x, m.gate1, layer.out(attend(_rotate(q, cos, sin), k, v.transpose(1, 2)))
            )
            x = torch.addcmul(x, m.gate2, layer.mlp(self._norm(x, m.norm2)))
        return self._norm(x.flatten(0, 1)[rows], final)

    def _norm(self, x: Tensor, weights: NormWeights) -> Tensor:
        """In float32, as in training; the result goes into a product."""
        return F.layer_norm(x, x.shape[-1:], *weights).to(self.dtype)


@dataclass(frozen=True, slots=True)
class _Modulation:
    """What t and h make of a block; a gate is (D,), float32."""

    norm1: NormWeights
    gate1: Tensor
    norm2: NormWeights
    gate2: Tensor


class _Layer:
    """A block's linear layers as the engine runs them; q, k and v are one."""

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        assert isinstance(block, Block)
        self.block, self.heads = block, block.heads
        qkv = torch.cat([linear.weight for linear in (block.qw, block.kw, block.vw)])
        up, down = block.mlp[0], block.mlp[2]
        assert isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
        self.qkv = _linear(qkv, None, dtype)
        self.out = _linear(block.attn_out.weight, None, dtype)
        self.up = _gelu_linear(up.weight, up.bias, dtype)
        self.down = _linear(down.weight, down.bias, dtype)

    def modulation(self, c: Tensor) -> _Modulation:
        """The block's share of a condition, (1, C)."""
        block = self.block
        shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(
            fuse(block.condition_fuser, c)
        )[0].chunk(6)
        return _Modulation(
            (block.norm1.weight * (1.0 + scale1), shift1),
            gate1,
            (block.norm2.weight * (1.0 + scale2), shift2),
            gate2,
        )

    def project(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values, each (B, L, H, d)."""
        batch, length, _ = x.shape
        return list(self.qkv(x).view(batch, length, 3, self.heads, -1).unbind(2))

    def mlp(self, x: Tensor) -> Tensor:
        """What the MLP adds, (B, L, D)."""
        return self.down(self.up(x))


class _Joint:
    """The joint head; what reads the neighbours and what reads the row are one product."""

    def __init__(self, joint: JointHead, dtype: torch.dtype) -> None:
        both = torch.cat((joint.tokens.weight, joint.row.weight), 1)
        self.inner = _gelu_linear(both, joint.tokens.bias, dtype)
        self.out = _linear(joint.out.weight, joint.out.bias, dtype)

    def told(self, rows: Tensor, around: Tensor) -> Tensor:
        """Rows (N, D), their neighbours (N, 2 R D) -> (N, D)."""
        return rows + self.out(self.inner(torch.cat((around.to(rows.dtype), rows), 1)))


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """x -> W x + b in the format of the products."""
    if dtype == torch.int8:
        return int8_linear(weight, bias, torch.bfloat16)
    w, b = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
    return lambda x: F.linear(x, w, b)


def _gelu_linear(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """x -> tanh-GELU(W x + b), in one pass where oneDNN is there: on its own it is a third of W x.

    oneDNN's fused product is what torch.compile calls, too; it has no public name.
    """
    if dtype == torch.int8:
        return int8_linear(weight, bias, torch.bfloat16, gelu=True)
    weight, bias = (p.detach().to(dtype) for p in (weight, bias))

    def plain(x: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")

    def fused(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "gelu", [], "tanh")
        return y

    if weight.device.type != "cpu":
        return plain
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_AT_ONCE)
        fused(weight.new_zeros(1, weight.shape[1]))
    except (RuntimeError, AttributeError):  # no oneDNN, or another PyTorch
        return plain
    return fused


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x (B, L, H, d), tables (L, 1, d) -> (B, H, L, d), contiguous."""
    first, second = x.transpose(1, 2).chunk(2, dim=-1)
    half = first.shape[-1]
    cos, sin = cos[None, :, 0, :half], sin[None, :, 0, :half]
    rotated = torch.empty((*first.shape[:-1], 2 * half), dtype=x.dtype, device=x.device)
    low, high = rotated.chunk(2, dim=-1)
    torch.mul(first, cos, out=low).addcmul_(second, sin, value=-1.0)
    torch.mul(second, cos, out=high).addcmul_(first, sin)
    return rotated
