"""Training matrices as they will be stored: passes that learn read them rounded to few bits.

    gradient at round(W), applied to W

The weights that are kept between updates stay exact, so that small steps add up (straight-through).
So does their average, which is rounded where it is judged and exported; the targets of a student
come from it as it is.

Source: arXiv 1308.3432, 1712.05877.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fsdfm.core.packed import bits_of, nearest


@contextmanager
def in_few_bits(model: nn.Module, bits: int | None) -> Iterator[None]:
    """The matrices of the blocks are rounded while this lasts, in place; then exact again.

    Args:
        model: its `blocks` as `fsdfm.core.packed` would store them; what they do not have in their
            name, and what is small, stays exact.
        bits: of a weight, from 3 to 8; None: nothing is rounded.
    """
    if bits is None:
        yield
        return
    rule = {"blocks.": bits}
    some = [p for name, p in model.named_parameters() if bits_of(name, p, rule) is not None]
    exact = [p.detach().clone() for p in some]
    try:
        with torch.no_grad():
            for parameter in some:
                parameter.copy_(nearest(parameter, bits))
        yield
    finally:
        with torch.no_grad():
            for parameter, kept in zip(some, exact, strict=True):
                parameter.copy_(kept)
