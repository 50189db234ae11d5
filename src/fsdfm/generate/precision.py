"""Number formats of the matrix products of generation, by name."""

from __future__ import annotations

import torch

from fsdfm.core.device import has_tiles, preferred_dtype
from fsdfm.core.errors import ConfigError
from fsdfm.model.config import ModelConfig
from fsdfm.model.int8 import has_int8

PRECISIONS: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
"""Formats of the matrix products of generation, by name."""


def pick_dtype(precision: str | None, device: torch.device, config: ModelConfig) -> torch.dtype:
    """The format asked for by name, or the fastest that costs next to nothing.

    That is 8 bits for a network whose kind takes them, on a CPU that has them and no AMX; else
    bfloat16 where it is fast; else float32.

    Raises:
        ConfigError: no such format, or one that this device is not fast in and has no fallback for.
    """
    if precision is None:
        worth_it = config.takes_8_bits and device.type == "cpu" and not has_tiles()
        return torch.int8 if worth_it and has_int8() else preferred_dtype(device)
    if precision not in PRECISIONS:
        raise ConfigError(
            f"precision must be one of {', '.join(PRECISIONS)}, got {str(precision)!r}.",
            "precision",
        )
    if precision == "int8" and not (device.type == "cpu" and has_int8()):
        raise ConfigError(
            "precision int8 needs a CPU with AVX512-VNNI or AMX, and oneDNN in PyTorch: "
            "leave it out.",
            "precision",
        )
    return PRECISIONS[precision]
