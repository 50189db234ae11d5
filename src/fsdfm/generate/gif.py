"""How a text came about as a GIF that moves: a picture for each call."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fsdfm.core.errors import ConfigError
from fsdfm.generate.trace import GIVEN, HOLE, NOISE, Cell, Frame, Trace, warmth

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

WIDTH, MARGIN, FONT_SIZE, LINE = 720, 20, 17, 25
"""Pixels."""
MOST_LINES = 24
"""Of a picture; of a longer text those are shown that are written."""
BACK, INK, DIM = (251, 250, 247), (29, 28, 26), (150, 146, 138)
LIGHTNESS = 0.42
BEAT, REST = 450, 3000
"""Milliseconds of a picture, and of the last one."""
LONGEST = 30_000
"""Milliseconds of all pictures but the last; of a text of many calls each is shown for less."""
FONTS = ("DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")
"""The first that there is; else the one that Pillow brings, which knows Latin alone."""

Colour = tuple[int, int, int]
Line = list[tuple[str, Colour]]


def gif(trace: Trace) -> bytes:
    """The bytes of a GIF that shows every frame of a trace, over and over.

    Characters that the font lacks, such as emoji, are boxes.

    Raises:
        ConfigError: Pillow is not installed.
    """
    needs_pillow()
    from PIL import Image, ImageDraw

    font, total = _font(), trace.frames[-1].step
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    texts = [_lines(ruler, font, cells, total) for cells in trace.states()]
    height = 2 * MARGIN + LINE * (2 + min(MOST_LINES, max(len(lines) for lines, _ in texts)))
    pictures = []
    for frame, (lines, written) in zip(trace.frames, texts, strict=True):
        picture = Image.new("RGB", (WIDTH, height), BACK)
        draw = ImageDraw.Draw(picture)
        _bar(draw, font, frame, total)
        first = max(0, min(written + 2, len(lines)) - MOST_LINES)
        for number, line in enumerate(lines[first : first + MOST_LINES]):
            x = float(MARGIN)
            for text, colour in line:
                draw.text((x, MARGIN + LINE * (2 + number)), text, fill=colour, font=font)
                x += draw.textlength(text, font=font)
        pictures.append(picture)
    return _saved(pictures)


def needs_pillow() -> None:
    """Raises ConfigError where Pillow is not installed."""
    if importlib.util.find_spec("PIL") is None:
        raise ConfigError("A GIF needs Pillow: pip install 'fsdfm[gif]' brings it.")


def _saved(pictures: Sequence[Image.Image]) -> bytes:
    """All of them with the colours of the first and the last."""
    from PIL import Image

    first, last = pictures[0], pictures[-1]
    both = Image.new("RGB", (first.width, 2 * first.height))
    both.paste(first, (0, 0))
    both.paste(last, (0, first.height))
    palette = both.quantize(128)
    few = [p.quantize(palette=palette, dither=Image.Dither.NONE) for p in pictures]
    beat = max(20, min(BEAT, LONGEST // max(1, len(few) - 1)))
    times = [beat] * (len(few) - 1) + [REST]
    out = io.BytesIO()
    few[0].save(out, "GIF", save_all=True, append_images=few[1:], duration=times, loop=0)
    return out.getvalue()


def _bar(draw: ImageDraw.ImageDraw, font: Any, frame: Frame, total: int) -> None:
    """A line of figures, and a bar of the calls in their colours."""
    told = f"step {frame.step} of {total}"
    draw.text((MARGIN, MARGIN - 4), told, fill=DIM, font=font)
    left, room = MARGIN + 150, WIDTH - 2 * MARGIN - 150
    for call in range(1, total + 1):
        edges = (left + room * (call - 1) // total, left + room * call // total - 2)
        colour = warmth(call, total, LIGHTNESS) if call <= frame.step else (220, 216, 207)
        draw.rectangle((edges[0], MARGIN + 1, max(edges), MARGIN + 13), fill=colour)


def _lines(
    ruler: ImageDraw.ImageDraw, font: Any, cells: Sequence[Cell], total: int
) -> tuple[list[Line], int]:
    """The text in lines of the width, and the number of the last one with something written."""
    lines: list[Line] = [[]]
    x, written, room = 0.0, 0, WIDTH - 2 * MARGIN
    for text, colour, done in _words(cells, total):
        if text == "\n":
            lines.append([])
            x = 0.0
            continue
        wide = ruler.textlength(text, font=font)
        if x + wide > room and x > 0.0:
            lines.append([])
            x, text = 0.0, text.lstrip(" ")
            wide = ruler.textlength(text, font=font)
        lines[-1].append((text, colour))
        x += wide
        written = len(lines) if done else written
    return lines, written


def _words(cells: Sequence[Cell], total: int) -> Iterator[tuple[str, Colour, bool]]:
    """Parts of lines, line ends, their colours, and whether they are written."""
    for cell in cells:
        text, colour, done = cell.text, DIM, False
        if cell.call == HOLE:
            text = "·· "
        elif cell.call == NOISE:
            text = " ".join(text.split("\n"))
        elif cell.call == GIVEN:
            colour = INK
        else:
            colour, done = warmth(cell.call, total, LIGHTNESS), True
        for number, line in enumerate(text.splitlines() or [""]):
            if number:
                yield "\n", colour, done
            for word in _pieces(line):
                yield word, colour, done
        if text.endswith(("\n", "\r")):
            yield "\n", colour, done


def _pieces(line: str) -> Iterator[str]:
    """Words with the space before them; of one that fills a line and more, its parts."""
    word = ""
    for letter in line:
        if (letter == " " and word.strip()) or len(word) > 60:
            yield word
            word = ""
        word += letter
    if word:
        yield word


def _font() -> Any:
    from PIL import ImageFont

    for name in FONTS:
        try:
            return ImageFont.truetype(name, FONT_SIZE)
        except OSError:
            continue
    return ImageFont.load_default(FONT_SIZE)
