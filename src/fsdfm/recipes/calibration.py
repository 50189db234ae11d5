"""What a network is shown while it is rounded or pruned: training text, masked as in training."""

from __future__ import annotations

import torch

from fsdfm.core.errors import ConfigError
from fsdfm.model.config import ModelConfig
from fsdfm.model.rounding import Example
from fsdfm.recipes.training import objective_parts
from fsdfm.text.store import TokenSplit
from fsdfm.train.objective import Pretrain, known_at_random

SEQUENCES, LENGTH, BATCH = 96, 256, 8
FROZEN_SHARE = 1 / 3


def examples(split: TokenSplit, config: ModelConfig, sequences: int = SEQUENCES) -> list[Example]:
    """Batches of BATCH sequences, at times uniform over [0, 1), a third with frozen parts.

    Raises:
        ConfigError: a network that never meets a mask.
        DataError: data that is too short.
    """
    if config.left_to_right:
        raise ConfigError(
            "The model predicts the next token alone (attention=causal): only flow models are "
            "pruned or calibrated."
        )
    source, schedule = objective_parts(config)
    objective = Pretrain(source, schedule, frozen_share=FROZEN_SHARE)
    generator, found = torch.Generator().manual_seed(0), []
    length = min(LENGTH, config.context_length)
    for step in range(sequences // BATCH):
        x_1 = split.batch(step, batch_size=BATCH, length=length, seed=0)
        batch = objective.batch(x_1, generator)
        known = known_at_random(BATCH, length, generator)
        if source.absorbing:
            known |= batch.x_t != source.vocab_size
        found.append(Example(x_1, batch.x_t, batch.t, batch.places, known))
    return found
