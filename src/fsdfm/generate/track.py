"""One sequence on its way, and one call of the network for several that can share it.

Shapes: B sequences, L positions, N movers of one call, V data tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

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
    drawn_in: Tensor = field(init=False)
    """Step in which each position was drawn last, from 1, int64, shape (L,); 0 where it was not."""
    entropy: float = math.nan
    """Mean of the rows of the last call, nats."""

    def __post_init__(self) -> None:
        self.fresh, self.settled = self.free.clone(), ~self.free
        self.logprobs = torch.full(self.x.shape, math.nan)
        self.drawn_in = torch.zeros_like(self.x)

    @property
    def done(self) -> bool:
        """Whether its time is 1."""
        return self.step == len(self.times) - 1

    @property
    def key(self) -> tuple[object, ...]:
        """Tracks of one key can share a call."""
        how = self.sampling
        return how.step, how.draws, how.seams, type(self)

    @property
    def t(self) -> float:
        """Time of its next call."""
        return self.times[self.step]

    @property
    def h(self) -> float:
        """Step size of its next call."""
        return self.times[self.step + 1] - self.times[self.step]

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
        return (type(self),)


Task = Track | Probe
Moving = tuple[Track, Tensor, Tensor, float, Tensor]
"""Who moves, bool, (L,); what decides where each lands, (N,); the chance to move; where its groups
begin, (1,)."""


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
    engine, device = generator.engine, generator.state_device
    x, known = _side_by_side([(p.x, p.known) for p in probes], device)
    rows = torch.cat([p.positions + i * x.shape[1] for i, p in enumerate(probes)]).to(device)
    hidden = engine.told(_hidden(generator, probes, x, rows), rows, x, known)
    sizes = [len(p.positions) for p in probes]
    for probe, few in zip(probes, torch.split(hidden, sizes), strict=True):
        logits = engine.head(few)[:, : generator.config.vocab_size]
        probe.read(logits.float().log_softmax(-1).cpu())
        probe.calls, probe.done = 1, True


def _advance(generator: Generator, tracks: Sequence[Track]) -> bool:
    config, schedule = generator.config, Polynomial(generator.config.schedule_power)
    moving: list[Moving] = []
    for track in tracks:
        rule, length = STEP_RULES[track.sampling.step], len(track.x)
        times = torch.tensor((track.t, track.h), dtype=torch.float64)
        a = float(rule.mover_probability(schedule, *times))
        u, offset, landing = (_uniform(n, track) for n in (length, 1, length))
        movers = MOVERS[track.sampling.movers](a, u[None], track.free[None], offset)[0]
        if bool(movers.any()):
            moving.append((track, movers, landing[movers], a, offset))
    if moving:
        _draw(generator, moving)
    for track in tracks:
        track.moved(config.schedule_power, config.absorbing)
    return bool(moving)


def _hidden(generator: Generator, tasks: Sequence[Task], x: Tensor, rows: Tensor) -> Tensor:
    """Rows of tasks whose tokens are side by side."""
    times, sizes = [(task.t, task.h) for task in tasks], [len(task.x) for task in tasks]
    t, h = zip(*times, strict=True)
    return generator.engine.hidden(x, t, h, rows, sizes)


def _side_by_side(each: Sequence[tuple[Tensor, ...]], device: torch.device) -> Iterator[Tensor]:
    """Tensors of several sequences, (L,), as (B, L of the longest); the rest of a row is 0."""
    for parts in zip(*each, strict=True):
        yield pad_sequence(list(parts), batch_first=True).to(device)


def _draw(generator: Generator, moving: list[Moving]) -> None:
    """Draw the movers of the tracks that have any, and note what was drawn."""
    tracks, movers, landings, chances, offsets = zip(*moving, strict=True)
    device, facts = generator.state_device, [(t.x, ~t.free, t.settled) for t in tracks]
    x, known, settled = _side_by_side(facts, device)
    (moves,) = _side_by_side([(each,) for each in movers], torch.device("cpu"))
    places = moves.flatten().nonzero()[:, 0]
    rows, u = send(places, device), send(torch.cat(landings), device)
    a = send(torch.tensor(chances), device)
    shaping = Shaping([track.controls for track in tracks], device)
    hidden = _hidden(generator, tracks, x, rows)
    noted = torch.zeros((2, len(rows)), device=device)
    how = tracks[0].sampling
    paced = any(track.pace is not None for track in tracks)

    def drawn(few: Tensor, now: Tensor, at: Tensor, u: Tensor) -> Tensor:
        state = now.view_as(x), settled
        token, *facts = _tokens(generator, few, at, state, (u, a, how.step, paced), shaping)
        settled.view(-1)[at] = True
        noted[:, torch.searchsorted(rows, at)] = torch.stack(facts)
        return token

    asked = Call(x, places, rows, hidden, known, u, torch.cat(offsets), drawn)
    x = x.flatten().index_copy(0, rows, generator.posterior(how).tokens(asked)).view_as(x)
    # The only two waits for the device of a call, however many tracks there are.
    x, (logp, entropy) = x.cpu(), noted.cpu()
    of = places // x.shape[1]
    for i, (track, mine) in enumerate(zip(tracks, movers, strict=True)):
        track.x, track.settled = x[i, : len(mine)].clone(), track.settled | mine
        track.logprobs[mine], track.drawn_in[mine] = logp[of == i], track.step + 1
        track.entropy = float(entropy[of == i].mean())
        track.calls, track.rows = track.calls + 1, track.rows + int(mine.sum())
        if generator.config.absorbing:
            track.free = track.free & ~mine


def _tokens(
    generator: Generator,
    hidden: Tensor,
    at: Tensor,
    state: tuple[Tensor, Tensor],
    chance: tuple[Tensor, Tensor, str, bool],
    shaping: Shaping,
) -> tuple[Tensor, Tensor, Tensor]:
    """Next tokens of rows (N, D) at positions (N,), their log p under the model, and its entropy.

    Args:
        generator: its head is asked.
        hidden: what is drawn from.
        at: where, of the B L positions.
        state: tokens and which of them are settled, both (B, L).
        chance: u (N,), the mover probabilities (B,), the step rule, and whether the entropy is
            wanted.
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
        token = draw(STEP_RULES[step].land(p, now, a[at[part] // x.shape[1]]), u[part])
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
    source = make_source(config.source, config.vocab_size)
    return source.draw((length,), noise)
