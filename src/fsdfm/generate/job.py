"""A request from its layout to its result, as the tasks that it wants done in between.

Shapes: L positions, V data tokens.
"""

from __future__ import annotations

import time
from collections.abc import Generator as Asks
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fsdfm.core.errors import ConfigError
from fsdfm.flow.controls import Bans, Controls
from fsdfm.flow.grid import GRIDS
from fsdfm.generate.layout import Composed, Layout, compose, ending, lay_out
from fsdfm.generate.lengths import choose_lengths
from fsdfm.generate.options import GREEDY_BELOW
from fsdfm.generate.request import Request, Result
from fsdfm.generate.template import Gap
from fsdfm.generate.track import Probe, Task, Track, start
from fsdfm.generate.words import Place, bans, check_room, choose, offenders, phrases, with_pair

if TYPE_CHECKING:
    from fsdfm.generate.generator import Generator

PACE = 0.5
"""Nats a position that a call of steps "auto" may draw: an eighth of a text of 4 nats a token."""
BOUND = 4
"""Calls that steps "auto" may take, as a multiple of the model's own steps."""
REPAIRS = 64
"""Calls that may be spent to write a text without the banned phrases, before blanks are set."""
OVERLAP = 4
"""A block of a text longer than the context starts with the last 1 / OVERLAP of the one before."""
LATEST_REPAIR = 0.95
"""Time that a model is told for a text of which few tokens are missing."""


@dataclass(eq=False, slots=True)
class Attempt:
    """One text of a request on its way."""

    seed: int
    layout: Layout
    track: Track
    places: list[Place]


class Job:
    """A request on its way.

    Args:
        generator: the model.
        request: what is wanted.

    Raises:
        ConfigError: it cannot be done by this model.
        DataError: a text of it that is not Unicode.
    """

    def __init__(self, generator: Generator, request: Request) -> None:
        self.generator, self.request = generator, request
        self.sampling = request.sampling(generator.defaults)
        generator.check(self.sampling)
        self.layout = lay_out(request, generator)
        self.end = ending(request, self.layout)
        if request.stop and not self.layout.open:
            raise ConfigError("stop needs a text that ends in a gap: leave it out.", "stop")
        self.phrases = phrases(request, generator)
        longest = self.layout
        for number, piece in enumerate(longest.pieces):
            if isinstance(piece, Gap):
                longest = longest.with_length(number, piece.high)
        check_room(self.phrases, longest)
        bans(request, longest, generator, [], self.end)
        self.began = time.perf_counter()
        self.calls = 0
        self.attempts: list[Attempt] = []
        self.before: list[tuple[list[int], list[float], list[bool]]] = []
        self.waiting: list[Task] = []
        self._work = self._run()
        self.result: Result | None = None
        self.proceed()

    def proceed(self) -> None:
        """Go on, once all that it waits for is done."""
        try:
            self.waiting = [task for task in next(self._work) if not task.done]
        except StopIteration as stop:
            self.waiting, self.result = [], stop.value

    @property
    def planned(self) -> tuple[int, int]:
        """Steps that are done of those that its texts are to take, as far as is known."""
        tracks = [attempt.track for attempt in self.attempts]
        done = sum(track.step for track in tracks)
        return done, max(sum(len(track.times) - 1 for track in tracks), done, 1)

    def draft(self) -> Composed:
        """The text as it stands; masked positions are left out."""
        if not self.attempts:
            return Composed("", [], 0, "cancelled")
        attempt = self.attempts[0]
        return self._composed(attempt)

    def cancelled(self) -> Result:
        """What there is, if nobody wants more."""
        self._work.close()
        self.waiting = []
        if not self.attempts:
            return self._result(Composed("", [], 0, "cancelled"), [], [], 0, self.request.seed)
        attempt = self.attempts[0]
        found = replace(self._composed(attempt), finish="cancelled")
        x = [i for i in attempt.track.x.tolist() if i < self.generator.config.vocab_size]
        return self._result(found, x, [None] * len(x), 0, attempt.seed)

    def _run(self) -> Asks[list[Task], None, Result]:
        request = self.request
        layout, spent = yield from choose_lengths(self.generator, self.layout, request)
        self.calls += spent
        seeds = range(request.seed, request.seed + request.best_of)
        attempts = []
        for seed in seeds:
            attempts.append((yield from self._attempt(layout, seed)))
        self.attempts = attempts
        yield [attempt.track for attempt in self.attempts]
        for attempt in self.attempts:
            yield from self._repair(attempt)
        results = [self._finished(attempt) for attempt in self.attempts]
        calls = self.calls + sum(attempt.track.calls for attempt in self.attempts)
        return replace(max(results, key=lambda result: result.score), calls=calls)

    def _attempt(self, layout: Layout, seed: int) -> Asks[list[Task], None, Attempt]:
        """A text that has not been begun; its required phrases have their places."""
        noise = torch.Generator().manual_seed(seed)
        given, free = layout.tokens()
        x = torch.where(free, start(self.generator, noise, len(given)), given)
        places: list[Place] = []
        if self.phrases:
            rows: list[Tensor] = []
            probe = Probe(x, 0.0, 1.0, torch.arange(len(x)), rows.append)
            yield [probe]
            self.calls += probe.calls
            temperature = self.sampling.temperature
            places = choose(self.phrases, rows[0], free, temperature, seed)
            for place in places:
                where = slice(place.first, place.first + len(place.ids))
                x[where], free[where] = torch.tensor(place.ids), False
        track = self._track(layout, x, free, noise, places)
        return Attempt(seed, layout, track, places)

    def _track(
        self,
        layout: Layout,
        x: Tensor,
        free: Tensor,
        noise: torch.Generator,
        places: list[Place],
    ) -> Track:
        config, request, how = self.generator.config, self.request, self.sampling
        steps = how.steps * BOUND if request.steps == "auto" else how.steps
        times, began = GRIDS[how.grid](steps), 0.0
        if request.strength < 1.0:
            kept = 1.0 - request.strength
            began = kept ** (1.0 / config.schedule_power)
            u = torch.rand(len(x), dtype=torch.float64, generator=noise)
            stays = free & (u < kept)
            x = torch.where(stays, layout.tokens()[0], x)
            free = free & ~stays if config.absorbing else free
        return Track(
            x=x,
            free=free,
            times=[began + (1.0 - began) * t for t in times.tolist()],
            sampling=how,
            controls=self._controls(bans(request, layout, self.generator, places, self.end)),
            noise=noise,
            pace=PACE if request.steps == "auto" else None,
        )

    def _controls(self, banned: Bans | None) -> Controls:
        how = self.sampling
        return Controls(
            temperature=0.0 if how.temperature < GREEDY_BELOW else how.temperature,
            top_p=how.top_p,
            top_k=how.top_k,
            min_p=how.min_p,
            repetition_penalty=how.repetition_penalty,
            bans=banned,
        )

    def _repair(self, attempt: Attempt) -> Asks[list[Task], None, None]:
        """Draw anew what makes a banned phrase, one token a call, until there is none."""
        track, size = attempt.track, self.generator.config.vocab_size
        if not self.request.ban:
            return
        for round_ in range(REPAIRS * 2):
            composed = self._composed(attempt)
            bad = offenders(composed.text, composed.spans, self.request.ban)
            position = self._culprit(attempt, composed, bad[0]) if bad else None
            if position is None:
                return
            if round_ >= REPAIRS:  # no draw got rid of it: a blank or a full stop does
                blank = self.generator.tokenizer.encode(" ."[round_ % 2])
                track.x[position] = blank[0]
                continue
            pair = (position, int(track.x[position]))
            eos = (position, self.generator.tokenizer.eos_id)
            banned = with_pair(track.controls.bans, (pair, eos), size, len(track.x))
            power = self.generator.config.schedule_power
            t = min(LATEST_REPAIR, (1.0 - 1.0 / len(track.x)) ** (1.0 / power))
            x = track.x.clone()
            x[position] = start(self.generator, track.noise, 1)[0]
            free = torch.zeros_like(track.free)
            free[position] = True
            controls = replace(track.controls, bans=banned)
            again = Track(x, free, [t, 1.0], self.sampling, controls, track.noise)
            yield [again]
            track.x, track.controls = again.x, controls
            track.logprobs[position] = again.logprobs[position]
            self.calls += again.calls

    def _culprit(self, attempt: Attempt, composed: Composed, where: tuple[int, int]) -> int | None:
        """The last position that was drawn of those that make characters of a text."""
        track = attempt.track
        free = track.fresh.tolist()
        ids = track.x.tolist()
        edges = attempt.layout.places()
        spans = iter(composed.spans)
        found = None
        for piece, (first, last) in zip(attempt.layout.pieces, edges, strict=True):
            if not isinstance(piece, Gap):
                continue
            begin, end = next(spans)
            if not (where[0] < end and where[1] > begin):
                continue
            for position in range(first, last):
                head = begin + len(self.generator.decode(ids[first:position]))
                tail = begin + len(self.generator.decode(ids[first : position + 1]))
                if head < where[1] and tail > where[0] and free[position]:
                    found = position
        return found

    def _composed(self, attempt: Attempt) -> Composed:
        places = attempt.places
        earliest = max((place.first + len(place.ids) for place in places), default=0)
        how = (self.end, self.request.stop, earliest)
        return compose(attempt.layout, attempt.track.x.tolist(), self.generator, how)

    def _finished(self, attempt: Attempt) -> Result:
        track, composed = attempt.track, self._composed(attempt)
        kept = composed.tokens
        logprobs = [None if x != x else x for x in track.logprobs[:kept].tolist()]
        ids = track.x[:kept].tolist()
        return self._result(composed, ids, logprobs, int(track.fresh.sum()), attempt.seed)

    def _result(
        self,
        composed: Composed,
        ids: list[int],
        logprobs: list[float | None],
        tokens: int,
        seed: int,
    ) -> Result:
        return Result(
            id=self.request.id,
            text=composed.text,
            spans=composed.spans,
            token_ids=ids,
            logprobs=logprobs,
            finish=composed.finish,
            tokens=tokens,
            calls=self.calls + sum(attempt.track.calls for attempt in self.attempts),
            seed=seed,
            seconds=time.perf_counter() - self.began,
        )
