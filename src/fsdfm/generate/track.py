"""One sequence on its way, and one call of the network for several that can share it.

Shapes: B sequences, L positions, N movers of one call, V data tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fsdfm.flow.controls import Controls, Shaping
from fsdfm.flow.host import send
from fsdfm.flow.path import make_source
from fsdfm.flow.posterior import Call
from fsdfm.flow.schedule import Polynomial
from fsdfm.flow.step import MOVERS, STEP_RULES, draw
from fsdfm.generate.options import SamplingOptions

if TYPE_CHECKING:
    from fsdfm.generate.generator import Generator

LOGITS_AT_ONCE = 2**21
"""Logits that are looked at together: their copies stay in a cache."""
LATEST = 1.0 - 2.0**-20
"""A time after which it is 1."""


@dataclass(eq=False, slots=True)
class Track:
    """One sequence on its way from noise, or a draft, to text."""

    x: Tensor
    """State, int64, shape (L,), on the CPU."""
    free: Tensor
    """Positions that may move, bool, shape (L,)."""
    times: list[float]
    """Of its calls, and the last, 1."""
    sampling: SamplingOptions
    controls: Controls
    noise: torch.Generator
    pace: float | None = None
    """Nats that a call may draw, a free position; None: the times are kept to."""
    step: int = 0
    calls: int = 0
    """Those in which something moved."""
    rows: int = 0
    """Rows that the head was run on."""
    fresh: Tensor = field(init=False)
    """Positions that were free at its start, bool, shape (L,)."""
    settled: Tensor = field(init=False)
    """Positions that hold what was given or drawn, and no noise, bool, shape (L,)."""
    logprobs: Tensor = field(init=False)
    """log p of each token as it was drawn last, nats, float32, shape (L,); NaN where it was not."""
    entropy: float = math.nan
    """Mean of the rows of the last call, nats."""

    def __post_init__(self) -> None:
        self.fresh, self.settled = self.free.clone(), ~self.free
        self.logprobs = torch.full(self.x.shape, math.nan)

    @property
    def done(self) -> bool:
        """Whether its time is 1."""
        return self.step == len(self.times) - 1

    @property
    def key(self) -> tuple[object, ...]:
        """Tracks of one key can share a call."""
        t, then = self.times[self.step : self.step + 2]
        how = self.sampling
        return len(self.x), t, then, how.step, how.movers, how.draws, type(self)

    def moved(self, power: float, absorbing: bool) -> None:
        """After a call: on to the next time; at a pace of its own, on to the time that it allows.

        A call that draws a share a of the positions that are left draws about a H nats for each, H
        the mean entropy of the rows of the call before.

        Args:
            power: of the schedule, kappa_t = t ** power.
            absorbing: whether what was drawn is left alone, so that 1 - kappa_t of it is left.
        """
        self.step += 1
        if self.pace is None or self.done or math.isnan(self.entropy):
            return
        kappa = self.times[self.step] ** power
        left = 1.0 - kappa if absorbing else 1.0
        a = min(1.0, self.pace / max(self.entropy * left, 1e-9))
        wanted = (kappa + a * (1.0 - kappa)) ** (1.0 / power)
        if wanted > self.times[self.step + 1]:
            later = [each for each in self.times[self.step + 2 :] if each > wanted]
            self.times[self.step + 1 :] = [wanted, *later] if wanted < LATEST else [1.0]


@dataclass(eq=False, slots=True)
class Probe:
    """A look at rows of the model, of which nothing is drawn."""

    x: Tensor
    """State, int64, shape (L,), on the CPU."""
    t: float
    h: float
    positions: Tensor
    """Whose rows, ascending, int64, shape (n,)."""
    known: Tensor
    """Positions that hold a token of the text, bool, shape (L,)."""
    read: Callable[[Tensor], None]
    """Told their log-probabilities, float32, (n, V), on the CPU."""
    done: bool = False
    calls: int = 0

    @property
    def key(self) -> tuple[object, ...]:
        """See `Track`."""
        return len(self.x), self.t, self.h, type(self)


Task = Track | Probe


@torch.no_grad()
def call(generator: Generator, tasks: Sequence[Task]) -> bool:
    """Advance tasks of one key by one call; whether it was one, which it is not if nobody moves.

    What comes out for a task does not depend on the others, but for the rounding of products of
    another size.
    """
    probes = [task for task in tasks if isinstance(task, Probe)]
    tracks = [task for task in tasks if isinstance(task, Track)]
    if probes:
        _look(generator, probes)
    return bool(tracks and _advance(generator, tracks)) or bool(probes)


def _look(generator: Generator, probes: Sequence[Probe]) -> None:
    length, engine = len(probes[0].x), generator.engine
    rows = torch.cat([p.positions + i * length for i, p in enumerate(probes)])
    x = torch.stack([p.x for p in probes]).to(generator.state_device)
    known, rows = torch.stack([p.known for p in probes]).to(x.device), rows.to(x.device)
    hidden = engine.told(engine.hidden(x, probes[0].t, probes[0].h, rows), rows, x, known)
    sizes = [len(p.positions) for p in probes]
    for probe, few in zip(probes, torch.split(hidden, sizes), strict=True):
        logits = engine.head(few)[:, : generator.config.vocab_size]
        probe.read(logits.float().log_softmax(-1).cpu())
        probe.calls, probe.done = 1, True


def _advance(generator: Generator, tracks: Sequence[Track]) -> bool:
    config, how = generator.config, tracks[0].sampling
    t, then = tracks[0].times[tracks[0].step : tracks[0].step + 2]
    rule, length = STEP_RULES[how.step], len(tracks[0].x)
    times = torch.tensor((t, then - t), dtype=torch.float64)
    a = float(rule.mover_probability(Polynomial(config.schedule_power), *times))
    moving: list[tuple[Track, Tensor, Tensor]] = []
    for track in tracks:
        u, offset, landing = (_uniform(n, track) for n in (length, 1, length))
        movers = MOVERS[how.movers](a, u[None], track.free[None], offset)[0]
        if bool(movers.any()):
            moving.append((track, movers, landing[movers]))
    if moving:
        _draw(generator, moving, t, then - t, a)
    for track in tracks:
        track.moved(config.schedule_power, config.absorbing)
    return bool(moving)


def _draw(
    generator: Generator, moving: list[tuple[Track, Tensor, Tensor]], t: float, h: float, a: float
) -> None:
    """Draw the movers of the tracks that have any, and note what was drawn."""
    tracks, movers, landings = zip(*moving, strict=True)
    engine, device = generator.engine, generator.state_device
    x, free, settled = (
        torch.stack([getattr(track, name) for track in tracks]).to(device)
        for name in ("x", "free", "settled")
    )
    places = torch.stack(movers).flatten().nonzero()[:, 0]
    rows, u = send(places, device), send(torch.cat(landings), device)
    shaping = Shaping([track.controls for track in tracks], device)
    hidden = engine.hidden(x, t, h, rows)
    noted = torch.zeros((2, len(rows)), device=device)
    how = tracks[0].sampling
    paced = any(track.pace is not None for track in tracks)

    def drawn(few: Tensor, now: Tensor, at: Tensor, u: Tensor) -> Tensor:
        state = now.view_as(x), settled
        token, *facts = _tokens(generator, few, at, state, (u, a, how.step, paced), shaping)
        settled.view(-1)[at] = True
        noted[:, torch.searchsorted(rows, at)] = torch.stack(facts)
        return token

    asked = Call(x, places, rows, hidden, ~free, u, drawn)
    x = x.flatten().index_copy(0, rows, generator.posterior(how).tokens(asked)).view_as(x)
    # The only two waits for the device of a call, however many tracks there are.
    x, (logp, entropy) = x.cpu(), noted.cpu()
    of = places // x.shape[1]
    for i, (track, mine) in enumerate(zip(tracks, movers, strict=True)):
        track.x, track.settled = x[i].clone(), track.settled | mine
        track.logprobs[mine] = logp[of == i]
        track.entropy = float(entropy[of == i].mean())
        track.calls, track.rows = track.calls + 1, track.rows + int(mine.sum())
        if generator.config.absorbing:
            track.free = track.free & ~mine


def _tokens(
    generator: Generator,
    hidden: Tensor,
    at: Tensor,
    state: tuple[Tensor, Tensor],
    chance: tuple[Tensor, float, str, bool],
    shaping: Shaping,
) -> tuple[Tensor, Tensor, Tensor]:
    """Next tokens of rows (N, D) at positions (N,), their log p under the model, and its entropy.

    Args:
        generator: its head is asked.
        hidden: what is drawn from.
        at: where, of the B L positions.
        state: tokens and which of them are settled, both (B, L).
        chance: u (N,), the mover probability, the step rule, and whether the entropy is wanted.
        shaping: of the sequences.
    """
    (x, settled), (u, a, step, paced), size = state, chance, generator.config.vocab_size
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    some = max(1, LOGITS_AT_ONCE // size)
    for start in range(0, len(at), some):
        part = slice(start, start + some)
        logits = generator.engine.head(hidden[part])[:, :size].to(x.device).float()
        now = x.view(-1)[at[part]]
        p = shaping.posterior(logits, at[part], x, settled)
        token = draw(STEP_RULES[step].land(p, now, p.new_full((len(p),), a)), u[part])
        total = logits.logsumexp(-1)
        logp = logits.gather(1, token[:, None])[:, 0] - total
        spread = total - ((logits - total[:, None]).exp() * logits).sum(-1) if paced else total
        found.append((token, logp, spread))
    token, logp, spread = (torch.cat(parts) for parts in zip(*found, strict=True))
    return token, logp, spread


def _uniform(count: int, track: Track) -> Tensor:
    return torch.rand(count, dtype=torch.float64, generator=track.noise)


def start(generator: Generator, noise: torch.Generator, length: int) -> Tensor:
    """x_0, int64, shape (L,): noise of the model's source."""
    config = generator.config
    source = make_source(config.source, config.vocab_size, absorbing=config.absorbing)
    return source.draw((length,), noise)
