"""How long a gap should be: lengths are tried, and the model says which it finds likely.

A length n is tried in one call, in which the n tokens of the gap and the BEHIND tokens after it are
unknown. With a flat prior over n, and the tokens behind taken on their own,

    P(n) ~ p(tokens behind the gap, at the rows of that call):

with the right number of positions between both sides the model knows best how the text goes on. The
gap gets the mean of n under P, rounded. A gap that ends the text has nothing behind it: it is
written at its longest, and ends with its document.

Shapes: L positions, V data tokens.
"""

from __future__ import annotations

from collections.abc import Generator as Asks
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fsdfm.generate.layout import Layout
from fsdfm.generate.request import Request
from fsdfm.generate.template import Fixed, Gap
from fsdfm.generate.track import Probe, Task, start

if TYPE_CHECKING:
    from fsdfm.generate.generator import Generator

BEHIND = 2
"""Tokens after a gap that a length is judged by."""
TRIED = 8
"""Lengths of a gap that are tried at most."""


def choose_lengths(
    generator: Generator, layout: Layout, request: Request
) -> Asks[list[Task], None, tuple[Layout, int]]:
    """Lengths for the gaps that have none, from left to right; the text stays in the context.

    Gaps to the right of the one that is tried are at the middle of their range; so is one with
    nothing but gaps behind it.

    Returns:
        A layout in which every gap has its length, and the calls that it took.
    """
    calls, context = 0, generator.config.context_length
    for number, piece in enumerate(layout.pieces):
        if not (isinstance(piece, Gap) and piece.free):
            continue
        if number == len(layout.pieces) - 1:
            most = layout.most(number, context)
            layout = replace(layout.with_length(number, most), least=piece.low)
            continue
        if not any(isinstance(later, Fixed) for later in layout.pieces[number + 1 :]):
            layout = _middle(layout, number, context)
            continue  # nothing is there to judge by
        settled = layout
        for later, other in enumerate(layout.pieces[number + 1 :], start=number + 1):
            if isinstance(other, Gap) and other.free:
                settled = _middle(settled, later, context)
        scores: dict[int, float] = {}
        probes = [
            _probe(generator, settled.with_length(number, n), number, request.seed, n, scores)
            for n in candidates(piece.low, settled.most(number, context))
        ]
        yield [*probes]
        calls += sum(probe.calls for probe in probes)
        layout = layout.with_length(number, expected(scores))
    return layout, calls


def candidates(low: int, high: int, count: int = TRIED) -> list[int]:
    """At most `count` lengths from low to high, both among them; ever further apart."""
    if high - low < count:
        return list(range(low, high + 1))
    ratio = (high / low) ** (1.0 / (count - 1))
    found = {low, high, *(round(low * ratio**k) for k in range(1, count - 1))}
    for more in range(low, high):  # short lengths round to the same
        if len(found) >= count:
            break
        found.add(more)
    return sorted(found)


def expected(scores: Mapping[int, float]) -> int:
    """The mean length, rounded.

    Args:
        scores: log p of what is behind, nats, of lengths that were tried; one that was not counts
            with the next that was.
    """
    lengths = torch.tensor(sorted(scores), dtype=torch.float64)
    weight = torch.tensor([scores[n] for n in sorted(scores)], dtype=torch.float64).softmax(0)
    weight = weight * torch.diff(lengths, prepend=lengths[:1] - 1.0)
    return round(float((weight * lengths).sum() / weight.sum()))


def _middle(layout: Layout, number: int, context: int) -> Layout:
    """The same with a free gap at the middle of what it may have."""
    return layout.with_length(number, (layout.sizes[number] + layout.most(number, context)) // 2)


def _probe(
    generator: Generator,
    layout: Layout,
    number: int,
    seed: int,
    length: int,
    scores: dict[int, float],
) -> Probe:
    given, free = layout.tokens()
    last = layout.places()[number][1]
    behind = (~free[last:]).nonzero()[:BEHIND, 0] + last
    hidden = free.clone()
    hidden[behind] = True
    noise = torch.Generator().manual_seed(seed)
    x = torch.where(hidden, start(generator, noise, len(given)), given)
    t = float(1.0 - hidden.float().mean()) ** (1.0 / generator.config.schedule_power)
    t = min(t, 1.0 - 1.0 / len(x))
    return Probe(x, t, 1.0 - t, behind, ~hidden, partial(_score, scores, length, given[behind]))


def _score(scores: dict[int, float], length: int, behind: Tensor, logp: Tensor) -> None:
    """Note the score of a length: rows of what is behind the gap, (b, V)."""
    scores[length] = float(logp.gather(1, behind[:, None]).sum())
