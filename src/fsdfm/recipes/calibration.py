"""What a network is shown while it is rounded or pruned: training text, masked as in training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from fsdfm.core.device import preferred_dtype
from fsdfm.core.errors import CheckpointError, ConfigError
from fsdfm.core.progress import Progress
from fsdfm.model.causal import CausalNetwork
from fsdfm.model.config import ModelConfig
from fsdfm.model.io.pretrained import Pretrained, load_pretrained, save_pretrained
from fsdfm.model.packed import Packed
from fsdfm.model.pruning import pruned
from fsdfm.model.rounding import Example, calibrated
from fsdfm.recipes.training import objective_parts, same_tokenizer
from fsdfm.text.store import TokenSplit, TokenStore
from fsdfm.train.objective import Pretrain, known_at_random

SEQUENCES, LENGTH, BATCH = 96, 256, 8
FROZEN_SHARE = 1 / 3


def rounded_on(
    trained: Pretrained,
    where: Path,
    data: Path,
    bits: Mapping[str, int],
    progress: Progress | None = None,
) -> dict[str, Packed]:
    """A model's matrices in few bits, rounded by the inputs that training text gives them.

    Args:
        trained: the model, which stays as it is.
        where: what to call it in an error.
        data: directory of `fsdfm prepare`; its training split is read.
        bits: as `save_pretrained` takes them.
        progress: as of `calibrated`.

    Raises:
        DataError: data that is missing, damaged, or too short.
        ConfigError: data of another tokenizer, or inputs that are not finite.
    """
    store = TokenStore.open(data)
    same_tokenizer(trained, where, store, data)
    batches = examples(store.train, trained.model.config)
    dtype = preferred_dtype(torch.device("cpu"))
    return calibrated(trained.model, batches, bits, dtype=dtype, progress=progress)


def prune(
    model: str | Path, out: Path, data: Path, mlp_size: int, progress: Progress | None = None
) -> CausalNetwork:
    """Write a model directory with fewer neurons in each MLP; the model is left as it is.

    Args:
        model: model or run directory of a flow model from `fsdfm adapt`.
        out: model directory to write.
        data: directory of `fsdfm prepare` with its tokenizer; its training split is looked at.
        mlp_size: neurons that each block keeps.
        progress: as of `pruned`.

    Returns:
        The network that was written.

    Raises:
        DataError: data that is missing, damaged, or too short.
        ConfigError: data of another tokenizer, or a model or size that cannot be; see `pruned`.
        CheckpointError: no such model, or `out` is the model or cannot be written.
    """
    if out.resolve() == Path(model).resolve():
        raise CheckpointError(f"{out} is the model itself: choose another place.")
    whole = load_pretrained(model)
    store = TokenStore.open(data)
    same_tokenizer(whole, Path(model), store, data)
    if whole.model.config.left_to_right:
        raise ConfigError(f"{model} predicts the next token alone: only flow models are pruned.")
    batches = examples(store.train, whole.model.config)
    dtype = preferred_dtype(torch.device("cpu"))
    small = pruned(whole.model, batches, mlp_size, dtype=dtype, progress=progress)
    save_pretrained(
        out,
        small,
        tokenizer_json=whole.tokenizer_json,
        generation=whole.generation,
        ancestors=whole.ancestors,
    )
    return small


def examples(split: TokenSplit, config: ModelConfig, sequences: int = SEQUENCES) -> list[Example]:
    """Batches of BATCH sequences, at times uniform over [0, 1), a third with frozen parts."""
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
