"""Quantizing a trained model: its weights in few bits, in a model directory of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fsdfm.core.device import preferred_dtype
from fsdfm.core.errors import ConfigError
from fsdfm.core.packed import packable
from fsdfm.core.progress import Work, untold
from fsdfm.model.io.pretrained import load_pretrained, save_pretrained
from fsdfm.model.rounding import calibrated
from fsdfm.model.transformer import FlowNetwork
from fsdfm.recipes.calibration import examples
from fsdfm.recipes.directory import made
from fsdfm.recipes.training import same_tokenizer
from fsdfm.text.store import TokenStore


def quantize(
    model: str | Path,
    out: Path,
    bits: Sequence[str],
    *,
    data: Path | None = None,
    work: Work = untold,
) -> FlowNetwork:
    """Write a model directory whose weights are stored in few bits; the model is left as it is.

    Args:
        model: model or run directory.
        out: model directory to write.
        bits: what `parsed_bits` takes; all that is not named, or small, is stored in float16.
        data: directory of `fsdfm prepare` with its tokenizer. Its training split is looked at, so
            that products lose little (`fsdfm.model.rounding`); None: weights go to their nearest
            codes, which loses far more.
        work: told of the matrices that are rounded.

    Returns:
        The network as it was.

    Raises:
        DataError: data that is missing, damaged, or too short.
        ConfigError: bits that cannot be, or that no matrix has; data of another tokenizer; weights
            whose inputs are not finite.
        CheckpointError: no such model, or `out` is the model, a run, or cannot be written.
    """
    counts = parsed_bits(bits)
    whole = load_pretrained(model)
    network = whole.model
    _refuse_unknown(counts, network, model)
    packed = batches = None
    if data is not None:
        store = TokenStore.open(data)
        same_tokenizer(whole, Path(model), store, data)
        batches = examples(store.train, network.config)
    made(out, model)
    if batches is not None:
        dtype = preferred_dtype(torch.device("cpu"))
        with work("rounding") as progress:
            packed = calibrated(network, batches, counts, dtype=dtype, progress=progress)
    save_pretrained(
        out,
        network,
        tokenizer_json=whole.tokenizer_json,
        generation=whole.generation,
        bits=counts,
        packed=packed,
        ancestors=whole.ancestors,
    )
    return network


def _refuse_unknown(counts: Mapping[str, int], network: FlowNetwork, model: str | Path) -> None:
    """Raises ConfigError where bits name no matrix: one that is mistyped would stay as it is."""
    tensors = network.state_dict()
    for prefix, count in counts.items():
        if prefix == "joint" and len(counts) > 1:  # which a student has, and a teacher has not
            continue
        if not any(packable(each) for name, each in tensors.items() if name.startswith(prefix)):
            rooms = dict.fromkeys(name.partition(".")[0] for name in tensors)
            raise ConfigError(
                f"bits={prefix}={count} means no matrix of {model}: names begin with "
                f"{', '.join(rooms)}.",
                "bits",
            )


def parsed_bits(bits: Sequence[str]) -> dict[str, int]:
    """`PREFIX=N` as bits by the beginning of a tensor's name; N alone is for all that is left.

    Raises:
        ConfigError: anything else.
    """
    found: dict[str, int] = {}
    for each in bits:
        match = re.fullmatch(r"(?:([\w.]+)=)?([3-8])", each)
        if match is None:
            raise ConfigError(
                f"bits must be like blocks=4, from 3 to 8, or a number for all that is left, "
                f"got {each!r}.",
                "bits",
            )
        found[match[1] or ""] = int(match[2])
    return dict(sorted(found.items(), key=lambda pair: -len(pair[0])))
