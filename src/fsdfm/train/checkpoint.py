"""Exact resume: everything that a later update depends on, in one safetensors file.

Random numbers and batches are functions of (seed, step), so the step is all there is to know about
them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Generic

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fsdfm.core.errors import CheckpointError
from fsdfm.core.files import digest, one_line, real, replacing, tensor_bytes
from fsdfm.core.tensors import UNKNOWN, write_tensors
from fsdfm.train.ema import Ema, Module
from fsdfm.train.optim import MOMENTS, Optimizer
from fsdfm.train.parallel import like, whole


@dataclass
class TrainState(Generic[Module]):
    """What a run carries from one update to the next."""

    model: Module
    ema: Ema[Module]
    optimizer: Optimizer
    step: int = 0
    """Updates done."""
    elapsed_seconds: float = 0.0
    """Spent on these updates, over all sessions."""
    pending: dict[str, list[Tensor]] = field(default_factory=dict)
    """What the objective returned, pass by pass, since the last line of metrics; on the device.
    `skipped` says of each update whether it was: 1, or 0."""
    skipped: int = 0
    """Updates that were skipped until the last line of metrics, as they were not finite."""
    skipped_in_a_row: int = 0
    """Of these, the last ones without a good one in between."""


def save_checkpoint(path: Path | None, state: TrainState[Module]) -> None:
    """Write the state to a file that is either the old one or the whole new one.

    Tensors are written one after the other. Of a sharded state every process must ask: each tensor
    is gathered for that moment.

    Args:
        path: the file; None in a process that writes nothing.
        state: is left as it is.

    Raises:
        CheckpointError: the file cannot be written (no space, no permission); the old one is kept.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter, average in _trained(state):
        tensors |= {f"model.{name}": parameter, f"ema.{name}": average}
        for moment, value in state.optimizer.moments(parameter).items():
            tensors[f"{moment}.{name}"] = value
    tensors |= {f"pending.{name}": torch.stack(values) for name, values in state.pending.items()}
    names = sorted(tensors)
    found = (whole(tensors[name].detach()) for name in names)
    if path is None:
        for _ in found:
            pass
        return
    facts: dict[str, Any] = {
        "step": state.step,
        "ema_updates": state.ema.updates,
        "elapsed_seconds": state.elapsed_seconds,
        "skipped": state.skipped,
        "skipped_in_a_row": state.skipped_in_a_row,
    }
    shapes = {name: (tensors[name].dtype, tensors[name].shape) for name in names}
    metadata = {"state": json.dumps({**facts, "sha256": UNKNOWN})}
    try:
        with replacing(real(path)) as partial:
            write_tensors(partial, shapes, found, metadata, _said(facts, names))
    except OSError as error:
        raise CheckpointError(
            f"Cannot write checkpoint {path} ({one_line(error)}); free some space or choose "
            f"another out, then run the same command again.",
            "out",
        ) from None


def steps_done(path: Path) -> int:
    """Updates behind a checkpoint; 0 where there is none that can be read."""
    try:
        return _steps_done(path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return 0


def _steps_done(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        return int(json.loads(file.metadata()["state"])["step"])


def set_aside(path: Path, keep: int) -> None:
    """Let a checkpoint stay when the next one takes its place, beside `keep - 1` older ones.

    Args:
        path: of the newest; it is left where it is, and also gets the name NAME-STEP.
        keep: how many may stay beside the next one; older ones are deleted.

    Raises:
        CheckpointError: it cannot be read or copied.
    """
    try:
        if keep and path.exists():
            older = path.with_name(f"{path.stem}-{_steps_done(path)}{path.suffix}")
            with replacing(older) as partial:
                try:
                    os.link(real(path), partial)
                except OSError:  # a file system without links
                    shutil.copyfile(path, partial)
        for older in _aside(path)[keep:]:
            older.unlink()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Cannot keep checkpoint {path} ({one_line(error)}); free some space, then run the "
            "same command again."
        ) from None


def _aside(path: Path) -> list[Path]:
    """Older checkpoints that stayed, the newest first."""
    found = {
        int(number): other
        for other in path.parent.glob(f"{path.stem}-*{path.suffix}")
        if (number := other.stem.removeprefix(f"{path.stem}-")).isdigit()
    }
    return [found[step] for step in sorted(found, reverse=True)]


def load_checkpoint(path: Path, state: TrainState[Module]) -> None:
    """Fill the state from a file.

    Raises:
        CheckpointError: the file is corrupt or belongs to a network of another shape.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = _verified(file)
            state.step, state.ema.updates = int(facts["step"]), int(facts["ema_updates"])
            state.elapsed_seconds = float(facts.get("elapsed_seconds", 0.0))
            state.skipped = int(facts.get("skipped", 0))
            state.skipped_in_a_row = int(facts.get("skipped_in_a_row", 0))
            with torch.no_grad():
                for name, parameter, average in _trained(state):
                    parameter.copy_(_like(file.get_tensor(f"model.{name}"), parameter))
                    average.copy_(_like(file.get_tensor(f"ema.{name}"), average))
            device = next(state.model.parameters()).device
            state.pending = {
                name.removeprefix("pending."): list(
                    file.get_tensor(name).to(device, copy=True).unbind()
                )
                for name in file.keys()  # noqa: SIM118
                if name.startswith("pending.")
            }
            skipped = state.skipped + sum(float(x) for x in state.pending.get("skipped", ()))
            if state.step > 0:
                keys = set(file.keys())
                held = {key.partition(".")[2] for key in keys if key.startswith(MOMENTS)}
                if not held:
                    raise KeyError("the state of the optimizer")
                for name, parameter in state.model.named_parameters():
                    if name not in held:
                        continue  # an objective may train a part of the network
                    moments = {
                        moment: _like(file.get_tensor(f"{moment}.{name}"), parameter)
                        for moment in MOMENTS
                        if f"{moment}.{name}" in keys
                    }
                    state.optimizer.restore(parameter, moments, state.step - int(skipped))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        missing = "it lacks " if isinstance(error, KeyError) else ""
        older = "".join(f", or put {other.name} in its place" for other in _aside(path)[:1])
        raise CheckpointError(
            f"Cannot resume from {path} ({missing}{one_line(error)}); delete it to start this run "
            f"anew{older}."
        ) from None


def load_average(path: Path, model: nn.Module) -> None:
    """Fill a network with the averages of a run; what the run did not train stays.

    Args:
        path: the run's checkpoint.
        model: of that run, as it began.

    Raises:
        CheckpointError: the file is corrupt or belongs to another network.
    """
    _load(path, model, "ema")


def load_last(path: Path, model: nn.Module) -> None:
    """Fill a network with a run's last weights instead of their average; see `load_average`."""
    _load(path, model, "model")


def _load(path: Path, model: nn.Module, kind: str) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            _verified(file)
            found = {name for name in file.keys() if name.startswith(f"{kind}.")}  # noqa: SIM118
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if f"{kind}.{name}" in found:
                        parameter.copy_(_like(file.get_tensor(f"{kind}.{name}"), parameter))
                        found.remove(f"{kind}.{name}")
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"Cannot read {path} ({one_line(error)}).") from None
    if found:
        raise CheckpointError(f"{path} belongs to another network: it has {min(found)}.")


def _said(facts: dict[str, Any], names: list[str]) -> bytes:
    """What a checkpoint says beside its tensors, for its checksum."""
    said = sorted((name, value) for name, value in facts.items() if name != "sha256")
    return json.dumps([said, names]).encode()


def _checksum(facts: dict[str, Any], names: list[str], tensor: Callable[[str], Tensor]) -> str:
    """SHA-256 of all that a checkpoint says, whatever order the file has it in."""
    return digest(chain([_said(facts, names)], tensor_bytes(map(tensor, names))))


def _verified(file: Any) -> dict[str, Any]:
    """What an open checkpoint says beside its tensors.

    Raises:
        ValueError: its bytes have changed; one of an older fsdfm has no checksum to tell by.
    """
    facts: dict[str, Any] = json.loads((file.metadata() or {}).get("state", "{}"))
    if "sha256" in facts and facts["sha256"] != _checksum(
        facts, sorted(file.keys()), file.get_tensor
    ):
        raise ValueError("its bytes have changed")
    return facts


def _trained(
    state: TrainState[Module],
) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """Parameters that training changes, and their averages; the others are those of the start."""
    averages = dict(state.ema.model.named_parameters())
    for name, parameter in state.model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter, averages[name]


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    if tensor.shape != parameter.shape:
        raise ValueError(f"shape {tuple(tensor.shape)} is not {tuple(parameter.shape)}")
    # A copy: safetensors maps the file, and what it maps goes when the file is cut short.
    return like(tensor, parameter)
