"""The autoregressive model in CTranslate2: what one would pick to write text on a CPU."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fsdfm.bench import autoregressive
from fsdfm.core.errors import ConfigError
from fsdfm.model.causal import CausalConfig
from fsdfm.model.config import ModelConfig

COMPUTE_TYPES = {torch.int8: "int8", torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""What CTranslate2 calls the formats of products."""


def available() -> bool:
    """Whether the optional packages ctranslate2 and transformers are installed."""
    return autoregressive.available() and importlib.util.find_spec("ctranslate2") is not None


def runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether it is installed and has products in this format on this device."""
    if not available():
        return False
    import ctranslate2

    try:
        known = ctranslate2.get_supported_compute_types(device.type)
    except (RuntimeError, ValueError):  # built without CUDA, or no such device
        return False
    return COMPUTE_TYPES[dtype] in known


class _Words:
    """What the converter asks of a tokenizer: a word for every token, the number itself."""

    bos_token, eos_token, unk_token = "0", "1", "2"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Words and their numbers."""
        return {str(token): token for token in range(self.vocab_size)}


def build(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """A network with random weights, converted: that of `autoregressive.build`.

    Args:
        config: width, blocks, heads and vocabulary.
        device: where it runs, cpu or cuda.
        dtype: of its products: int8, float32 or bfloat16.

    Raises:
        ConfigError: ctranslate2 or transformers is not installed, or such heads are unknown to it.
    """
    width = config.hidden_size // config.heads
    if isinstance(config, CausalConfig) and config.head_size != width:
        raise ConfigError(
            f"CTranslate2 wants heads of {width} numbers, not {config.head_size}: "
            "leave its sides out."
        )
    try:
        import ctranslate2
        from ctranslate2.converters import converter, transformers
    except ImportError:
        raise ConfigError(
            "The CTranslate2 side needs ctranslate2 and transformers: pip install 'fsdfm[bench]'."
        ) from None
    torch.manual_seed(0)
    model = autoregressive.build(config, torch.device("cpu"), torch.float32)
    compute_type = COMPUTE_TYPES[dtype]

    class Converter(converter.Converter):  # type: ignore[misc]
        """The converter of transformers' models, for one that was never saved."""

        def _load(self) -> Any:
            loader = transformers._MODEL_LOADERS[type(model.config).__name__]
            return loader(model, _Words(config.vocab_size))

    with torch.no_grad(), tempfile.TemporaryDirectory() as directory:
        made = Converter().convert(str(Path(directory, "model")), quantization=compute_type)
        return ctranslate2.Generator(
            made,
            device=device.type,
            device_index=device.index or 0,
            compute_type=compute_type,
            inter_threads=1,
            intra_threads=torch.get_num_threads(),
        )


def generate(model: Any, batch: int, length: int, seed: int) -> Tensor:
    """Sample `length` tokens a sequence from the whole softmax at temperature 1, after a first one.

    Returns:
        int64, shape (batch, length).
    """
    import ctranslate2

    ctranslate2.set_random_seed(seed)
    first = [str(autoregressive.FIRST_TOKEN)]
    found = model.generate_batch(
        [first] * batch,
        min_length=length,
        max_length=length,
        sampling_topk=0,
        sampling_temperature=1.0,
        include_prompt_in_result=False,
    )
    return torch.tensor([each.sequences_ids[0] for each in found])
