"""Published checkpoints in: a file of tensors becomes a model directory.

Read are pickled dicts of state dicts (the published .pth), one state dict under `state_dict` or on
its own, and .safetensors files. They say nothing about the network but its tensors, so its shape
is read from those; the source follows from the number of embedding rows, counted against the
tokenizer. Nothing but tensors and plain containers is ever unpickled.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fsdfm.core.errors import CheckpointError, ConfigError
from fsdfm.core.files import is_taken, one_line
from fsdfm.model.config import PRESETS, ModelConfig, Source
from fsdfm.model.io.pretrained import build, save_pretrained, vocabulary_size
from fsdfm.model.rotary import Rotary

NETWORKS = {
    "student_ema": "student_ema_model",
    "student": "student_model",
    "model": "model",
    "teacher": "teacher_model",
}
"""Key in the file by our name, best first: the default is the first that the file holds."""
UNNAMED = ("state_dict", "model_state_dict")
"""Keys of a file's only network, whichever it is; it may also be the file's whole content."""

GENERATION: Mapping[str, Any] = {"step": "exact", "temperature": 1.0, "top_p": 1.0, "steps": 8}

WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.|model\.)+")
EMBEDDING, INV_FREQ = "vocab_embed.weight", "rotary_emb.inv_freq"


def convert_published(
    path: str | Path,
    out: str | Path,
    *,
    tokenizer_json: str,
    weights: str | None = None,
    heads: int | None = None,
    context_length: int = 1024,
    generation: Mapping[str, Any] = GENERATION,
) -> ModelConfig:
    """Turn one network of a published checkpoint into a model directory.

    Args:
        path: the file: .pth or another name of PyTorch's, or .safetensors.
        out: model directory to make; it must not be there, or be empty.
        tokenizer_json: text of the tokenizer that the network was trained with (GPT-2's, for the
            published ones).
        weights: student_ema, student, model or teacher; None takes the first of them in the file,
            or the only network of a file that names none.
        heads: of the attention, for a file without `rotary_emb.inv_freq`, which tells them; None
            takes those of the published network of its shape.
        context_length: tokens in a training sequence; the file does not say.
        generation: defaults for generating that the directory will name.

    Returns:
        The network's config, as read from the shapes of its tensors.

    Raises:
        CheckpointError: no such file; not a checkpoint, truncated, or with objects other than
            tensors; tensors missing, unknown or mis-shaped; an output that is there already.
        ConfigError: the file lacks the wanted network, the tokenizer has the wrong size, or the
            number of heads is not known.
    """
    path, out = Path(path), Path(out)
    try:
        if is_taken(out):
            raise CheckpointError(f"{out} exists already: choose another output, or delete it.")
    except OSError as error:
        raise CheckpointError(f"Cannot write {out} ({one_line(error)}): choose another.") from None
    vocabulary = vocabulary_size(tokenizer_json, "The tokenizer")
    name, state = _choose(_read(path), weights, path)
    where = f"{path} ({name})" if name else str(path)
    for key, tensor in state.items():
        plain = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta)
        if not plain or not tensor.is_floating_point():
            raise CheckpointError(f"{where}: {key} is no plain tensor of floating-point numbers.")
    config = infer_config(state, vocabulary, where, heads=heads, context_length=context_length)
    if INV_FREQ in state:
        _check_frequencies(state[INV_FREQ], where)
    model = build(config, {k: v for k, v in state.items() if k != INV_FREQ}, where)
    save_pretrained(out, model, tokenizer_json=tokenizer_json, generation=generation)
    return config


def infer_config(
    state: Mapping[str, Tensor],
    vocabulary: int,
    where: str,
    *,
    heads: int | None = None,
    context_length: int = 1024,
) -> ModelConfig:
    """Read a network's shape from its tensors.

    Args:
        state: tensors by published name.
        vocabulary: ids of the tokenizer; as many embedding rows mean a uniform source, one more a
            mask source.
        where: what to call the network in an error.
        heads: of the attention; see `convert_published`.
        context_length: tokens in a training sequence.

    Raises:
        CheckpointError: tensors that say the shape are missing or no matrix.
        ConfigError: the rows fit neither source, or the heads are unknown or other than the file's.
    """
    rows, hidden_size = _shape(state, EMBEDDING, 2, where)
    cond_size, _ = _shape(state, "time_embedding.mlp.2.weight", 2, where)
    numbers = [int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key))]
    if not numbers:
        raise CheckpointError(f"{where} has no tensors of blocks.")
    blocks = max(numbers) + 1
    sources: dict[int, Source] = {vocabulary: "uniform", vocabulary + 1: "mask"}
    if rows not in sources:
        raise ConfigError(
            f"{where} has {rows} embedding rows but the tokenizer has {vocabulary} ids: a uniform "
            f"source needs {vocabulary} rows, a mask source {vocabulary + 1}; "
            "give the tokenizer that the network was trained with."
        )
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        blocks=blocks,
        heads=_heads(state, hidden_size, blocks, where, heads),
        cond_size=cond_size,
        context_length=context_length,
        source=sources[rows],
        step_embedding="raw" if any(key.startswith("dt_embedding.") for key in state) else "none",
    )


def _heads(
    state: Mapping[str, Tensor], hidden_size: int, blocks: int, where: str, given: int | None
) -> int:
    """Heads of the attention: a head has two channels for each rotary frequency."""
    if INV_FREQ in state:
        (frequencies,) = _shape(state, INV_FREQ, 1, where)
        if not frequencies or hidden_size % (2 * frequencies):
            raise CheckpointError(
                f"{where}: {frequencies} rotary frequencies do not divide a width of {hidden_size}."
            )
        found = hidden_size // (2 * frequencies)
        if given not in (None, found):
            raise ConfigError(f"{where} has {found} heads, not {given}: leave heads out.")
        return found
    shapes = {(p["hidden_size"], p["blocks"]): p["heads"] for p in PRESETS.values()}
    found = shapes.get((hidden_size, blocks), 0) if given is None else given
    if found < 1 or hidden_size % (2 * found):
        raise ConfigError(
            f"{where} has no {INV_FREQ}, which tells the number of heads: give heads that divide "
            f"half its width of {hidden_size}."
        )
    return found


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"There is no file {path}.")
    if path.suffix != ".safetensors":
        return _unpickle(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is truncated, corrupt, or no safetensors file ({one_line(error)}): fetch it "
            "again."
        ) from error


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        with warnings.catch_warnings(action="ignore"):
            # Mapped, the optimizer state and the other networks stay on the disk.
            data = torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # damaged pickles fail in every possible way
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{path} holds the Python object {found[1]}, not only tensors: it is refused, "
                "because loading it could run code."
            ) from error
        raise CheckpointError(
            f"{path} is truncated, corrupt, or no PyTorch checkpoint: fetch it again."
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, not a dict of networks.")
    return data


def _choose(
    data: Mapping[str, Any], wanted: str | None, path: Path
) -> tuple[str, dict[str, Tensor]]:
    """The name and the tensors of the wanted network, or of the best one; an only one has none."""
    held = {name: data[key] for name, key in NETWORKS.items() if isinstance(data.get(key), dict)}
    only = [data, *(data[key] for key in UNNAMED if isinstance(data.get(key), dict))]
    only = [state for state in map(_unwrapped, only) if EMBEDDING in state]
    if not held and not only:
        keys = ", ".join((*NETWORKS.values(), *UNNAMED))
        raise CheckpointError(
            f"{path} holds no network: none of {keys} is in it, nor {EMBEDDING} itself."
        )
    if wanted is not None and wanted not in held:
        holds = ", ".join(held) or "one network without a name"
        raise ConfigError(f"{path} has no weights {wanted!r}: it holds {holds}.")
    name = wanted or next(iter(held), "")
    state = _unwrapped(held[name]) if name else only[0]
    if strange := [key for key, value in state.items() if not isinstance(value, Tensor)]:
        where = f"{path} ({name})" if name else path
        raise CheckpointError(f"{where} has entries that are no tensors: {strange[0]}.")
    return name, state


def _unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """Entries by published name, without what DistributedDataParallel and their like prepend."""
    return {WRAPPERS.sub("", str(key)): value for key, value in state.items()}


def _shape(state: Mapping[str, Tensor], name: str, rank: int, where: str) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(f"{where} is not a published network: missing {name}.")
    if state[name].dim() != rank:
        raise CheckpointError(
            f"{where}: mis-shaped {name} {list(state[name].shape)}, which must have rank {rank}."
        )
    return tuple(state[name].shape)


def _check_frequencies(inv_freq: Tensor, where: str) -> None:
    """Theirs must be ours, up to the rounding of bfloat16 (2 ** -8)."""
    ours = Rotary(2 * len(inv_freq)).inv_freq
    if not torch.allclose(inv_freq.float(), ours, rtol=2.0**-8, atol=0.0):
        raise CheckpointError(
            f"{where} has rotary frequencies of another base than 10,000: cannot convert it."
        )
