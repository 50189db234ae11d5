"""An adapter as a directory: adapter.json, and adapter.safetensors with the pairs of a LoRA.

The JSON names the base by the digest of its weights: an adapter fits the network that it was
trained on, and no other.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fsdfm.core.errors import CheckpointError
from fsdfm.core.files import digest, one_line, replacing, tensor_bytes, write_whole
from fsdfm.model.io.pretrained import Pretrained, load_pretrained, save_pretrained
from fsdfm.model.lora import merge, pairs
from fsdfm.model.transformer import FlowNetwork

FORMAT, FORMAT_VERSION = "fsdfm-adapter", 1
FACTS, TENSORS = "adapter.json", "adapter.safetensors"


def base_digest(model: FlowNetwork) -> str:
    """SHA-256 of a network's weights, in hexadecimal."""
    return digest(tensor_bytes(model.parameters()))


def save_adapter(directory: str | Path, model: FlowNetwork, base_sha256: str) -> None:
    """Write an adapter; an older one there is replaced.

    Args:
        directory: made if missing.
        model: with the pairs of `add_lora`.
        base_sha256: of the network before it had them.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    place, tensors = Path(directory), pairs(model)
    facts = {"format": FORMAT, "format_version": FORMAT_VERSION, "base_sha256": base_sha256}
    facts["rank"] = max(len(t) for name, t in tensors.items() if name.endswith(".a"))
    try:
        place.mkdir(parents=True, exist_ok=True)
        # The pairs say whose they are, too: the two files may come from different saves.
        with replacing(place / TENSORS) as partial:
            save_file(
                {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
                partial,
                {"base_sha256": base_sha256},
            )
        write_whole(place / FACTS, json.dumps(facts, indent=2) + "\n", error=CheckpointError)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot save an adapter in {place}: {one_line(error)}.") from None


def add_adapter(model: FlowNetwork, directory: str | Path) -> None:
    """Add an adapter to the network that it was trained on.

    Args:
        model: changed in place.
        directory: that `save_adapter` wrote.

    Raises:
        CheckpointError: no adapter, a damaged one, or one of another network.
    """
    place = Path(directory)
    if not (place / FACTS).is_file():
        raise CheckpointError(f"{place} is not an adapter: it has no {FACTS}.")
    try:
        facts = json.loads((place / FACTS).read_text("utf-8"))
        kind, version, wanted = (facts.get(k) for k in ("format", "format_version", "base_sha256"))
        with safe_open(place / TENSORS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            of = (file.metadata() or {}).get("base_sha256")
    except (OSError, ValueError, AttributeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{place} is a damaged adapter: {one_line(error)}.") from None
    known = kind == FORMAT and version == FORMAT_VERSION
    if not known or not isinstance(wanted, str) or of != wanted:
        raise CheckpointError(
            f"{place} is not an adapter of version {FORMAT_VERSION} with its own pairs."
        )
    if base_digest(model) != wanted:
        raise CheckpointError(
            f"The adapter {place} was trained on another model: give the one that it names "
            f"(base_sha256 {wanted[:12]}...)."
        )
    merge(model, tensors, str(place / TENSORS))


def merge_adapter(base: str | Path, adapter: str | Path, out: str | Path) -> Pretrained:
    """Write a model directory of a base and an adapter; both are left as they are.

    Raises:
        CheckpointError: one of them is missing or damaged, they do not go together, or `out` is
            one of them, a run's directory, or cannot be written.
    """
    for place, what in ((base, "base"), (adapter, "adapter")):
        if Path(out).resolve() == Path(place).resolve():
            raise CheckpointError(f"{out} is the {what} itself: choose another place.")
    if (Path(out) / "run.json").exists():
        raise CheckpointError(f"{out} is the directory of a run: choose another place.")
    loaded = load_pretrained(base)
    add_adapter(loaded.model, adapter)
    save_pretrained(
        out,
        loaded.model,
        tokenizer_json=loaded.tokenizer_json,
        generation=loaded.generation,
        ancestors=loaded.ancestors,
    )
    return loaded
