"""An autoregressive model of the same size, with its KV cache: GPT-2 or Llama of transformers."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from fsdfm.core.errors import ConfigError
from fsdfm.model.causal import CausalConfig
from fsdfm.model.config import ModelConfig
from fsdfm.model.transformer import MLP_RATIO

FIRST_TOKEN = 0


def available() -> bool:
    """Whether the optional package transformers is installed."""
    return importlib.util.find_spec("transformers") is not None


def build(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """A network with random weights and the width, blocks, heads and vocabulary of `config`.

    GPT-2; for the twin of a causal language model, a Llama.

    Raises:
        ConfigError: transformers is not installed.
    """
    try:
        from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise ConfigError(
            "The autoregressive side needs transformers: pip install 'fsdfm[eval]'."
        ) from None
    special: dict[str, Any] = {
        "bos_token_id": FIRST_TOKEN,
        "pad_token_id": FIRST_TOKEN,
        "eos_token_id": None,  # nothing ends a text early
    }
    if isinstance(config, CausalConfig):
        llama = LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.blocks,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_size,
            intermediate_size=config.mlp_size,
            max_position_embeddings=config.context_length + 1,
            tie_word_embeddings=config.tied,
            **special,
        )
        twin: Any = LlamaForCausalLM(llama)
        return twin.to(device=device, dtype=dtype).eval()
    shape = GPT2Config(
        vocab_size=config.vocab_size,
        n_embd=config.hidden_size,
        n_layer=config.blocks,
        n_head=config.heads,
        n_inner=MLP_RATIO * config.hidden_size,
        n_positions=config.context_length + 1,
        **special,
    )
    model: Any = GPT2LMHeadModel(shape)
    return model.to(device=device, dtype=dtype).eval()


def generate(model: Any, batch: int, length: int) -> Tensor:
    """Sample `length` tokens a sequence at temperature 1, after one first token.

    Returns:
        int64, shape (batch, length).
    """
    first = torch.full((batch, 1), FIRST_TOKEN, device=model.device)
    tokens: Tensor = model.generate(
        first,
        attention_mask=torch.ones_like(first),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=length,
        max_new_tokens=length,
        use_cache=True,
    )
    return tokens[:, 1:]
