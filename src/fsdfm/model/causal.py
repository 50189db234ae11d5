"""The twin of a causal language model: its blocks, but every position sees every other.

A Llama, Mistral or Qwen block keeps its weights. What goes is the causal mask; what comes is a
modulation of the norms by time and step size, which starts silent. The shift stays: the row at
i - 1 predicts token i, so that what the model has learned still fits. The row before the first
token is that of a start token, which every sequence gets.

Shapes: B sequences, L positions, D hidden, C width of the condition, H heads, G heads of keys and
values, d width of a head, M width of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fsdfm.core.errors import ConfigError
from fsdfm.model.attention import attend
from fsdfm.model.config import Attention, ModelConfig
from fsdfm.model.fused import modulated_rms, product_dtype, swiglu, turned
from fsdfm.model.joint import JointHead
from fsdfm.model.layers import fuse, fuser
from fsdfm.model.rotary import Rotary
from fsdfm.model.transformer import FlowNetwork, begin, silence


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalConfig(ModelConfig):
    """Shape and conventions of the twin; what it has beside a published network's."""

    takes_8_bits: ClassVar[bool] = True

    kv_heads: int
    """G, heads of keys and values; heads is a multiple of it."""
    head_size: int
    """d, even."""
    mlp_size: int
    """M."""
    rotary_base: float = 10_000.0
    """Of the rotary positions."""
    norm_epsilon: float = 1e-5
    """Under the root of the norms."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases (Qwen2)."""
    qk_norm: bool = False
    """Whether queries and keys are normed, head by head (Qwen3)."""
    tied: bool = True
    """Whether the head is the embedding."""
    start_id: int | None = None
    """Token before the first, whose row predicts the first; None: no shift, row i predicts i."""
    attention: Attention = "bidirectional"
    """`causal` is the language model that it was: for comparisons."""

    def __post_init__(self) -> None:
        ModelConfig.__post_init__(self)
        for name in ("kv_heads", "head_size", "mlp_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(
                    f"Model config: {name} must be a whole number >= 1, got {value!r}."
                )
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"Model config: heads={self.heads} must be a multiple of kv_heads={self.kv_heads}."
            )
        if self.head_size % 2:
            raise ConfigError(f"Model config: head_size={self.head_size} must be even.")
        if self.attention not in ("bidirectional", "causal"):
            raise ConfigError(
                f"Model config: attention must be bidirectional or causal, got {self.attention!r}."
            )
        if self.start_id is not None and not 0 <= self.start_id < self.vocab_size:
            raise ConfigError(
                f"Model config: start_id must be a token below {self.vocab_size}, "
                f"got {self.start_id!r}."
            )

    @property
    def left_to_right(self) -> bool:
        """See `ModelConfig`."""
        return self.attention == "causal"

    def _check_heads(self) -> None:
        """Heads have a width of their own here."""

    def rotary(self) -> Rotary:
        """See `ModelConfig`."""
        return Rotary(self.head_size, self.rotary_base)


class RmsNorm(nn.Module):
    """Root-mean-square norm with a weight."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """In float32; the result is in x's format."""
        y = F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.epsilon)
        return y.to(x.dtype)

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """norm(x) (1 + scale) + shift, in the format of the products; shift, scale (B, D)."""
        weight = self.weight * (1.0 + scale.float())
        return modulated_rms(x, weight, shift.float(), self.epsilon, product_dtype(x))


class CausalBlock(nn.Module):
    """Attention and a gated MLP, each behind a norm that the condition modulates."""

    def __init__(self, config: CausalConfig) -> None:
        super().__init__()
        width, size = config.hidden_size, config.head_size
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.causal = config.left_to_right
        self.norm1 = RmsNorm(width, config.norm_epsilon)
        rows = (config.heads + 2 * config.kv_heads) * size
        self.qkv = nn.Linear(width, rows, bias=config.qkv_bias)
        if config.qk_norm:
            self.q_norm = RmsNorm(size, config.norm_epsilon)
            self.k_norm = RmsNorm(size, config.norm_epsilon)
        self.qk_norm = config.qk_norm
        self.attn_out = nn.Linear(config.heads * size, width, bias=False)
        self.norm2 = RmsNorm(width, config.norm_epsilon)
        self.mlp_in = nn.Linear(width, 2 * config.mlp_size, bias=False)
        self.mlp_out = nn.Linear(config.mlp_size, width, bias=False)
        self.condition_fuser = fuser(config)
        self.modulation = nn.Linear(config.cond_size, 4 * width)

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, L, D), c the condition, rotary tables (L, d) -> (B, L, D)."""
        shift_a, scale_a, shift_m, scale_m = self.modulations(c).chunk(4, dim=-1)
        q, k, v = self.split(self.qkv(self.norm1.modulated(x, shift_a, scale_a)))
        y = attend(turned(q, cos, sin), turned(k, cos, sin), v.transpose(1, 2), causal=self.causal)
        x = x + self.attn_out(y)
        y = swiglu(self.mlp_in(self.norm2.modulated(x, shift_m, scale_m)))
        mixed: Tensor = x + self.mlp_out(y)
        return mixed

    def modulations(self, c: Tensor) -> Tensor:
        """What the condition makes of both norms, (B, 4 D): shift and scale of each."""
        both: Tensor = self.modulation(fuse(self.condition_fuser, c))
        return both

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, L, H, d), keys and values (B, L, G, d), not yet turned."""
        heads = [self.heads, self.kv_heads, self.kv_heads]
        q, k, v = torch.split(qkv.view(*qkv.shape[:2], sum(heads), -1), heads, dim=2)
        return (self.q_norm(q), self.k_norm(k), v) if self.qk_norm else (q, k, v)


class CausalOutput(nn.Module):
    """The final norm and its modulation (part of the body), and the head where it is not tied."""

    def __init__(self, config: CausalConfig) -> None:
        super().__init__()
        self.norm_final = RmsNorm(config.hidden_size, config.norm_epsilon)
        if not config.tied:
            self.linear = nn.Linear(config.hidden_size, config.embedding_rows, bias=False)
        self.condition_fuser = fuser(config)
        self.modulation = nn.Linear(config.cond_size, 2 * config.hidden_size)

    def modulations(self, c: Tensor) -> Tensor:
        """Shift and scale of the norm, (B, 2 D)."""
        both: Tensor = self.modulation(fuse(self.condition_fuser, c))
        return both

    def final(self, x: Tensor, c: Tensor) -> Tensor:
        """Last hidden rows, (B, L, D): what the head is applied to."""
        return self.norm_final.modulated(x, *self.modulations(c).chunk(2, dim=-1))


class CausalNetwork(FlowNetwork):
    """The twin of a causal language model.

    Args:
        config: shape and conventions.

    Source: DiffuLLaMA, arXiv 2410.17891, for dropping the mask and keeping the shift.
    """

    config: CausalConfig

    def __init__(self, config: CausalConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(CausalBlock(config) for _ in range(config.blocks))
        self.output_layer = CausalOutput(config)
        if config.neighbours:
            self.joint = JointHead(config)
        self._initialise()

    def _initialise(self) -> None:
        """As `begin` says; what must start silent starts at zero."""
        begin(self)
        modulations = [b.modulation for b in self.blocks if isinstance(b, CausalBlock)]
        silence(self, [*modulations, self.output_layer.modulation])

    def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """See `FlowNetwork`."""
        x, c, cos, sin = self.entered(x_t, t, h)
        for block in self.blocks:
            x = block(x, c, cos, sin)
        return self.output_layer.final(x[:, : x_t.shape[1]], c)

    def entered(self, x_t: Tensor, t: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the blocks are given: rows of `shifted` tokens, the condition, rotary tables."""
        tokens = self.shifted(x_t)
        tables = self.rotary_emb.tables(tokens.shape[1])
        return self.vocab_embed(tokens), self.condition(t, h), *tables

    def shifted(self, x_t: Tensor) -> Tensor:
        """What passes the blocks: (B, L), or (B, L + 1) with the start token; row i predicts i."""
        start = self.config.start_id
        return x_t if start is None else F.pad(x_t, (1, 0), value=start)

    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        """See `FlowNetwork`."""
        tied = self.config.tied
        return (self.vocab_embed if tied else self.output_layer.linear).weight, None
