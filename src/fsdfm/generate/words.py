"""Words that must not be written, and words that must: as bans and as places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fsdfm.core.errors import ConfigError
from fsdfm.flow.controls import Bans
from fsdfm.generate.layout import Layout
from fsdfm.generate.request import Request
from fsdfm.generate.template import Fixed, Gap

if TYPE_CHECKING:
    from fsdfm.generate.generator import Generator

INNER, LAST, ENDING = range(3)
"""Sets of bans: in a gap with something behind it, in the last one, and before the last required
word or the least length."""
BEHIND = 3
"""So many further is each set's twin, which holds behind a required word."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a required phrase stands."""

    first: int
    ids: tuple[int, ...]


def banned_tokens(request: Request, generator: Generator) -> Tensor:
    """Tokens that are banned or hold a banned word, bool, shape (V,).

    Raises:
        ConfigError: an id out of the vocabulary.
    """
    size = generator.config.vocab_size
    if (most := max(request.ban_ids, default=0)) >= size:
        raise ConfigError(f"ban_ids must be below {size}, got {most}.", "ban_ids")
    out = torch.zeros(size, dtype=torch.bool)
    out[list(request.ban_ids)] = True
    for token, text in enumerate(generator.pieces() if request.ban else []):
        out[token] |= any(word in text for word in request.ban)
    return out


def bans(
    out: Tensor, layout: Layout, generator: Generator, places: Sequence[Place], end: str
) -> Bans | None:
    """What the positions of a text may not take; None where they may take anything.

    Args:
        out: see `banned_tokens`.
        layout: every gap has its length.
        generator: whose vocabulary it is.
        places: of required words, which a letter may not follow.
        end: what is done at the end of a document.

    Raises:
        ConfigError: nothing is left to write.
    """
    eos = generator.tokenizer.eos_id
    sets = out.repeat(BEHIND, 1)
    sets[LAST, eos] |= end == "never"
    sets[INNER, eos] |= end != "keep"
    sets[ENDING, eos] = True
    if places:
        letters = torch.tensor([text[:1].isalnum() for text in generator.pieces()])
        sets = torch.cat([sets, sets | letters])
    if bool(sets.all(1).any()):
        raise ConfigError("ban and ban_ids leave no token to write: ban less.", "ban", "ban_ids")
    at = torch.full((sum(layout.sizes),), -1, dtype=torch.int64)
    for piece, (first, last) in zip(layout.pieces, layout.places(), strict=True):
        if isinstance(piece, Gap):
            at[first:last] = LAST if last == len(at) else INNER
    last_gap = layout.places()[-1][0]
    at[: last_gap + layout.least][at[: last_gap + layout.least] == LAST] = ENDING
    for place in places:
        at[: place.first][at[: place.first] == LAST] = ENDING
    for behind in (place.first + len(place.ids) for place in places):
        if behind < len(at) and at[behind] >= 0:
            at[behind] += BEHIND
    used = torch.unique(at[at >= 0])
    return Bans(sets, at) if bool(sets[used].any()) else None


def phrases(request: Request, layout: Layout, generator: Generator) -> list[tuple[int, ...]]:
    """Tokens of the required phrases that the given text lacks, each with a space before it.

    Returns:
        The longest first.

    Raises:
        ConfigError: a phrase that holds what is banned.
    """
    given = [piece.text for piece in layout.pieces if isinstance(piece, Fixed)]
    found = []
    for phrase in request.require:
        if any(word in phrase for word in request.ban):
            raise ConfigError(
                f"require has {phrase!r}, which ban excludes: leave one out.", "require", "ban"
            )
        if any(phrase in text for text in given):
            continue
        found.append(tuple(generator.tokenizer.encode(" " + phrase.removeprefix(" "))))
    return sorted(found, key=len, reverse=True)


def with_room(phrases: Sequence[tuple[int, ...]], layout: Layout, context: int) -> Layout:
    """The same with gaps of a free length at least as long as the required phrases need.

    Args:
        phrases: the longest first; each goes into the first gap that can take it.
        layout: gaps may be without a length.
        context: tokens that the text may have, if it has no more already.

    Raises:
        ConfigError: they do not fit.
    """
    taken = [0] * len(layout.pieces)
    for phrase in phrases:
        for number, piece in enumerate(layout.pieces):
            need = taken[number] + len(phrase)
            if isinstance(piece, Gap) and need <= layout.most(number, context):
                taken[number] = need
                layout = layout.with_least(number, need)
                break
        else:
            raise ConfigError(
                f"require has {sum(map(len, phrases))} tokens, which do not fit into the gaps: "
                "give them more room.",
                "require",
            )
    return layout


def choose(
    phrases: Sequence[tuple[int, ...]], logp: Tensor, free: Tensor, temperature: float, seed: int
) -> list[Place]:
    """Where required phrases go: where the model finds them likely, drawn with a temperature.

    Args:
        phrases: the longest first; they fit.
        logp: of every position, float32, (L, V).
        free: where they may go, bool, (L,).
        temperature: of the draw; 0 takes the likeliest place.
        seed: of the draw.
    """
    noise, runs, found = torch.Generator().manual_seed(seed), _runs(free), []
    for number, phrase in enumerate(phrases):
        starts = [i for first, last in runs for i in range(first, last - len(phrase) + 1)]
        at, score = torch.tensor(starts), torch.zeros(len(starts), dtype=torch.float64)
        for k, token in enumerate(phrase):
            score += logp[at + k, token]
        score = score.float()
        u = torch.rand(len(starts), generator=noise, dtype=torch.float64)
        score = score - temperature * (-(u.clamp_min(1e-12).log())).log()
        # Not where the others would no longer fit; at the front of some run they do.
        best, left = next(
            (place, left)
            for place in score.argsort(descending=True).tolist()
            if _fits(phrases[number + 1 :], left := _without(runs, starts[place], len(phrase)))
        )
        found.append(Place(starts[best], phrase))
        runs = left
    return found


def offenders(
    text: str, spans: Sequence[tuple[int, int]], banned: Sequence[str]
) -> list[tuple[int, int]]:
    """Where banned words stand in a text, in what was written or reaching into it."""
    found = []
    for word in banned:
        at = text.find(word)
        while at >= 0:
            last = at + len(word)
            if any(at < end and last > begin for begin, end in spans):
                found.append((at, last))
            at = text.find(word, at + 1)
    return sorted(found)


def _runs(free: Tensor) -> list[tuple[int, int]]:
    runs, first = [], None
    for i, flag in enumerate([*free.tolist(), False]):
        if flag and first is None:
            first = i
        if not flag and first is not None:
            runs.append((first, i))
            first = None
    return runs


def _without(runs: Sequence[tuple[int, int]], at: int, count: int) -> list[tuple[int, int]]:
    left = []
    for first, last in runs:
        if first <= at < last:
            left += [(first, at), (at + count, last)]
        else:
            left.append((first, last))
    return [run for run in left if run[0] < run[1]]


def _fits(phrases: Sequence[tuple[int, ...]], runs: Sequence[tuple[int, int]]) -> bool:
    """First fit, the longest first."""
    room = [last - first for first, last in runs]
    for phrase in sorted(phrases, key=len, reverse=True):
        place = next((i for i, size in enumerate(room) if size >= len(phrase)), None)
        if place is None:
            return False
        room[place] -= len(phrase)
    return True
