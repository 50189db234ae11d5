"""Pruning a trained model by what training text asks of it."""

from __future__ import annotations

from pathlib import Path

import torch

from fsdfm.core.device import preferred_dtype
from fsdfm.core.errors import ConfigError
from fsdfm.core.progress import Work, untold
from fsdfm.model.causal import CausalNetwork
from fsdfm.model.io.causal_lm import asked_layers
from fsdfm.model.io.pretrained import load_pretrained, save_pretrained
from fsdfm.model.pruning import prunable, pruned
from fsdfm.recipes.calibration import LENGTH, examples
from fsdfm.recipes.depth import missed_most
from fsdfm.recipes.directory import made
from fsdfm.recipes.training import same_tokenizer
from fsdfm.text.store import TokenStore

SEQUENCES, CHOOSING = 192, 16
"""Sequences to prune by, and to choose layers by."""


def prune(
    model: str | Path,
    out: Path,
    data: Path,
    *,
    layers: str | None = None,
    mlp_size: int | None = None,
    work: Work = untold,
) -> CausalNetwork:
    """Write a model directory with fewer layers or neurons; the model is left as it is.

    A student that is told its step size is looked at with the smallest alone: prune its teacher.

    Args:
        model: model or run directory of a flow model from `fsdfm adapt`.
        out: model directory to write.
        data: directory of `fsdfm prepare` with its tokenizer; its training split is looked at.
        layers: how many stay, which are then those that are missed most (`fsdfm.recipes.depth`),
            or their list; None: all.
        mlp_size: neurons that each block keeps; None: all.
        work: told of the choice of layers, and of the pruning.

    Returns:
        The network that was written.

    Raises:
        DataError: data that is missing, damaged, or too short.
        ConfigError: data of another tokenizer, nothing to prune, or a model, layers or size that
            cannot be.
        CheckpointError: no such model, or `out` is the model, a run, or cannot be written.
    """
    whole = load_pretrained(model)
    network = prunable(whole.model, mlp_size)
    config = network.config
    store = TokenStore.open(data)
    same_tokenizer(whole, Path(model), store, data)
    stay = asked_layers(config.blocks, layers)
    if stay == tuple(range(config.blocks)) and mlp_size in (None, config.mlp_size):
        raise ConfigError(f"Nothing to prune in {model}: ask for fewer layers or neurons.")
    batches = examples(store.train, config, SEQUENCES)
    made(out, model)
    if isinstance(stay, int):
        length = min(LENGTH, config.context_length)
        x_1 = store.train.batch(0, batch_size=CHOOSING, length=length, seed=0)
        stay = missed_most(network, x_1, stay, work)
    dtype = preferred_dtype(torch.device("cpu"))
    with work("pruning") as progress:
        small = pruned(
            network, batches, layers=stay, mlp_size=mlp_size, dtype=dtype, progress=progress
        )
    save_pretrained(
        out,
        small,
        tokenizer_json=whole.tokenizer_json,
        generation=whole.generation,
        ancestors=whole.ancestors,
    )
    return small
