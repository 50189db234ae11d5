"""Exact resume: everything that a later update depends on, in one safetensors file.

Random numbers and batches are functions of (seed, step), so the step is all there is to know about
them.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fsdfm.errors import CheckpointError
from fsdfm.train.ema import Ema, Module

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainState(Generic[Module]):
    """What a run carries from one update to the next."""

    model: Module
    ema: Ema[Module]
    optimizer: torch.optim.AdamW
    step: int = 0
    """Updates done."""


def save_checkpoint(path: Path, state: TrainState[Module]) -> None:
    """Write the state to a file that is either the old one or the whole new one.

    Raises:
        CheckpointError: the file cannot be written (no space, no permission); the old one is kept.
    """
    tensors = {f"model.{name}": p for name, p in state.model.named_parameters()}
    tensors |= {f"ema.{name}": p for name, p in state.ema.model.named_parameters()}
    for name, parameter in state.model.named_parameters():
        for moment in MOMENTS:
            if parameter in state.optimizer.state:
                tensors[f"{moment}.{name}"] = state.optimizer.state[parameter][moment]
    facts = {"step": state.step, "ema_updates": state.ema.updates}
    partial = path.with_suffix(".partial")
    try:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
            partial,
            metadata={"state": json.dumps(facts)},
        )
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"Cannot write checkpoint {path} ({error}); free some space or choose another --out, "
            f"then run the same command again."
        ) from None


def load_checkpoint(path: Path, state: TrainState[Module]) -> None:
    """Fill the state from a file.

    Raises:
        CheckpointError: the file is corrupt or belongs to a network of another shape.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["state"])
            state.step, state.ema.updates = facts["step"], facts["ema_updates"]
            with torch.no_grad():
                for name, parameter in state.model.named_parameters():
                    parameter.copy_(file.get_tensor(f"model.{name}"))
                for name, parameter in state.ema.model.named_parameters():
                    parameter.copy_(file.get_tensor(f"ema.{name}"))
            if state.step > 0:
                for name, parameter in state.model.named_parameters():
                    state.optimizer.state[parameter] = {
                        "step": torch.tensor(float(state.step), device=parameter.device),
                        **{m: _like(file.get_tensor(f"{m}.{name}"), parameter) for m in MOMENTS},
                    }
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"Cannot resume from {path} ({reason}); delete it to start this run anew."
        ) from None


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    if tensor.shape != parameter.shape:
        raise ValueError(f"shape {tuple(tensor.shape)} is not {tuple(parameter.shape)}")
    return tensor.to(parameter)
