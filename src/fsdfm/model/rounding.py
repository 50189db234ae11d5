"""Rounding to few bits with a view to what a matrix is multiplied with.

`fsdfm.core.packed` takes each weight to the nearest code. Here a matrix is rounded column by
column, and what a column loses in the products is made up for by the columns after it. The codes
are the same ones: a reader cannot tell.

Shapes: R rows (outputs) and C columns (inputs) of a matrix.

Source: GPTQ, arXiv 2210.17323.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fsdfm.core.errors import ConfigError
from fsdfm.core.packed import (
    GROUP,
    Packed,
    best_levels,
    best_scales,
    bits_of,
    coded,
    join,
    pack,
    unpack,
)
from fsdfm.core.progress import Progress
from fsdfm.flow.grid import SMALLEST_STEP
from fsdfm.model.transformer import FlowNetwork

DAMPING = 0.01
"""Added to the diagonal, as a part of its mean: few examples know little of rare directions."""


@dataclass(frozen=True, slots=True)
class Example:
    """A batch as a network meets it in training."""

    x_1: Tensor
    """Data, int64, shape (B, L)."""
    x_t: Tensor
    """State, int64, shape (B, L)."""
    t: Tensor
    """Times, shape (B,)."""
    rows: Tensor
    """Which of the B L positions the head reads, int64, shape (N,)."""
    known: Tensor
    """What a joint head is told, bool, shape (B, L)."""


def compensated(weight: Tensor, gram: Tensor, bits: int) -> Packed:
    """Codes of W whose products with the inputs x lose little, not codes nearest to W.

        minimise E |(W - W') x|^2, column by column, where E x x^T is `gram`

    Args:
        weight: (R, C), C a multiple of GROUP.
        gram: sum or mean of x x^T over inputs, (C, C).
        bits: of a code, from 3 to 8.
    """
    levels = best_levels(bits)
    gram = gram.double()
    mean = gram.diagonal().mean()
    if not mean > 0.0:  # no input ever came: nothing to look at
        return pack(weight, bits)
    gram = gram + DAMPING * mean * torch.eye(len(gram), dtype=gram.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    # Row j holds what a unit of error in column j, once it is rounded, asks of the later ones.
    pull = torch.linalg.cholesky(inverse, upper=True).float()
    cost = pull.diagonal() ** -2.0
    left = weight.detach().float().clone()
    codes, scales = [], []
    for start in range(0, left.shape[1], GROUP):
        stop = start + GROUP
        scale = best_scales(left[:, start:stop], levels, cost[start:stop])
        errors = []
        for j in range(start, stop):
            code = coded(left[:, j, None], scale.float(), levels)
            error = (left[:, j, None] - levels[code] * scale.float()) / pull[j, j]
            left[:, j:stop].addcmul_(error, pull[j, None, j:stop], value=-1.0)
            codes.append(code)
            errors.append(error)
        left[:, stop:] -= torch.cat(errors, 1) @ pull[start:stop, stop:]
        scales.append(scale)
    return join(torch.cat(codes, 1), torch.cat(scales, 1), levels)


@torch.no_grad()
def calibrated(
    model: FlowNetwork,
    examples: Sequence[Example],
    bits: Mapping[str, int],
    *,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> dict[str, Packed]:
    """Round a network's matrices in the order in which they are used, each by its own inputs.

    Inputs are those that the matrices before it, rounded already, give. An embedding that is the
    head, too, is rounded as the head. Matrices of conditions, and an embedding that is not the
    head, are rounded plainly.

    Args:
        model: the network, which stays as it is.
        examples: batches to look at.
        bits: as `save_pretrained` takes them.
        dtype: of the matrix products that lead to the inputs.
        progress: told (matrix, matrices done, matrices in all).

    Returns:
        What to save, by the tensor's name.

    Raises:
        ConfigError: no examples, or inputs that are not finite.
    """
    if not examples:
        raise ConfigError("Calibrating needs at least one example.")
    work = _Work(copy.deepcopy(model).eval(), bits, dtype, progress)
    model, done = work.model, work.done
    for name in work.plain():
        work.settle(name, pack(work.weights[name], work.bits[name]))
    head = work.name_of(model.head_parameters()[0])
    if head == "vocab_embed.weight":
        _round_head(work, head, examples)
    _round_blocks(work, examples)
    if head != "vocab_embed.weight":
        _round_head(work, head, examples)
    if model.config.neighbours:
        _round_joint(work, examples)
    return done


class _Work:
    """A network that is being rounded."""

    def __init__(
        self,
        model: FlowNetwork,
        bits: Mapping[str, int],
        dtype: torch.dtype,
        progress: Progress | None,
    ) -> None:
        self.model, self.dtype = model, dtype
        self.weights = dict(model.named_parameters())
        counts = {name: bits_of(name, w, bits) for name, w in self.weights.items()}
        self.bits = {name: count for name, count in counts.items() if count is not None}
        self.done: dict[str, Packed] = {}
        self.progress = progress

    def products(self) -> torch.autocast:
        """Where inputs are computed."""
        return torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype != torch.float32)

    def plain(self) -> list[str]:
        """Matrices that no inputs are looked at for."""
        looked_at = {self.name_of(self.model.head_parameters()[0])}
        parts: list[nn.Module] = [*self.model.blocks]
        if self.model.config.neighbours:
            parts.append(self.model.joint)
        looked_at |= {self.name_of(m.weight) for part in parts for m in matrices(part)}
        return [name for name in self.bits if name not in looked_at]

    def name_of(self, weight: Any) -> str:
        """A parameter's name."""
        return next(name for name, own in self.weights.items() if own is weight)

    def settle(self, name: str, packed: Packed) -> None:
        """Put the rounded matrix in the place of the exact one."""
        weight = self.weights[name]
        weight.copy_(unpack(packed, self.bits[name], tuple(weight.shape)))
        self.done[name] = packed
        if self.progress is not None:
            self.progress(name, len(self.done), len(self.bits))

    def round(self, name: str, gram: Tensor) -> None:
        """Round a matrix by what its inputs were."""
        if not gram.isfinite().all():
            raise ConfigError(f"Calibrating met inputs of {name} that are not finite.")
        self.settle(name, compensated(self.weights[name], gram, self.bits[name]))

    def round_each(self, part: nn.Module, run: Callable[[], object]) -> None:
        """Round the matrices of a part, one after the other; `run` passes all examples."""
        for linear in matrices(part):
            name = self.name_of(linear.weight)
            if name in self.bits:
                with _inputs(linear) as gram:
                    run()
                self.round(name, gram)


def matrices(part: nn.Module) -> list[nn.Linear]:
    """Linear layers of a part whose rows are whole groups, in order of use."""
    conditions = ("modulation", "adaLN_modulation", "condition_fuser")
    return [
        module
        for name, module in part.named_modules()
        if isinstance(module, nn.Linear)
        and module.in_features % GROUP == 0
        and name not in conditions
    ]


def _round_head(work: _Work, name: str, examples: Sequence[Example]) -> None:
    if name not in work.bits:
        return
    width = work.model.config.hidden_size
    if width % GROUP:
        work.settle(name, pack(work.weights[name], work.bits[name]))
        return
    gram = torch.zeros(width, width)
    for example in examples:
        with work.products():
            rows = _hidden(work.model, example)
        add_products(gram, rows, rows)
    work.round(name, gram)


def _round_blocks(work: _Work, examples: Sequence[Example]) -> None:
    """Block after block; what passes between two of them is kept."""
    between: list[tuple[Any, ...]] = []
    handle = work.model.blocks[0].register_forward_pre_hook(lambda _, args: between.append(args))
    for example in examples:
        with work.products():
            _hidden(work.model, example)
    handle.remove()
    for block in work.model.blocks:
        work.round_each(block, partial(_passed, work, block, between))
        passed = _passed(work, block, between)
        between = [(x, *args[1:]) for x, args in zip(passed, between, strict=True)]


def _passed(work: _Work, block: nn.Module, between: Sequence[tuple[Any, ...]]) -> list[Tensor]:
    with work.products():
        return [block(*args) for args in between]


def _round_joint(work: _Work, examples: Sequence[Example]) -> None:
    with work.products():
        hidden = [_hidden(work.model, example, known=True) for example in examples]

    def run() -> None:
        with work.products():
            for rows, example in zip(hidden, examples, strict=True):
                work.model.told(rows, _unknown(example), example.x_1, example.known)

    work.round_each(work.model.joint, run)


def _hidden(model: FlowNetwork, example: Example, known: bool = False) -> Tensor:
    """Final rows that the head reads, or those that a joint head is asked for."""
    h = torch.full_like(example.t, SMALLEST_STEP)
    rows = model.body(example.x_t, example.t.float(), h.float()).flatten(0, 1)
    return rows[_unknown(example) if known else example.rows]


def _unknown(example: Example) -> Tensor:
    return (~example.known).flatten().nonzero()[:, 0]


@contextmanager
def _inputs(linear: nn.Linear) -> Iterator[Tensor]:
    """The sum of x x^T over what a layer reads meanwhile, (C, C)."""
    gram = torch.zeros(linear.in_features, linear.in_features)
    handle = linear.register_forward_pre_hook(lambda _, args: add_products(gram, args[0], args[0]))
    try:
        yield gram
    finally:
        handle.remove()


def add_products(total: Tensor, y: Tensor, x: Tensor) -> None:
    """Add the sum of y x^T over rows, in float32, whatever the format of the products."""
    left, right = (each.detach().float().flatten(0, -2) for each in (y, x))
    with torch.autocast("cpu", enabled=False):
        total.addmm_(left.T, right)
