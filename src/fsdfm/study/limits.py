"""Does a way of drawing have the law of its language, at any number of calls?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fsdfm.flow.grid import Late
from fsdfm.flow.path import mixture_state
from fsdfm.flow.posterior import INDEPENDENT, FlowModel, Grouped, Posterior, Sequences
from fsdfm.flow.sampler import Drawing, sample
from fsdfm.flow.schedule import Polynomial
from fsdfm.study.chain import ExactPosterior, OneStream
from fsdfm.study.curve import both, budget
from fsdfm.study.divergence import figures
from fsdfm.study.languages import KnownLaw, Row
from fsdfm.study.protocol import append, read
from fsdfm.study.training import weights_sha256

LOG = logging.getLogger(__name__)


class Drawer(Protocol):
    """A way of drawing."""

    def __call__(self, grid: Tensor, samples: int, start: Tensor | None = None) -> Tensor:
        """Samples along a grid, from fresh starts or from given states, int64, (samples, L)."""
        ...


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

    def draw(grid: Tensor, samples: int, start: Tensor | None = None) -> Tensor:
        noise = OneStream(samples if start is None else len(start), seed)
        drawing = Drawing(posterior=posterior)
        x_0 = noise.start(source, language.length) if start is None else start
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
    """A row for every way of drawing and setting.

    Those in out/results.jsonl that are of this teacher are kept.

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
    teacher = weights_sha256(language.teacher)
    for name, make in drawers.items():
        made: list[Drawer] = []
        for calls, power in settings:
            facts = {"name": name, "calls": calls, "power": power, "samples": samples}
            facts["teacher"] = teacher
            known = [row for row in rows if facts.items() <= row.items()]
            if not known:
                made = made or [make()]
                x = made[0](Late(power)(calls), samples)
                known = [facts | figures(x, language.chain)]
                append(path, known[0])
                LOG.info(f"{name}, {calls} calls, grid of power {power:g}: {both(known[0])}")
            wanted.append(known[0])
    return wanted


TIMES = (0.25, 0.5, 0.656, 0.9)
"""Of the states that are drawn from in one call."""
STATES = 16
"""At each time."""


def kept_marginals(
    language: KnownLaw, drawers: dict[str, Drawer], samples: int
) -> dict[str, list[float]]:
    """Does a call keep p(x_1[i] given x_t)? Mean total variation from it at each of TIMES.

    The posterior of a position is the same however its neighbours are drawn; a joint head that
    heeds them too much or too little changes it. Positions that show data in a mask source do not
    count. `exact marginals` is the floor: as many draws from the true ones.

    Args:
        language: the law.
        drawers: by name.
        samples: texts drawn from each state.

    Returns:
        A number for each time, by name.
    """
    chain, source = language.chain, language.source
    exact = ExactPosterior(chain, source)
    found: dict[str, list[float]] = {name: [] for name in (*drawers, "exact marginals")}
    for time in TIMES:
        generator = torch.Generator().manual_seed(23)
        x_1 = chain.draw(STATES, language.length, 29)
        x_0 = source.draw((STATES, language.length), generator)
        t = torch.full((STATES,), time, dtype=torch.float64)
        x_t = mixture_state(x_0, x_1, t, Polynomial(), generator)
        counted = (x_t == chain.symbols) | (not source.absorbing)
        p = exact.body(x_t, t, t).exp()
        grid = torch.tensor((time, 1.0), dtype=torch.float64)
        for name, draw in drawers.items():
            x = draw(grid, samples, x_t.repeat_interleave(samples, 0))
            seen = F.one_hot(x, chain.symbols).double().view(STATES, samples, *p.shape[1:]).mean(1)
            found[name].append(_variation(seen, p, counted))
        drawn = torch.multinomial(p.flatten(0, 1), samples, True, generator=generator)
        seen = F.one_hot(drawn, chain.symbols).double().mean(1).view_as(p)
        found["exact marginals"].append(_variation(seen, p, counted))
    return found


def _variation(seen: Tensor, p: Tensor, counted: Tensor) -> float:
    """Mean total variation of two laws (B, L, V) over the positions that count (B, L)."""
    return float((0.5 * (seen - p).abs().sum(-1))[counted].mean())


def marginals_table(found: dict[str, list[float]]) -> str:
    """In Markdown."""
    lines = [
        "Mean total variation from p(x_1[i] given x_t), one call from t to 1.",
        "",
        f"| | {' | '.join(f't = {time:g}' for time in TIMES)} |",
        "|---" * (1 + len(TIMES)) + "|",
    ]
    lines += [
        f"| {name} | {' | '.join(f'{each:.3f}' for each in values)} |"
        for name, values in found.items()
    ]
    return "\n".join(lines) + "\n"


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
