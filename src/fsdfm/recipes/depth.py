"""Which layers of a language model to keep: at each turn the one that is missed least is left out.

Nothing is trained in between. What the layers that stay lose is felt by the loss itself, so a layer
that others lean on stays wherever it is.

Shapes: B sequences, L positions.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fsdfm.core.device import pick_device, preferred_dtype
from fsdfm.core.progress import Progress, Work, untold
from fsdfm.core.workers import own_device
from fsdfm.flow.grid import SMALLEST_STEP
from fsdfm.flow.path import make_source
from fsdfm.model.causal import CausalNetwork
from fsdfm.model.io.causal_lm import CausalLm, asked_layers
from fsdfm.model.io.causal_lm import adapt as network_of
from fsdfm.recipes.directory import refuse_taken, settled
from fsdfm.recipes.settings import ADAPT_LENGTH, AdaptSettings
from fsdfm.text.store import TokenSplit
from fsdfm.train.next_token import TIME
from fsdfm.train.parallel import World

SEQUENCES = 2
"""Of ADAPT_LENGTH tokens, by which layers are chosen."""
LOOKED_AT = 8
"""Layers tried at each turn but the first: those that were missed least when last tried."""


class Probe:
    """Sequences of data in which some tokens are hidden, and what a network says of these.

    They are hidden by what its source draws in their place.

    Args:
        model: a language model's network; of one that is left to right nothing is hidden. Of any
            other, sequence k is at time (k + 1/2) / B.
        x_1: data, int64, (B, L), on its device.
    """

    def __init__(self, model: CausalNetwork, x_1: Tensor) -> None:
        self.model, self.x_1, shown = model, x_1, x_1
        count = len(x_1)
        t = torch.full((count,), TIME, device=x_1.device)
        self.hidden = torch.ones_like(x_1, dtype=torch.bool)
        if not model.config.left_to_right:
            t = (torch.arange(count, device=x_1.device) + 0.5) / count
            noise = torch.Generator().manual_seed(0)
            u = torch.rand(x_1.shape, generator=noise).to(x_1.device)
            self.hidden = u >= t[:, None]
            source = make_source(model.config.source, model.config.vocab_size)
            x_0 = source.draw(tuple(x_1.shape), noise).to(x_1.device)
            shown = torch.where(self.hidden, x_0, x_1)
        h = torch.full_like(t, SMALLEST_STEP)
        self.start, self.condition, *self.tables = model.entered(shown, t, h)

    def through(self, x: Tensor, blocks: Sequence[int]) -> Iterator[Tensor]:
        """x, and what follows each of some blocks."""
        yield x
        for number in blocks:
            x = self.model.blocks[number](x, self.condition, *self.tables)
            yield x

    def nats(self, x: Tensor, blocks: Sequence[int]) -> float:
        """Of a hidden token, after x has passed some blocks: the mean of the means of sequences."""
        *_, x = self.through(x, blocks)
        rows, means = self.model.output_layer.final(x[:, : self.x_1.shape[1]], self.condition), []
        for row, data, hidden in zip(rows, self.x_1, self.hidden, strict=True):
            if hidden.any():
                logits = self.model.head(row[hidden])[:, : self.model.config.vocab_size]
                means.append(float(F.cross_entropy(logits.float(), data[hidden])))
        return statistics.fmean(means)


@dataclass(frozen=True, slots=True)
class Depth:
    """Some layers of a network."""

    kept: tuple[int, ...]
    """Those that are there, ascending."""
    without: int | None
    """That which was left out last."""
    nats: float
    """Of a token, with the layers that are there."""


@torch.no_grad()
def left_out(
    probe: Probe, keep: int, progress: Progress | None = None, looked_at: int = LOOKED_AT
) -> Iterator[Depth]:
    """All layers, then one fewer each time, down to `keep`.

    Args:
        probe: what misses them.
        keep: how many stay, at least one.
        progress: told (label, layers left out, layers to leave out).
        looked_at: layers tried at each turn but the first.
    """
    kept = tuple(range(len(probe.model.blocks)))
    missed = dict.fromkeys(kept, 0.0)
    yield Depth(kept, None, probe.nats(probe.start, kept))
    wanted = len(kept) - keep
    for turn in range(wanted):
        tried = kept if turn == 0 else sorted(kept, key=missed.__getitem__)[:looked_at]
        before = list(probe.through(probe.start, kept))
        places = {number: place for place, number in enumerate(kept)}
        for number in tried:
            place = places[number]
            missed[number] = probe.nats(before[place], kept[place + 1 :])
        without = min(tried, key=missed.__getitem__)
        kept = tuple(number for number in kept if number != without)
        if progress is not None:
            progress("choosing layers", turn + 1, wanted)
        yield Depth(kept, without, missed[without])


@torch.no_grad()
def missed_most(
    model: CausalNetwork, x_1: Tensor, keep: int, work: Work = untold
) -> tuple[int, ...]:
    """Numbers of the layers that stay if `keep` of them do, ascending.

    Args:
        model: a network with all its layers.
        x_1: data to choose by, int64, (B, L), on its device.
        keep: how many stay, at least one.
        work: told of the work that it is.
    """
    device = x_1.device.type
    dtype = preferred_dtype(x_1.device)
    products = torch.autocast(device, dtype, enabled=dtype != torch.float32)
    with work("choosing layers") as progress, products:
        *_, last = left_out(Probe(model, x_1), keep, progress)
    return last.kept


def chosen_layers(
    settings: AdaptSettings,
    lm: CausalLm,
    token_ids: Sequence[int | None],
    start_id: int,
    data: TokenSplit,
    world: World,
    work: Work,
) -> tuple[int, ...]:
    """The layers that `settings` asks for; if by their number alone, those that are missed most.

    They are chosen by the first process, with the language model as it is; a run that goes on has
    those that it began with.

    Args:
        settings: with `layers` and `out`.
        lm: the language model.
        token_ids, start_id: see `model.io.causal_lm.adapt`.
        data: text to choose them by.
        world: the processes that train together.
        work: told of the work that it may be.

    Raises:
        ConfigError: layers that there are not.
        DataError: the data is shorter than a sequence.
    """
    count = len(lm.model.model.layers)
    asked = asked_layers(count, settings.layers)
    if not isinstance(asked, int):
        return asked
    kept = (0,) * asked
    if world.first:
        refuse_taken(settings.out)
        before = settled(settings.out, "layers")
        old = asked_layers(count, before) if isinstance(before, str) else ()
        if not isinstance(old, int) and len(old) == asked:
            kept = old
        else:
            device = pick_device(own_device(settings.device))
            network = network_of(
                lm,
                token_ids=token_ids,
                start_id=start_id,
                layers=range(count),
                source=settings.source,
                context_length=ADAPT_LENGTH,
                attention="causal",
            ).to(device)
            length = min(ADAPT_LENGTH, data.tokens)
            x_1 = data.batch(0, batch_size=SEQUENCES, length=length, seed=settings.seed)
            kept = missed_most(network, x_1.to(device), asked, work)
    return tuple(world.totals(*kept))
