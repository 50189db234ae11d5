"""A network made ready to sample: what is the same for every row is computed once.

All sequences of a sampler's step share t and h. So the condition is one row; a norm, its weight and
the modulation after it are one norm; weights are in the format of the products
from the start; and the last block, once it has its keys and values, runs on the rows that may move
(where a sequence passes alone).

Shapes: B sequences, L positions, N rows (some of the B L positions), D hidden, H heads of width d.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fsdfm.flow.grid import SMALLEST_STEP
from fsdfm.model.attention import attend
from fsdfm.model.causal import CausalBlock, CausalNetwork
from fsdfm.model.fused import modulated_rms, turned
from fsdfm.model.int8 import int8_linear
from fsdfm.model.joint import JointHead, known_around, neighbourhood
from fsdfm.model.layers import fuse
from fsdfm.model.transformer import Block, FlowNetwork, Transformer

ROWS_AT_ONCE = 512
"""Positions that pass the blocks together on a CPU: more are no faster, and take more memory."""

NormWeights = tuple[Tensor, Tensor]
"""Weight and bias of a norm, each (D,), float32."""


class Engine:
    """p(. given x, t, h) at the rows that a sampler asks for.

    It equals `Transformer` under autocast but for rounding. The network's weights must not change
    afterwards: the engine has converted some of them.

    Args:
        model: the network, on the device to run on.
        dtype: of the matrix products; int8 (on a CPU with `has_int8`) rounds what goes into linear
            layers to 8 bits, and does the rest in bfloat16.
    """

    def __init__(self, model: FlowNetwork, dtype: torch.dtype) -> None:
        self.model = model
        self.device = model.vocab_embed.weight.device
        self.dtype = torch.bfloat16 if dtype == torch.int8 else dtype
        self.kind: _Published | _Twin
        if isinstance(model, CausalNetwork):
            self.kind = _Twin(model)
            self.layers: list[_Layer] = [_TwinLayer(block, dtype) for block in model.blocks]
        else:
            assert isinstance(model, Transformer)
            self.kind = _Published(model)
            self.layers = [_PublishedLayer(block, dtype) for block in model.blocks]
        self._head = _linear(*model.head_parameters(), dtype)
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
        return [layer.modulation(c) for layer in self.layers], self.kind.final(c)

    def _rows(
        self, tokens: Tensor, rows: Tensor, modulations: list[_Modulation], final: NormWeights
    ) -> Tensor:
        """Hidden rows of sequences that are computed together: tokens (B, L), rows (N,)."""
        tokens, rows = self.kind.shifted(tokens, rows)
        cos, sin = self.model.rotary_emb.tables(tokens.shape[1])
        x = self.model.vocab_embed(tokens).float()
        for layer, m in zip(self.layers, modulations, strict=True):
            q, k, v = layer.project(self._norm(x, m.norm1))
            k = turned(k, cos, sin)
            if layer is self.layers[-1] and len(tokens) == 1 and not self.kind.causal:
                # From here on a row matters to itself alone.
                x, q, cos, sin = x[:, rows], q[:, rows], cos[rows], sin[rows]
                rows = torch.arange(len(rows), device=rows.device)
            y = attend(turned(q, cos, sin), k, v.transpose(1, 2), causal=self.kind.causal)
            x = _added(x, layer.out(y), m.gate1)
            x = _added(x, layer.mlp(self._norm(x, m.norm2)), m.gate2)
        return self._norm(x.flatten(0, 1)[rows], final)

    def _norm(self, x: Tensor, weights: NormWeights) -> Tensor:
        """In float32, as in training; the result goes into a product."""
        return self.kind.norm(x, *weights, self.dtype)


@dataclass(frozen=True, slots=True)
class _Modulation:
    """What t and h make of a block; a gate is (D,), float32, where the network has any."""

    norm1: NormWeights
    gate1: Tensor | None
    norm2: NormWeights
    gate2: Tensor | None


def _added(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    return x + y if gate is None else torch.addcmul(x, gate, y)


class _Published:
    """What is the published network's own."""

    causal = False

    def __init__(self, model: Transformer) -> None:
        self.output = model.output_layer

    def shifted(self, tokens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What passes the blocks, and where in it the rows are."""
        return tokens, rows

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        """A layer norm, in a format."""
        return F.layer_norm(x, x.shape[-1:], weight, bias).to(dtype)

    def final(self, c: Tensor) -> NormWeights:
        """The last norm."""
        shift, scale = self.output.adaLN_modulation(fuse(self.output.condition_fuser, c))[0].chunk(
            2
        )
        return self.output.norm_final.weight * (1.0 + scale), shift


class _Twin:
    """What is the twin of a causal language model's own."""

    def __init__(self, model: CausalNetwork) -> None:
        self.model, self.output = model, model.output_layer
        self.causal = model.config.attention == "causal"

    def shifted(self, tokens: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """See `_Published`."""
        length, tokens = tokens.shape[1], self.model.shifted(tokens)
        return tokens, rows + rows // length * (tokens.shape[1] - length)

    def norm(self, x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        """A root-mean-square norm, in a format."""
        rows = x if x.ndim == 3 else x[None]
        epsilon = self.model.config.norm_epsilon
        return modulated_rms(rows, weight[None], bias[None], epsilon, dtype).view_as(x)

    def final(self, c: Tensor) -> NormWeights:
        """See `_Published`."""
        shift, scale = self.output.modulations(c)[0].chunk(2)
        return self.output.norm_final.weight * (1.0 + scale), shift


class _Layer(Protocol):
    """A block as the engine runs it."""

    def modulation(self, c: Tensor) -> _Modulation:
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


class _TwinLayer:
    """The block of a causal language model."""

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        assert isinstance(block, CausalBlock)
        self.block = block
        self._qkv = _linear(block.qkv.weight, block.qkv.bias, dtype)
        self._out = _linear(block.attn_out.weight, None, dtype)
        self._mlp_in = _linear(block.mlp_in.weight, None, dtype)
        self._mlp_out = _linear(block.mlp_out.weight, None, dtype)

    def modulation(self, c: Tensor) -> _Modulation:
        """See `_Layer`."""
        shift1, scale1, shift2, scale2 = self.block.modulations(c)[0].chunk(4)
        return _Modulation(
            (self.block.norm1.weight * (1.0 + scale1), shift1),
            None,
            (self.block.norm2.weight * (1.0 + scale2), shift2),
            None,
        )

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `_Layer`."""
        return self.block.split(self._qkv(x))

    def out(self, x: Tensor) -> Tensor:
        """See `_Layer`."""
        return self._out(x)

    def mlp(self, x: Tensor) -> Tensor:
        """See `_Layer`."""
        gate, up = self._mlp_in(x).chunk(2, -1)
        return self._mlp_out(F.silu(gate).mul_(up))


class _PublishedLayer:
    """A published block; q, k and v are one product."""

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        assert isinstance(block, Block)
        self.block, self.heads = block, block.heads
        qkv = torch.cat([linear.weight for linear in (block.qw, block.kw, block.vw)])
        up, down = block.mlp[0], block.mlp[2]
        assert isinstance(up, nn.Linear) and isinstance(down, nn.Linear)
        self.qkv = _linear(qkv, None, dtype)
        self._out = _linear(block.attn_out.weight, None, dtype)
        self.up = _gelu_linear(up.weight, up.bias, dtype)
        self.down = _linear(down.weight, down.bias, dtype)

    def modulation(self, c: Tensor) -> _Modulation:
        """See `_Layer`."""
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

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `_Layer`."""
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).unbind(2)
        return q, k, v

    def out(self, x: Tensor) -> Tensor:
        """See `_Layer`."""
        return self._out(x)

    def mlp(self, x: Tensor) -> Tensor:
        """See `_Layer`."""
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
