"""The network: a bidirectional transformer conditioned on time and, for a student, on step size.

Shapes: B sequences, L positions, V tokens, D hidden width, C width of the condition.

The network is in two halves. `body` turns states into final hidden rows; `head` turns any of those
rows into logits. Samplers and losses run the head only on the rows that they need.

Parameter names are those of the published checkpoints (method note, section 8).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fsdfm.model.attention import attend
from fsdfm.model.config import ModelConfig
from fsdfm.model.joint import JointHead, neighbourhood
from fsdfm.model.layers import Norm, ScalarEmbedding, fuse, fuser, modulate
from fsdfm.model.rotary import Rotary, rotate

MLP_RATIO = 4


class Block(nn.Module):
    """Attention and MLP, each behind a norm, modulated and gated by the condition (adaLN)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, cond = config.hidden_size, config.cond_size
        self.heads = config.heads
        self.norm1 = Norm(width)
        self.qw = nn.Linear(width, width, bias=False)
        self.kw = nn.Linear(width, width, bias=False)
        self.vw = nn.Linear(width, width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = Norm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, MLP_RATIO * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(MLP_RATIO * width, width),
        )
        self.condition_fuser = fuser(config)
        self.adaLN_modulation = nn.Linear(cond, 6 * width)

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, L, D), c the condition, rotary tables (L, head_dim) -> (B, L, D)."""
        modulation = self.adaLN_modulation(fuse(self.condition_fuser, c))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        attended = self._attend(modulate(self.norm1(x), shift_a, scale_a), cos, sin)
        x = torch.addcmul(x, gate_a[:, None], attended)
        y = self.mlp(modulate(self.norm2(x), shift_m, scale_m))
        return torch.addcmul(x, gate_m[:, None], y)

    def _attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.qw, self.kw, self.vw)
        )
        attended: Tensor = self.attn_out(attend(rotate(q, cos, sin), rotate(k, cos, sin), v))
        return attended


class OutputLayer(nn.Module):
    """The final norm and modulation (part of the body) and the linear head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_final = Norm(config.hidden_size)
        self.linear = nn.Linear(config.hidden_size, config.embedding_rows)
        self.condition_fuser = fuser(config)
        self.adaLN_modulation = nn.Linear(config.cond_size, 2 * config.hidden_size)

    def final(self, x: Tensor, c: Tensor) -> Tensor:
        """Last hidden rows, (B, L, D): what the head is applied to."""
        shift, scale = self.adaLN_modulation(fuse(self.condition_fuser, c)).chunk(2, dim=-1)
        return modulate(self.norm_final(x), shift, scale)


class FlowNetwork(nn.Module):
    """p(. given x_t, t, h) as `head(body(x_t, t, h))`: what all networks share.

    Args:
        config: shape and conventions.
    """

    config: ModelConfig
    vocab_embed: nn.Embedding
    time_embedding: ScalarEmbedding
    dt_embedding: ScalarEmbedding
    time_condition_fuser: nn.Linear
    rotary_emb: Rotary
    blocks: nn.ModuleList
    joint: JointHead

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vocab_embed = nn.Embedding(config.embedding_rows, config.hidden_size)
        self.time_embedding = ScalarEmbedding(config.cond_size)
        if config.step_embedding != "none":
            self.dt_embedding = ScalarEmbedding(config.cond_size)
        if config.step_embedding == "raw":
            self.time_condition_fuser = nn.Linear(2 * config.cond_size, 2 * config.cond_size)
        self.rotary_emb = config.rotary()

    def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """Final hidden rows.

        Args:
            x_t: token ids, int64, shape (B, L).
            t: time of each sequence in [0, 1], shape (B,).
            h: step size of each sequence in (0, 1], shape (B,); ignored by a DFM teacher.

        Returns:
            (B, L, D), ready for `head`.
        """
        raise NotImplementedError

    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight (V or V + 1, D) of the head and its bias, for losses that run it in chunks."""
        raise NotImplementedError

    def condition(self, t: Tensor, h: Tensor) -> Tensor:
        """What every block is conditioned on.

        none: SiLU(e(t)); raw: SiLU(W [e(t), e'(h)]); log2: SiLU(e(t) + e'(log2 h)).

        Args:
            t: time, shape (B,).
            h: step size, shape (B,), positive.

        Returns:
            (B, C), or (B, 2 C) for the raw variant.
        """
        kind = self.config.step_embedding
        e: Tensor = self.time_embedding(t)
        if kind == "raw":
            e = self.time_condition_fuser(torch.cat((e, self.dt_embedding(h)), -1))
        elif kind == "log2":
            e = e + self.dt_embedding(torch.log2(h))
        c: Tensor = F.silu(e)
        return c

    def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
        """Hidden rows that know which tokens have been drawn beside them.

        Args:
            rows: hidden rows of `at`, shape (N, D).
            at: some of the B L positions, int64, shape (N,).
            x: token ids, int64, shape (B, L).
            known: which of them have been drawn, bool, shape (B, L).

        Returns:
            (N, D), ready for `head`; the rows themselves, without a joint head.

        Always to be asked: a joint head is trained on rows that are told nothing, too.
        """
        if not self.config.neighbours:
            return rows
        tokens, there = neighbourhood(x, known, at, self.config.neighbours)
        # Without a gradient: the embedding is the body's.
        told: Tensor = self.joint(rows, self.vocab_embed(tokens).detach(), there)
        return told

    def head(self, rows: Tensor) -> Tensor:
        """Logits of hidden rows, (..., D) -> (..., V), or V + 1 columns with the mask source."""
        return F.linear(rows, *self.head_parameters())

    def forward(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """Logits at every position, (B, L, V or V + 1)."""
        return self.head(self.body(x_t, t, h))


def begin(model: FlowNetwork) -> None:
    """Normal(0.02) matrices and zero biases; fusers as PyTorch makes a linear layer.

    With matrices of 0.02 the fusers would pass so little of time and step size that a student
    could tell neither.
    """
    for name, module in model.named_modules():
        if name.endswith("condition_fuser"):
            assert isinstance(module, nn.Linear)
            module.reset_parameters()
        elif isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


def silence(model: FlowNetwork, modulations: list[nn.Linear]) -> None:
    """Zero what must start silent: modulations, a branch of log2 h, what a joint head adds."""
    silent: list[nn.Module] = list(modulations)
    if model.config.step_embedding == "log2":
        silent.append(model.dt_embedding.mlp[2])
    if model.config.neighbours:
        silent.append(model.joint.out)
        for reads in (model.joint.tokens, model.joint.row):  # what goes in has unit scale
            nn.init.normal_(reads.weight, std=reads.in_features**-0.5)
    for linear in silent:
        assert isinstance(linear, nn.Linear)
        nn.init.zeros_(linear.weight)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)


class Transformer(FlowNetwork):
    """The published network.

    Args:
        config: shape and conventions.

    Source: FS-DFM, arXiv 2509.20624; the block is that of DiT, arXiv 2212.09748.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.output_layer = OutputLayer(config)
        if config.neighbours:
            self.joint = JointHead(config)
        self._initialise()

    def _initialise(self) -> None:
        """As `begin` says; everything that must start silent starts at zero.

        The head starts as a copy of the embedding (they are not tied), at a scale that gives the
        present token a logit of ln V + 1 and so about half of the mass: near t = 1 nearly every
        token is to be copied, and a head that must first learn V such pairs wastes thousands of
        updates on it.
        """
        begin(self)
        modulations = [block.adaLN_modulation for block in self._blocks()]
        silence(self, [*modulations, self.output_layer.adaLN_modulation])
        # Normed hidden rows have length sqrt(D), embedding rows std sqrt(D): the logit is D std.
        copy_logit = math.log(self.config.embedding_rows) + 1.0
        nn.init.normal_(self.vocab_embed.weight, std=copy_logit / self.config.hidden_size)
        with torch.no_grad():
            self.output_layer.linear.weight.copy_(self.vocab_embed.weight)

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """See `FlowNetwork`."""
        cos, sin = self.rotary_emb.tables(x_t.shape[1])
        c = self.condition(t, h)
        x = self.vocab_embed(x_t)
        for block in self.blocks:
            x = block(x, c, cos, sin)
        return self.output_layer.final(x, c)

    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        """See `FlowNetwork`."""
        return self.output_layer.linear.weight, self.output_layer.linear.bias
