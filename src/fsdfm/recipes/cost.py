"""What an update costs: work of an objective, FLOPs and memory, by formula."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from fsdfm.flow.loss import OTHER_CHUNK, OTHER_PIECE
from fsdfm.model.config import ModelConfig
from fsdfm.model.flops import body_flops, head_flops, joint_flops, joint_input_flops
from fsdfm.model.transformer import MLP_RATIO
from fsdfm.train.objective import Objective
from fsdfm.train.optim import Optimizer

FLOAT, HALF = 4, 2
"""Bytes of a number: weights, gradients, moments and averages are float32, products bfloat16."""
SAMPLED = 256, 16
"""Sequences and positions from which the shares of an objective are counted."""
PIECES = 3
"""Rows of V float32 numbers that a loss holds for each row it works on: logits, their logarithms
and their slope."""


@dataclass(frozen=True, slots=True)
class Work:
    """What an objective asks of its networks, on average over what it draws."""

    passes: float
    """Passes of the body with a gradient, of a sequence."""
    free: float
    """Passes of the body without one."""
    rows: float
    """Rows that the head learns from, of a position."""
    free_rows: float
    """Rows of the head without a gradient."""
    free_told: float
    """Rows that a joint head is asked for without a gradient."""


def work(objective: Objective) -> Work:
    """Count what an objective does with a network that does nothing.

    The shares of what is drawn (step sizes, movers, hidden positions) are those of 256 sequences of
    16 positions: within some percent of their means.
    """
    changes: dict[str, Any] = {"vocab_size": 2}  # fewer logits; the work is that of any vocabulary
    names = {field.name for field in fields(objective)}  # type: ignore[arg-type]
    if "source" in names:
        changes = {"source": replace(objective.source, **changes)}  # type: ignore[attr-defined]
    stand_in: Any = replace(objective, **changes)  # type: ignore[type-var]
    counter, data = _Counter(), torch.zeros(SAMPLED, dtype=torch.int64)
    stand_in.loss(counter, counter, data, torch.Generator().manual_seed(0))
    sequences, positions = len(data), data.numel()
    return Work(
        passes=counter.passes / sequences,
        free=counter.free / sequences,
        rows=(counter.rows or positions) / positions,  # a language model has no joint head to ask
        free_rows=counter.free_rows / positions,
        free_told=counter.free_told / positions,
    )


class _Counter(nn.Module):
    """Stands for a network: hidden rows of width 1, all zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 1))
        self.passes = self.free = self.rows = self.free_rows = self.free_told = 0

    def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.passes += len(x_t)
        else:
            self.free += len(x_t)
        return torch.zeros((*x_t.shape, 1))

    def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.rows += len(at)
        else:
            self.free_told += len(at)
        return rows

    def head(self, rows: Tensor) -> Tensor:
        self.free_rows += len(rows)
        return rows @ self.weight.T

    def head_parameters(self) -> tuple[Tensor, None]:
        return self.weight, None


def sequence_flops(config: ModelConfig, done: Work, length: int) -> float:
    """FLOPs of training on one sequence: a gradient costs twice its forward pass.

    What is computed twice to save memory is not counted, nor what multiplies nothing (norms,
    activations, the optimizer).

    Args:
        config: shape of the network.
        done: what its objective asks for.
        length: positions, L.
    """
    body = body_flops(config, 1, length)
    head, joint = head_flops(config, length), joint_flops(config, length)
    learned = 3 * (done.passes * body + done.rows * (head + joint))
    if not done.passes:  # nothing goes back into the body
        learned -= done.rows * joint_input_flops(config, length)
    return learned + done.free * body + done.free_rows * head + done.free_told * joint


@dataclass(frozen=True, slots=True)
class State:
    """Bytes that a run holds between updates and while one is done."""

    parameters: int
    """Their number, the trained and the others."""
    weights: int
    gradients: int
    optimizer: int
    average: int
    casts: int
    """Copies of the weights of linear layers in the format of their products, during an update."""


def state_bytes(model: nn.Module, optimizer: Optimizer) -> State:
    """What a network in training holds besides activations.

    Args:
        model: may be on the `meta` device, where it takes no memory.
        optimizer: of this network.
    """
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    moments = sum(
        p.numel() * (1 if isinstance(part, torch.optim.Muon) else 2)
        for part in optimizer.parts
        for group in part.param_groups
        for p in group["params"]
    )
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    cast = sum(p.numel() for module in linear for p in module.parameters())
    return State(
        parameters=count,
        weights=FLOAT * count,
        gradients=FLOAT * trained,
        optimizer=FLOAT * moments,
        average=FLOAT * trained,
        casts=HALF * cast,
    )


def activation_bytes(config: ModelConfig, tokens: int) -> int:
    """What autograd keeps of one pass of the published network under bfloat16 autocast.

    A block keeps, of each position: 4 rows of D in float32 (what goes into the norms and comes out
    of them), 9 in bfloat16 (inputs of products, queries, keys, values, what attention gives, what
    is gated), and two rows of its MLP. The last norm keeps 2 rows in float32.

    Args:
        config: shape of the network.
        tokens: positions of the pass, B L.
    """
    width = config.hidden_size
    block = width * (4 * FLOAT + 9 * HALF + 2 * MLP_RATIO * HALF)
    return tokens * (config.blocks * block + width * 2 * FLOAT)


def logits_bytes(config: ModelConfig, rows: int) -> int:
    """What the loss holds at a time: a chunk of logits, a piece of it in float32, the head.

    The gradients of the head and of the hidden rows are made along with the loss.

    Args:
        config: shape of the network.
        rows: that are learned from in one pass.
    """
    count, width = config.embedding_rows, config.hidden_size
    chunk, piece = (min(rows, most // count) * count for most in (OTHER_CHUNK, OTHER_PIECE))
    head = count * width * (FLOAT + HALF)
    return HALF * chunk + PIECES * FLOAT * piece + head + 2 * HALF * rows * width
