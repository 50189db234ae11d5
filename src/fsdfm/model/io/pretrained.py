"""A model as a directory: config.json, model.safetensors, tokenizer.json, generation.json.

`model.io.directory` brings its files into place as one. The weights carry
the config and the tokenizer's digest, so files of two saves never mix unnoticed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from fsdfm.core.errors import CheckpointError, ConfigError
from fsdfm.core.files import digest, one_line
from fsdfm.core.packed import Packed, best_levels, bits_of, even_levels, pack, unpack
from fsdfm.model.config import ModelConfig
from fsdfm.model.io.directory import (
    CONFIG,
    GENERATION,
    TOKENIZER,
    WEIGHTS,
    commit,
    find,
    read_object,
    read_text,
    resolve,
)
from fsdfm.model.networks import build_network, config_from_dict, config_to_dict
from fsdfm.model.transformer import FlowNetwork

CORRUPT = (
    OSError,
    SafetensorError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What reading a file that is not what it says may raise."""
FORMAT = "fsdfm"
FORMAT_VERSION = 3
PLAIN_VERSION = 1
"""The newest that this package reads, for weights in few bits; and that of all others. In version 2
the levels of few bits were even."""
HEADER = ("format", "format_version", "ancestors")
"""What config.json has besides the network's own fields; ancestors only where there are some."""

SHOWN_NAMES = 4


@dataclass(frozen=True, slots=True)
class Pretrained:
    """What a model directory holds."""

    model: FlowNetwork
    """float32, in evaluation mode, on the device asked for."""
    tokenizer_json: str
    """Text of tokenizer.json."""
    generation: dict[str, Any]
    """Defaults for generating; empty where the directory names none."""
    ancestors: tuple[str, ...] = ()
    """Names of the models that it descends from, such as SmolLM2-135M: a judge that is one of them
    flatters it."""


def save_pretrained(
    directory: str | Path,
    model: FlowNetwork,
    *,
    tokenizer_json: str,
    generation: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    bits: Mapping[str, int] | None = None,
    packed: Mapping[str, Packed] | None = None,
    ancestors: Sequence[str] = (),
) -> None:
    """Write a model directory; an older model there is replaced whole or not at all.

    Args:
        directory: made if missing; its other files are left alone.
        model: network to save.
        tokenizer_json: text of the tokenizer that goes with it.
        generation: defaults for generating, e.g. {"step": "exact", "steps": 8}.
        dtype: number format of the saved weights; None keeps the model's own.
        bits: of a weight in the large matrices (`fsdfm.core.packed`), from 3 to 8, by the
            beginning of the tensor's name; all that is not named, or small, is saved in float16.
        packed: matrices that were rounded already (`fsdfm.model.rounding`), with these very bits.
        ancestors: names of the models that it descends from, such as SmolLM2-135M; those that its
            start had, and the start itself where it is a known model.

    Raises:
        CheckpointError: weights that are not finite, a tokenizer that does not fit, or a directory
            that cannot be written (the old model stays).
        ConfigError: a dtype that cannot hold the weights, or ancestors that are not names.
    """
    if not _are_names(ancestors):
        raise ConfigError(f"ancestors must be a sequence of names, got {ancestors!r}.")
    directory = Path(directory)
    _check_tokenizer(tokenizer_json, model.config, "The tokenizer")
    for prefix, count in (bits or {}).items():
        if not 3 <= count <= 8:
            raise ConfigError(f"bits must be from 3 to 8, got {count} for {prefix}.")
    tensors = _to_save(model, torch.float16 if bits else dtype)
    version = FORMAT_VERSION if bits else PLAIN_VERSION
    header = {"format": FORMAT, "format_version": version, **config_to_dict(model.config)}
    if ancestors:
        header["ancestors"] = list(dict.fromkeys(ancestors))
    metadata = {
        "format": FORMAT,
        "config": json.dumps(header),
        "tokenizer_sha256": _digest(tokenizer_json),
    }
    if bits:
        metadata["packed"] = json.dumps(_pack(tensors, model, bits, packed or {}))
        levels = {count: best_levels(count).tolist() for count in sorted({*bits.values()})}
        metadata["levels"] = json.dumps(levels)
    generated = json.dumps(dict(generation or {}), indent=2) + "\n"
    texts = {CONFIG: json.dumps(header, indent=2) + "\n", TOKENIZER: tokenizer_json}
    commit(directory, tensors, metadata, texts | {GENERATION: generated})


def load_pretrained(
    directory_or_hub_id: str | Path, *, device: str | torch.device = "cpu"
) -> Pretrained:
    """Read a model directory, or fetch one from the Hugging Face Hub.

    Args:
        directory_or_hub_id: a directory; or `org/name` where there is no such path.
        device: where the network goes.

    Returns:
        The network in float32 and evaluation mode, its tokenizer and its generation defaults.

    Raises:
        CheckpointError: the directory is missing, foreign, newer than this package, or damaged.
        ConfigError: the device cannot be used.
    """
    directory = resolve(directory_or_hub_id)
    config, ancestors = read_config(directory)
    state, metadata = _read_weights(find(directory, WEIGHTS))
    _check_metadata(metadata, (config, ancestors), directory)
    model = build(config, state, str(find(directory, WEIGHTS)))
    tokenizer_json = read_text(find(directory, TOKENIZER))
    _check_tokenizer(tokenizer_json, config, str(directory / TOKENIZER))
    if metadata.get("tokenizer_sha256") != _digest(tokenizer_json):
        raise CheckpointError(
            f"{directory / TOKENIZER} is not the tokenizer that these weights were saved with: "
            "restore it, or save the model again."
        )
    generation = read_generation(directory)
    try:
        model = model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"Cannot use device {str(device)!r}: {one_line(error)}.") from error
    return Pretrained(model, tokenizer_json, generation, ancestors)


def build(config: ModelConfig, state: Mapping[str, Tensor], where: str) -> FlowNetwork:
    """A network that owns exactly these weights.

    Args:
        config: shape and conventions.
        state: tensors by name; converted to float32.
        where: what to call their origin in an error.

    Returns:
        The network in float32, evaluation mode, on the tensors' device.

    Raises:
        CheckpointError: tensors that are missing, unknown, mis-shaped or not finite, named.
    """
    # Meta: no time spent on initial weights, and the global random state stays as it is.
    with torch.device("meta"):
        model = build_network(config)
    expected = model.state_dict()
    problems = {
        "missing": sorted(expected.keys() - state.keys()),
        "unknown": sorted(state.keys() - expected.keys()),
        "mis-shaped": [
            f"{name} {list(state[name].shape)} for {list(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        ],
    }
    if any(problems.values()):
        text = "; ".join(f"{kind} {_names(names)}" for kind, names in problems.items() if names)
        raise CheckpointError(f"The tensors of {where} do not fit the network: {text}.")
    floats = {name: tensor.to(torch.float32, copy=True) for name, tensor in state.items()}
    _check_finite(floats, CheckpointError(f"{where} is damaged: values that are not finite in "))
    model.load_state_dict(floats, assign=True)
    model.rotary_emb = config.rotary()
    return model.eval()


def vocabulary_size(tokenizer_json: str, where: str) -> int:
    """Ids that a tokenizer can give: the largest one plus 1.

    Args:
        tokenizer_json: text of a tokenizer.json.
        where: what to call it in an error.

    Raises:
        CheckpointError: the text is not a tokenizer.
    """
    try:
        vocabulary = Tokenizer.from_str(tokenizer_json).get_vocab(with_added_tokens=True)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(
            f"{where} is not a tokenizer of the tokenizers library: {one_line(error)}."
        ) from error
    return max(vocabulary.values(), default=-1) + 1


def _to_save(model: FlowNetwork, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The state dict on the CPU in the given dtype, finite."""
    own = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    _check_finite(own, CheckpointError("Nothing was saved: weights that are not finite in "))
    if dtype is None:
        return {name: tensor.contiguous() for name, tensor in own.items()}
    if not dtype.is_floating_point:
        raise ConfigError(f"Weights cannot be saved as {dtype}: use float32, float16 or bfloat16.")
    cast = {name: tensor.to(dtype).contiguous() for name, tensor in own.items()}
    _check_finite(cast, ConfigError(f"Save in bfloat16 or float32: {dtype} overflows in "))
    return cast


def _check_finite(tensors: Mapping[str, Tensor], error: Exception) -> None:
    """Raise the error, its message completed by the names of tensors with an inf or a NaN."""
    if names := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise type(error)(f"{error}{_names(names)}.")


def _check_tokenizer(tokenizer_json: str, config: ModelConfig, where: str) -> None:
    if (size := vocabulary_size(tokenizer_json, where)) > config.vocab_size:
        raise CheckpointError(
            f"{where} has {size} ids but the network has {config.vocab_size}: "
            "use the tokenizer that the network was trained with."
        )


def _check_metadata(
    metadata: Mapping[str, str], config: tuple[ModelConfig, tuple[str, ...]], directory: Path
) -> None:
    """The weights must say that they were saved with this config."""
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{directory / WEIGHTS} was not saved by fsdfm.")
    try:
        saved = _parse_config(json.loads(metadata.get("config", "")), directory / WEIGHTS)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{directory / WEIGHTS} names no readable config.") from error
    if saved != config:
        raise CheckpointError(
            f"{CONFIG} and {WEIGHTS} in {directory} are of different models: "
            "restore the pair, or save the model again."
        )


def read_config(directory: Path) -> tuple[ModelConfig, tuple[str, ...]]:
    """Shape and conventions of a model directory, and its ancestors; no weights are read.

    Raises:
        CheckpointError: no model directory, or one that is foreign, newer or damaged.
    """
    path = find(directory, CONFIG)
    if not path.is_file():
        raise CheckpointError(f"{directory} is not a model directory: it has no {CONFIG}.")
    return _parse_config(read_object(path), path)


def is_own(directory: Path) -> bool:
    """Whether the config of a directory says that fsdfm wrote it.

    Raises:
        CheckpointError: a config that is no JSON object.
    """
    path = find(directory, CONFIG)
    return path.is_file() and read_object(path).get("format") == FORMAT


def read_generation(directory: Path) -> dict[str, Any]:
    """What a model directory says of generating; nothing if it has no such file.

    Raises:
        CheckpointError: an unreadable file.
    """
    path = find(directory, GENERATION)
    found: dict[str, Any] = read_object(path) if path.exists() else {}
    return found


def _parse_config(values: Any, path: Path) -> tuple[ModelConfig, tuple[str, ...]]:
    """Shape and conventions, and ancestors."""
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        kind = values.get("model_type") if isinstance(values, dict) else None
        found = f" (model_type {kind!r})" if kind else ""
        raise CheckpointError(
            f"{path} is not of an fsdfm model{found}: give a directory that fsdfm saved."
        )
    version = values.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{path} has no valid format_version: {version!r}.")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this fsdfm reads up to {FORMAT_VERSION}: "
            "upgrade fsdfm."
        )
    ancestors = values.get("ancestors", [])
    if not _are_names(ancestors):
        raise CheckpointError(f"{path}: ancestors must be a list of names, got {ancestors!r}.")
    fields = {k: v for k, v in values.items() if k not in HEADER}
    try:
        return config_from_dict(fields), tuple(ancestors)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _are_names(values: Any) -> bool:
    if not isinstance(values, list | tuple):
        return False
    return all(isinstance(name, str) and name.strip() for name in values)


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        return _unpacked(tensors, metadata), metadata
    except CORRUPT as error:
        raise CheckpointError(f"{path} is truncated or corrupt: {one_line(error)}.") from error


def _pack(
    tensors: dict[str, Tensor],
    model: FlowNetwork,
    bits: Mapping[str, int],
    done: Mapping[str, Packed],
) -> dict[str, dict[str, Any]]:
    """Replace tensors by their codes and scales; returns bits and shape of each."""
    described = {}
    for name, exact in model.state_dict().items():
        count = bits_of(name, exact, bits)
        if count is None:
            continue
        packed = done.get(name) or pack(exact.cpu(), count)
        del tensors[name]
        tensors |= {f"{name}.codes": packed.codes, f"{name}.scales": packed.scales}
        described[name] = {"bits": count, "shape": list(exact.shape)}
    return described


def _unpacked(tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights by the network's names, those in few bits as float32."""
    levels = {
        int(count): torch.tensor(values, dtype=torch.float32)
        for count, values in json.loads(metadata.get("levels", "{}")).items()
    }
    for name, facts in json.loads(metadata.get("packed", "{}")).items():
        bits, shape = int(facts["bits"]), tuple(facts["shape"])
        if bits not in range(3, 9):
            raise ValueError(f"bits of {name}")
        own = levels[bits] if bits in levels else even_levels(bits)
        packed = Packed(tensors.pop(f"{name}.codes"), tensors.pop(f"{name}.scales"), own)
        tensors[name] = unpack(packed, bits, shape)
    return tensors


def _digest(tokenizer_json: str) -> str:
    """SHA-256 of the JSON's meaning: line ends and indentation do not count."""
    canonical = json.dumps(json.loads(tokenizer_json), sort_keys=True)
    return digest([canonical])


def _names(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more
