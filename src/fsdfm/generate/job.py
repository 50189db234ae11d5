"""A request from its layout to its result, as the tasks that it wants done in between.

Shapes: L positions, V data tokens.
"""

from __future__ import annotations

import time
from collections.abc import Generator as Asks
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fsdfm.core.errors import ConfigError
from fsdfm.flow.controls import Bans, Controls
from fsdfm.flow.grid import GRIDS
from fsdfm.generate.attempt import Attempt, windows
from fsdfm.generate.layout import Composed, Layout, compose, ending, lay_out
from fsdfm.generate.lengths import choose_lengths
from fsdfm.generate.request import Request, Result
from fsdfm.generate.template import Gap
from fsdfm.generate.track import Probe, Task, Track, start
from fsdfm.generate.words import (
    Place,
    banned_tokens,
    bans,
    choose,
    offenders,
    phrases,
    with_room,
)
from fsdfm.text.tokenizer import HALF

if TYPE_CHECKING:
    from fsdfm.generate.generator import Generator

PACE = 0.5
"""Nats a position that a call of steps "auto" may draw: an eighth of a text of 4 nats a token."""
BOUND = 4
"""Calls that steps "auto" may take, as a multiple of the model's own steps."""
REPAIRS = 64
"""Calls that may be spent to write a text without the banned phrases, before blanks are set."""
LATEST_REPAIR = 0.95
"""Time that a model is told for a text of which one token is missing, at the latest."""


class Job:
    """A request on its way.

    Args:
        generator: the model.
        request: what is wanted.

    Raises:
        ConfigError: it cannot be done by this model.
    """

    def __init__(self, generator: Generator, request: Request) -> None:
        self.generator, self.request = generator, request
        self.sampling = request.sampling(generator.defaults)
        generator.posterior(self.sampling)
        layout = lay_out(request, generator)
        self.end = ending(request, layout)
        self.phrases = phrases(request, layout, generator)
        self.layout = with_room(self.phrases, layout, generator.config.context_length)
        self.banned = banned_tokens(request, generator)
        self._check()
        self.began: float | None = None
        self.calls = 0
        """Of what is no text: looks for lengths and places, and repairs."""
        self.attempts: list[Attempt] = []
        self.waiting: list[Task] = []
        self.result: Result | None = None
        self._work = self._run()
        self.proceed()

    def _check(self) -> None:
        """Refuse what cannot be, before anything is begun."""
        request, layout = self.request, self.layout
        if request.stop and not layout.open:
            raise ConfigError("stop needs a text that ends in a gap: leave it out.", "stop")
        if self.phrases and layout.shortest > self.generator.config.context_length:
            raise ConfigError(
                "require needs a text that fits into the model's context: give a smaller length.",
                "require",
                "length",
            )
        anywhere = [Place(0, phrase) for phrase in self.phrases]
        bans(self.banned, layout, self.generator, anywhere, self.end)

    def proceed(self) -> None:
        """Go on, once all that it waits for is done."""
        try:
            self.waiting = [task for task in next(self._work) if not task.done]
        except StopIteration as stop:
            self.waiting, self.result = [], stop.value

    def started(self) -> None:
        """Its time runs from its first call."""
        if self.began is None:
            self.began = time.perf_counter()

    @property
    def planned(self) -> tuple[int, int]:
        """Steps that its texts have taken, of those that they are to take as far as is known."""
        plans = [attempt.planned for attempt in self.attempts]
        return sum(done for done, _ in plans), max(1, sum(total for _, total in plans))

    def draft(self) -> Composed:
        """The text as it stands; masked positions are left out."""
        if not self.attempts:
            return Composed("", [], 0, "cancelled")
        return self._composed(self.attempts[0])

    def settled(self) -> Composed:
        """The beginning of the text that no later call changes, with the spans of it."""
        nothing = Composed("", [], 0, "length")
        if len(self.attempts) != 1 or self.request.ban:  # the likeliest is chosen; drawn anew
            return nothing
        attempt, mask = self.attempts[0], self.generator.config.vocab_size
        shown = attempt.kept if self.generator.config.absorbing else attempt.upto
        ids = attempt.now(mask)
        ids = ids[:shown] + [mask] * (len(ids) - shown)
        composed = self._composed(attempt, ids)
        if composed.finish == "stop" and shown < len(ids):
            return self._unless_longer(attempt, ids, composed)
        if composed.finish != "length":
            return composed
        gaps = (
            place
            for piece, place in zip(attempt.layout.pieces, attempt.layout.places(), strict=True)
            if isinstance(piece, Gap)
        )
        for number, (_, last) in enumerate(gaps):
            if last > shown:  # the first gap that is not whole
                spans = composed.spans[: number + 1]
                first, end = spans[-1]
                end = max(first, end - max(map(len, self.request.stop), default=1) + 1)
                end = first + len(composed.text[first:end].rstrip(HALF))  # of a character
                spans[-1] = first, end
                return Composed(composed.text[:end], spans, shown, "length")
        return composed

    def _unless_longer(self, attempt: Attempt, ids: list[int], stopped: Composed) -> Composed:
        """A text up to its stop string, or to where a longer one may have begun before it."""
        whole = self._composed(attempt, ids, stop=())
        if whole.finish == "end":
            return stopped
        first, last = stopped.spans[-1]
        longest = max(map(len, self.request.stop))
        begun = (
            at
            for at in range(max(first, len(whole.text) - longest + 1), last)
            if any(stop.startswith(whole.text[at:]) for stop in self.request.stop)
        )
        if (at := next(begun, None)) is None:
            return stopped
        return replace(
            stopped,
            text=stopped.text[:at],
            spans=[*stopped.spans[:-1], (first, at)],
            finish="length",
        )

    def cancelled(self) -> Result:
        """What there is, if nobody wants more."""
        self._work.close()
        self.waiting = []
        composed = replace(self.draft(), finish="cancelled")
        if not self.attempts:
            return self._result(composed, [], [], 0, self.request.seed)
        mask = self.generator.config.vocab_size
        ids = self.attempts[0].now(mask)
        ids = [i for i in ids[: composed.tokens] if i < mask]
        return self._result(composed, ids, [None] * len(ids), 0, self.attempts[0].seed)

    def _run(self) -> Asks[list[Task], None, Result]:
        request, context = self.request, self.generator.config.context_length
        layout, spent = yield from choose_lengths(self.generator, self.layout, request)
        self.calls += spent
        begun = []
        for seed in range(request.seed, request.seed + request.best_of):
            begun.append((yield from self._attempt(layout, seed)))
        self.attempts = begun
        for window in windows(layout.shortest, context):
            going = [attempt for attempt in begun if not attempt.ended]
            for attempt in going:
                attempt.begin(window, self._track(attempt, window))
            yield [attempt.track for attempt in going if attempt.track is not None]
            for attempt in going:
                attempt.finish()
                yield from self._repair(attempt, window)
                attempt.ended = self._composed(attempt).finish != "length"
        results = [self._finished(attempt) for attempt in begun]
        return max(results, key=lambda result: (result.written, result.score))

    def _attempt(self, layout: Layout, seed: int) -> Asks[list[Task], None, Attempt]:
        """A text that has not been begun; its required phrases have their places."""
        config, kept = self.generator.config, 1.0 - self.request.strength
        noise = torch.Generator().manual_seed(seed)
        given, fresh = layout.tokens()
        x = torch.where(fresh, start(self.generator, noise, len(given)), given)
        free, places = fresh, []
        if kept > 0.0:
            stays = fresh & (torch.rand(len(x), dtype=torch.float64, generator=noise) < kept)
            x = torch.where(stays, given, x)
            free = fresh & ~stays if config.absorbing else fresh
        if self.phrases:
            rows: list[Tensor] = []
            probe = Probe(x, 0.0, 1.0, torch.arange(len(x)), ~fresh, rows.append)
            yield [probe]
            self.calls += probe.calls
            places = choose(self.phrases, rows[0], fresh, self.sampling.temperature, seed)
            for place in places:
                where = slice(place.first, place.first + len(place.ids))
                x[where], free[where] = torch.tensor(place.ids), False
        banned = bans(self.banned, layout, self.generator, places, self.end)
        return Attempt(seed, layout, places, noise, x, free, banned)

    def _track(self, attempt: Attempt, window: tuple[int, int]) -> Track:
        """A track over a window of the text."""
        config, how = self.generator.config, self.sampling
        auto = self.request.steps == "auto"
        steps = how.steps * BOUND if auto else how.steps
        began = (1.0 - self.request.strength) ** (1.0 / config.schedule_power)
        return Track(
            x=attempt.x[slice(*window)].clone(),
            free=attempt.free[slice(*window)].clone(),
            times=[began + (1.0 - began) * t for t in GRIDS[how.grid](steps).tolist()],
            sampling=how,
            controls=self._controls(attempt.bans, window),
            noise=attempt.noise,
            pace=PACE if auto else None,
        )

    def _controls(self, banned: Bans | None, window: tuple[int, int]) -> Controls:
        return self.sampling.controls(None if banned is None else banned.within(*window))

    def _repair(self, attempt: Attempt, window: tuple[int, int]) -> Asks[list[Task], None, None]:
        """Draw anew what makes a banned phrase, one token a call, until there is none."""
        tokenizer, size = self.generator.tokenizer, self.generator.config.vocab_size
        for round_ in range(REPAIRS * 2 if self.request.ban else 0):
            composed = self._composed(attempt)
            bad = offenders(composed.text, composed.spans, self.request.ban)
            found = (attempt.culprit(self.generator, composed, where) for where in bad)
            position = next((each for each in found if each is not None), None)
            if position is None:
                return
            if round_ >= REPAIRS:  # no draw got rid of it: a blank or a full stop does
                attempt.x[position] = tokenizer.encode(" ."[round_ % 2])[0]
                continue
            attempt.ban(position, int(attempt.x[position]), size)
            attempt.ban(position, tokenizer.eos_id, size)
            again = self._again(attempt, position, window)
            yield [again]
            attempt.take(again, window)
            attempt.steps += again.step
            self.calls += again.calls

    def _again(self, attempt: Attempt, position: int, window: tuple[int, int]) -> Track:
        """A track that draws one position of a finished window."""
        first, last = window
        x, free = attempt.x[first:last].clone(), torch.zeros(last - first, dtype=torch.bool)
        x[position - first] = start(self.generator, attempt.noise, 1)[0]
        free[position - first] = True
        power = self.generator.config.schedule_power
        t = min(LATEST_REPAIR, (1.0 - 1.0 / len(x)) ** (1.0 / power))
        controls = self._controls(attempt.bans, window)
        return Track(x, free, [t, 1.0], self.sampling, controls, attempt.noise)

    def _composed(
        self, attempt: Attempt, ids: list[int] | None = None, stop: Sequence[str] | None = None
    ) -> Composed:
        """The text of an attempt as it stands, or of other tokens, or with other stop strings."""
        first = attempt.layout.places()[-1][0]
        ends = (place.first + len(place.ids) for place in attempt.places)
        earliest = max(first + attempt.layout.least, *ends, 0)
        how = (self.end, self.request.stop if stop is None else stop, earliest)
        ids = attempt.now(self.generator.config.vocab_size) if ids is None else ids
        return compose(attempt.layout, ids, self.generator, how)

    def _finished(self, attempt: Attempt) -> Result:
        ids = attempt.now(self.generator.config.vocab_size)
        composed = self._composed(attempt, ids)
        logprobs = [None if x != x else x for x in attempt.logprobs.tolist()]
        written = int((~attempt.free & attempt.fresh).sum())
        kept = composed.tokens
        return self._result(composed, ids[:kept], logprobs[:kept], written, attempt.seed)

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
            calls=self.calls + sum(attempt.calls for attempt in self.attempts),
            seed=seed,
            seconds=0.0 if self.began is None else time.perf_counter() - self.began,
        )
