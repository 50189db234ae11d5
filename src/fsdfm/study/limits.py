"""Does a way of drawing have the law of its language, at any number of calls?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from fsdfm.flow.grid import Late
from fsdfm.flow.posterior import INDEPENDENT, FlowModel, Grouped, Posterior, Sequences
from fsdfm.flow.sampler import Drawing, sample
from fsdfm.study.chain import OneStream
from fsdfm.study.curve import both, budget
from fsdfm.study.divergence import figures
from fsdfm.study.languages import KnownLaw, Row
from fsdfm.study.protocol import append, read

LOG = logging.getLogger(__name__)
Drawer = Callable[[Tensor, int], Tensor]
"""(grid, samples) -> samples, int64, (count, L)."""


def drawer(
    language: KnownLaw, model: FlowModel, groups: int = 0, seams: str = "random", seed: int = 5
) -> Drawer:
    """Draws by the exact rule.

    Args:
        language: for the length and the start.
        model: network, or exact posterior.
        groups: in which the movers of a call are drawn; 0: each alone, without a joint head.
        seams: of the groups, one of SEAMS.
        seed: of the noise.
    """
    source, sampled = language.source, Sequences(model)
    posterior: Posterior = Grouped(sampled, groups, seams) if groups else INDEPENDENT

    def draw(grid: Tensor, samples: int) -> Tensor:
        noise = OneStream(samples, seed)
        drawing = Drawing(posterior=posterior)
        x_0 = noise.start(source, language.length)
        *_, last = sample(sampled, x_0, grid, noise, source, drawing=drawing)
        return last.x

    return draw


def limits(
    out: Path,
    language: KnownLaw,
    drawers: dict[str, Callable[[], Drawer]],
    settings: Sequence[tuple[int, float]],
    samples: int,
) -> list[Row]:
    """A row for every way of drawing and setting; those in out/results.jsonl are kept.

    Args:
        out: directory.
        language: the law.
        drawers: by name; each is made when it is first needed.
        settings: (calls, power of the grid).
        samples: of a row.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.jsonl"
    rows, wanted = read(path), []
    for name, make in drawers.items():
        made: list[Drawer] = []
        for calls, power in settings:
            facts = {"name": name, "calls": calls, "power": power, "samples": samples}
            known = [row for row in rows if facts.items() <= row.items()]
            if not known:
                made = made or [make()]
                x = made[0](Late(power)(calls), samples)
                known = [facts | figures(x, language.chain)]
                append(path, known[0])
                LOG.info(f"{name}, {calls} calls, grid of power {power:g}: {both(known[0])}")
            wanted.append(known[0])
    return wanted


def limits_table(rows: Sequence[Row], language: KnownLaw) -> str:
    """In Markdown, with what as many true samples give."""
    samples = max(row["samples"] for row in rows)
    true = language.floors(samples)["true samples"]
    calls = sorted({row["calls"] for row in rows})
    lines = [
        "Divergence of 3-grams from the law, thousandths of a nat: mean of the windows; pooled; "
        f"each ± 95 %. True samples: {both(true)}.",
        "",
        f"| | grid | {' | '.join(map(budget, calls))} |",
        "|---" * (2 + len(calls)) + "|",
    ]
    found = {(row["name"], row["power"], row["calls"]): row for row in rows}
    for name, power in dict.fromkeys(key[:2] for key in found):
        each = [found.get((name, power, n)) for n in calls]
        texts = " | ".join("" if row is None else both(row) for row in each)
        lines.append(f"| {name} | {power:g} | {texts} |")
    return "\n".join(lines) + "\n"
