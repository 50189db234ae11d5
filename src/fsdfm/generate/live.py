"""The terminal view: one text while it is denoised."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterable

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from fsdfm.generate.results import Snapshot
from fsdfm.generate.trace import warmth

MASKED = "░"
NOISE, GIVEN = "dim", ""

SHORTEST_FRAME = 1 / 30
"""Seconds; snapshots that come faster are skipped, but for the last."""
BAR_WIDTH = 24

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """The text with control characters, which a terminal would obey, replaced; not tab, newline."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def show(snapshots: Iterable[Snapshot], console: Console) -> Snapshot:
    """Show a text as it settles; the view is wiped at its end.

    Tokens that are still noise are dim. The others have the colour of the step that drew them last,
    from blue, the first, to red; those of the last step are bold.

    Args:
        snapshots: as `Generator.stream` gives them, at least one.
        console: a terminal.

    Returns:
        The last snapshot.
    """
    snapshots = iter(snapshots)
    last = first = next(snapshots)
    shown_at = 0.0
    with Live(console=console, transient=True, auto_refresh=False) as live:
        for snapshot in itertools.chain((first,), snapshots):
            last = snapshot
            now = time.monotonic()
            if now - shown_at >= SHORTEST_FRAME or snapshot.step == snapshot.steps:
                live.update(frame(snapshot, console), refresh=True)
                shown_at = now
    return last


def frame(now: Snapshot, console: Console) -> Group:
    """One picture: a line of figures, and as much of the text as the terminal is high.

    Args:
        now: what to show.
        console: its width and height are kept to.
    """
    width, rows = console.width, max(console.height - 4, 1)
    text = Text(overflow="fold")
    for index, piece in enumerate(now.pieces):
        style = _style(now, index)
        # Noise is full of line ends; only settled ones may move the text below them.
        shown = printable(piece.replace("\n", " ") if style == NOISE else piece)
        text.append(shown or MASKED, style=style)
        if len(text) > width * rows:
            break
    lines = text.wrap(console, width)
    return Group(_figures(now), Text(), *lines[:rows])


def _style(now: Snapshot, index: int) -> str:
    moved = now.moved[index]
    if not moved:
        return GIVEN if now.frozen[index] else NOISE
    red, green, blue = warmth(moved, now.steps, lightness=0.6)
    return f"{'bold ' * (moved == now.step)}rgb({red},{green},{blue})"


def _figures(now: Snapshot) -> Text:
    done = round(BAR_WIDTH * now.step / now.steps)
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append("━" * done, style="green").append("━" * (BAR_WIDTH - done), style="dim")
    line.append(f"  step {now.step}/{now.steps}  {now.calls} model calls  {now.seconds:.1f} s")
    if now.step:
        rate = now.tokens * now.step / now.steps / now.seconds
        line.append(f"  {rate:,.0f} tokens/s")
    return line
