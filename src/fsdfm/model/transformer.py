"""The network: a bidirectional transformer conditioned on time and, for a student, on step size.

Shapes: B sequences, L positions, V tokens, D hidden width, C width of the condition.

The network is in two halves. `body` turns states into final hidden rows; `head` turns any of those
rows into logits. Samplers and losses run the head only on the rows that they need.

Parameter names are those of the published checkpoints (method note, section 8).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fsdfm.core.errors import ConfigError
from fsdfm.model.attention import attend
from fsdfm.model.rotary import Rotary, rotate

Source = Literal["uniform", "mask"]
StepEmbedding = Literal["none", "raw", "log2"]

SINUSOIDS = 256
MLP_RATIO = 4


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and conventions of one network; config.json holds exactly these fields."""

    vocab_size: int
    """V, the number of data tokens (the mask id is not counted)."""
    hidden_size: int
    """D, divisible by heads; D / heads even."""
    blocks: int
    heads: int
    cond_size: int
    """C, width of the embedded time and step size."""
    context_length: int = 1024
    """Longest sequence that training showed the network, in tokens."""
    source: Source = "uniform"
    """Where x_0 comes from; `mask` adds one id, V, to the embedding and the head."""
    step_embedding: StepEmbedding = "none"
    """`none`: a DFM teacher; `raw`: the published student; `log2`: ours, zero at the start."""
    schedule_power: float = 1.0
    """n in kappa_t = t ** n, the path the network was trained on."""
    neighbours: int = 0
    """R, the tokens on each side that the joint head sees; 0: there is no joint head."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "blocks", "heads", "cond_size", "context_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(
                    f"Model config: {name} must be a whole number >= 1, got {value!r}."
                )
        if not isinstance(self.neighbours, int) or not 0 <= self.neighbours < self.context_length:
            raise ConfigError(
                f"Model config: neighbours must be a whole number from 0 to the context, "
                f"got {self.neighbours!r}."
            )
        self._check_heads()
        if self.source not in ("uniform", "mask"):
            raise ConfigError(f"Model config: source must be uniform or mask, got {self.source!r}.")
        if self.step_embedding not in ("none", "raw", "log2"):
            raise ConfigError(
                f"Model config: step_embedding must be none, raw or log2, "
                f"got {self.step_embedding!r}."
            )
        if not isinstance(self.schedule_power, int | float) or not self.schedule_power >= 1.0:
            raise ConfigError(
                f"Model config: schedule_power must be >= 1, got {self.schedule_power!r}."
            )

    def _check_heads(self) -> None:
        if self.hidden_size % (2 * self.heads):
            raise ConfigError(
                f"Model config: hidden_size={self.hidden_size} must be a multiple of twice "
                f"heads={self.heads} (rotary positions rotate pairs)."
            )

    def rotary(self) -> Rotary:
        """The tables of the network's positions."""
        return Rotary(self.hidden_size // self.heads)

    @property
    def absorbing(self) -> bool:
        """Whether only masked positions move and are learned (`flow.path.Source.absorbing`).

        Published networks learn to copy instead, with either source.
        """
        return False

    @property
    def embedding_rows(self) -> int:
        """Rows of the embedding and of the head: V, or V + 1 with the mask source."""
        return self.vocab_size + (self.source == "mask")

    @property
    def mask_id(self) -> int | None:
        """The id that is never data, or None with the uniform source."""
        return self.vocab_size if self.source == "mask" else None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values; without a joint head, as before there were any."""
        values = asdict(self)
        return values if self.neighbours else {k: v for k, v in values.items() if k != "neighbours"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            ConfigError: a field is missing, unknown or out of range.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ConfigError(f"Model config: unknown fields {', '.join(unknown)}.")
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"Model config: {str(error).split('__init__() ')[-1]}.") from None


PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 192, "blocks": 4, "heads": 6, "cond_size": 64},
    "small": {"hidden_size": 384, "blocks": 6, "heads": 6, "cond_size": 128},
    "0.17B": {"hidden_size": 768, "blocks": 12, "heads": 12, "cond_size": 128},
    "1.3B": {"hidden_size": 2048, "blocks": 21, "heads": 32, "cond_size": 256},
    "1.7B": {"hidden_size": 2048, "blocks": 28, "heads": 32, "cond_size": 256},
}
"""Shapes by name; the last three are the published ones."""


class ScalarEmbedding(nn.Module):
    """One number per sequence -> C features: sinusoids (cos first), Linear, SiLU, Linear."""

    def __init__(self, cond_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(SINUSOIDS, cond_size), nn.SiLU(), nn.Linear(cond_size, cond_size)
        )

    def forward(self, value: Tensor) -> Tensor:
        """value (B,) -> (B, C)."""
        half = SINUSOIDS // 2
        exponents = torch.arange(half, dtype=torch.float32, device=value.device) / half
        angles = value.float()[:, None] * torch.exp(-math.log(10_000.0) * exponents)
        features: Tensor = self.mlp(torch.cat((angles.cos(), angles.sin()), dim=-1))
        return features


class Norm(nn.Module):
    """Layer norm with a weight and no bias, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x.float(), x.shape[-1:], self.weight.float())


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, with one shift and scale (B, D) for all positions of a sequence.

    What comes out goes into products: under autocast it is converted here, once for all of them.
    """
    x = torch.addcmul(shift[:, None], x, 1.0 + scale[:, None])
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def fuse(linear: nn.Linear | None, c: Tensor) -> Tensor:
    """The published student narrows its (B, 2 C) condition anew in every block; others pass it."""
    return c if linear is None else F.silu(linear(c))


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
        self.condition_fuser = _fuser(config)
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
        self.condition_fuser = _fuser(config)
        self.adaLN_modulation = nn.Linear(config.cond_size, 2 * config.hidden_size)

    def final(self, x: Tensor, c: Tensor) -> Tensor:
        """Last hidden rows, (B, L, D): what the head is applied to."""
        shift, scale = self.adaLN_modulation(fuse(self.condition_fuser, c)).chunk(2, dim=-1)
        return modulate(self.norm_final(x), shift, scale)


class JointHead(nn.Module):
    """Tells a hidden row which tokens have been drawn beside it, within one and the same call.

    p(x_1[i] given x_t) knows nothing of what the other positions of a step draw, so positions drawn
    together contradict each other. This small MLP moves the row before the head reads it,
    which makes it p(x_1[i] given x_t and the neighbours drawn so far): a step can draw its movers
    in a few groups, each seeing the ones before, for one pass of the body. It starts at zero.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, count = config.hidden_size, 2 * config.neighbours
        self.tokens = nn.Linear(count * width, 2 * width)
        self.row = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(2 * width, width)

    def forward(self, rows: Tensor, around: Tensor, known: Tensor) -> Tensor:
        """Rows (N, D), embeddings of their neighbours (N, 2 R, D), known (N, 2 R) -> (N, D)."""
        inner = self.tokens(known_around(around, known)) + self.row(rows)
        told: Tensor = rows + self.out(F.gelu(inner, approximate="tanh"))
        return told


def known_around(around: Tensor, known: Tensor) -> Tensor:
    """What a joint head reads: embeddings (N, 2 R, D) normed, or zero where unknown, (N, 2 R D)."""
    return (F.layer_norm(around.float(), around.shape[-1:]) * known[..., None]).flatten(1)


def neighbourhood(x: Tensor, known: Tensor, rows: Tensor, radius: int) -> tuple[Tensor, Tensor]:
    """What is known around some positions.

    Args:
        x: token ids, int64, shape (B, L).
        known: which of them have been drawn, bool, shape (B, L).
        rows: some of the B L positions, int64, shape (N,).
        radius: R.

    Returns:
        Tokens i - R ... i - 1, i + 1 ... i + R, int64, and whether each is known, both (N, 2 R).
        Past the ends of a sequence nothing is.
    """
    length = x.shape[1]
    left = torch.arange(-radius, 0, device=x.device)
    place = rows[:, None] % length + torch.cat((left, -left.flip(0)))
    inside = (place >= 0) & (place < length)
    index = rows[:, None] // length * length + place.clamp(0, length - 1)
    return x.flatten()[index], known.flatten()[index] & inside


def _fuser(config: ModelConfig) -> nn.Linear | None:
    if config.step_embedding != "raw":
        return None
    return nn.Linear(2 * config.cond_size, config.cond_size)


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
        """Normal(0.02) matrices, zero biases; everything that must start silent starts at zero.

        The head starts as a copy of the embedding (they are not tied), at a scale that gives the
        present token a logit of ln V + 1 and so about half of the mass: near t = 1 nearly every
        token is to be copied, and a head that must first learn V such pairs wastes thousands of
        updates on it.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
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


Network = TypeVar("Network", bound=FlowNetwork)


def student_from_teacher(
    teacher: Network, step_embedding: StepEmbedding, neighbours: int = 0
) -> Network:
    """A step-aware network that starts from a teacher's weights.

    With `log2` it equals the teacher at every h. With `raw` (published) the fusers are fresh, and
    it does not.

    Args:
        teacher: a network with or without a step-size branch.
        step_embedding: the student's branch, `raw` or `log2`; `none` for one that gets a joint head
            instead, whose draws are right at any step size.
        neighbours: R of the student's joint head; 0: none.

    Returns:
        A new network; the teacher is left as it was.

    Raises:
        ConfigError: a branch that would change or be lost, or tensors that do not agree otherwise.
    """
    config = replace(teacher.config, step_embedding=step_embedding, neighbours=neighbours)
    student = type(teacher)(config).to(teacher.vocab_embed.weight.device)
    known = ("none", step_embedding)
    if (step_embedding == "none" and not neighbours) or teacher.config.step_embedding not in known:
        raise ConfigError(
            f"A {step_embedding} student cannot start from a network whose step embedding is "
            f"{teacher.config.step_embedding}."
        )
    if neighbours and teacher.config.neighbours not in (0, neighbours):
        raise ConfigError(
            f"The teacher's joint head sees {teacher.config.neighbours} neighbours, not "
            f"{neighbours}: "
            f"give neighbours={teacher.config.neighbours}, or a teacher without such a head.",
            "neighbours",
        )
    new: set[str] = set()
    if step_embedding != teacher.config.step_embedding:
        new |= {"dt_embedding", "time_condition_fuser", "condition_fuser"}
    if neighbours != teacher.config.neighbours:
        new |= {"joint"}  # or left behind, where the student has none
    found = student.load_state_dict(teacher.state_dict(), strict=False)
    wrong = [n for n in found.missing_keys + found.unexpected_keys if not new & {*n.split(".")}]
    if wrong:
        raise ConfigError(f"Teacher and student do not agree in {', '.join(sorted(wrong))}.")
    # A joint head is trained beside a body that stays: so does an embedding that is the head, too.
    student.vocab_embed.requires_grad_(not neighbours)
    return student
