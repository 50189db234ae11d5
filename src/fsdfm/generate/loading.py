"""A generator from a model directory."""

from __future__ import annotations

from pathlib import Path

import torch

from fsdfm.core.device import give_back_memory, pick_device
from fsdfm.core.errors import ConfigError
from fsdfm.generate.generator import Generator
from fsdfm.model.io.adapter import add_adapter
from fsdfm.model.io.directory import bundled
from fsdfm.model.io.pretrained import Pretrained, load_pretrained
from fsdfm.text.tokenizer import Tokenizer


def load(
    model: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    device: str | torch.device | None = None,
    precision: str | None = None,
) -> Generator:
    """Load a model to generate text with.

    Args:
        model: a model directory, a run directory of `pretrain` or `distill`, or `org/name` on the
            Hugging Face Hub. None, or `bundled` where there is no such directory, takes the model
            that comes with the package.
        adapter: a run directory of a training with `lora`, whose weights are added.
        device: where to run; cuda if there is one, else mps, else cpu.
        precision: of the matrix products: float32, bfloat16 or int8. None: int8 for adapted models
            on CPUs with VNNI and no AMX, else bfloat16 where it is fast, else float32.

    Raises:
        CheckpointError: the model is missing, damaged, or not one of ours; or the adapter is, or is
            another model's.
        ConfigError: the device or the precision cannot be used, or the model is a language model.
    """
    generator = load_with_network(model, adapter=adapter, device=device, precision=precision)[0]
    give_back_memory()  # the network's float32 matrices are free by now
    return generator


def load_with_network(
    model: str | Path | None = None,
    *,
    adapter: str | Path | None = None,
    device: str | torch.device | None = None,
    precision: str | None = None,
) -> tuple[Generator, Pretrained]:
    """As `load`, and what the directory holds: the network in float32, which a generator drops."""
    place = pick_device(device)
    found = load_pretrained(bundled() if model is None else model, device=place)
    if found.model.config.left_to_right:
        raise ConfigError(
            f"{model} predicts the next token alone (attention=causal) and writes in no few calls: "
            "draw its texts with fsdfm baseline ar."
        )
    if adapter is not None:
        add_adapter(found.model, adapter)
    generator = Generator(
        found.model,
        Tokenizer.from_json(found.tokenizer_json),
        defaults=found.generation,
        device=place,
        precision=precision,
        ancestors=found.ancestors,
    )
    return generator, found
