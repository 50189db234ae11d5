"""Tiny causal language models on disk, as `transformers` saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fsdfm.text.tokenizer import EOS, Tokenizer, train_bpe

PROSE = [
    "The miller stood at his door with flour on his sleeves; the children ran and shouted.",
    "Nobody knew who the stranger was. He held his hat upon his knee, and smiled a little.",
    "At the inn he asked for a room, paid for a week, and went up the stairs without supper.",
] * 8
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
}
"""Families by model type, each with what sets it apart."""


def tokenizer(vocab_size: int = 320) -> Tokenizer:
    """A byte-level BPE of PROSE."""
    return train_bpe(PROSE, vocab_size)


def save_tokenizer(directory: Path, text: str, eos: str = EOS) -> None:
    """A tokenizer.json and its config, as `transformers` saves them."""
    from transformers import PreTrainedTokenizerFast

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(text)
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), eos_token=eos, bos_token=eos
    )
    fast.save_pretrained(directory)


def make_lm(kind: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random model in which every bias and norm is at work; four heads share two of keys."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    config = AutoConfig.for_model(kind, **{**shape, **FAMILIES.get(kind, {}), **changes})
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config).eval()
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2, generator=draw)
    return model


def save_lm(directory: Path, kind: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """A random model and the tokenizer of PROSE."""
    save_tokenizer(directory, tokenizer().to_json())
    make_lm(kind, seed, **changes).save_pretrained(directory)
    return directory
