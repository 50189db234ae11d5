"""Which data a pass of a training sees, whole or cut short, and what that costs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fsdfm.core.errors import ConfigError
from fsdfm.model.config import ModelConfig
from fsdfm.recipes.cost import sequence_flops, work
from fsdfm.recipes.settings import RunSettings
from fsdfm.text.store import TokenStore
from fsdfm.train.objective import Objective
from fsdfm.train.parallel import World

SHORT_PARTS = 4
"""Sequences that one is cut into where short ones are learned beside long ones."""


def check_length(store: TokenStore, settings: RunSettings, length: int) -> None:
    """Before anything is made.

    Raises:
        DataError: a split is shorter than a sequence.
        ConfigError: short sequences are asked for, and the length has no such parts.
    """
    store.train.require(length)
    store.validation.require(length)
    if settings.short_share and length % SHORT_PARTS:
        raise ConfigError(
            f"short_share cuts sequences in {SHORT_PARTS}: choose a context_length that is a "
            f"multiple of it, got {length}.",
            "short_share",
            "context_length",
        )


def order_of(seed: int, start: str) -> int:
    """Seed of the data's order: of the run's seed and its starting weights.

    A run that goes on from another's weights would else see the same first batches again, and learn
    them by heart (LOG.md has what that costs).
    """
    return seed ^ int(start[:12], 16)


def batches(
    store: TokenStore, settings: RunSettings, length: int, seed: int, world: World
) -> Callable[[int], Tensor]:
    """This process's part of each pass: one of the even parts that follow each other."""
    size, share = world.share(settings.batch_size), settings.short_share

    def batch(index: int) -> Tensor:
        part = index * world.size + world.rank
        x_1 = store.train.batch(part, batch_size=size, length=length, seed=seed)
        # Evenly among the passes, and the same ones in each process.
        short = int((index + 1) * share) > int(index * share)
        return x_1.reshape(-1, length // SHORT_PARTS) if short else x_1

    return batch


def mean_flops(config: ModelConfig, objective: Objective, length: int, short_share: float) -> float:
    """Of training on one sequence, whole or cut, in the mean over passes."""
    done = work(objective)
    cut = SHORT_PARTS * sequence_flops(config, done, length // SHORT_PARTS)
    return short_share * cut + (1.0 - short_share) * sequence_flops(config, done, length)
