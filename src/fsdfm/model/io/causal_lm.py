"""Causal language models as flow models: read what `transformers` reads, keep what is wanted.

Any Llama, Mistral, Qwen2 or Qwen3 becomes a `CausalNetwork` with its own weights: some of its
layers, the rows of some of its tokens, and one new row for the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fsdfm.core.errors import CheckpointError, ConfigError
from fsdfm.core.packaged import locate, own_name, parsed_once, reading
from fsdfm.model.causal import CausalBlock, CausalConfig, CausalNetwork
from fsdfm.model.config import Attention, Source

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types that a `CausalNetwork` can hold."""
COND_SIZE = 32
"""C of an adapted network: t and h say little to one that sees masks."""


@dataclass(frozen=True, slots=True)
class CausalLm:
    """A causal language model as `transformers` has it."""

    name: str
    """What those who made it call it, as far as its name tells."""
    model: Any
    """float32, in evaluation mode."""
    tokenizer_json: str
    """Text of a tokenizer.json, whole."""


def load_tokenizer_json(name: str) -> str:
    """The tokenizer of a causal language model, as the text of a tokenizer.json.

    Raises:
        ConfigError: a library or the package is missing.
        CheckpointError: no such model, or it has no tokenizer of the `tokenizers` library.
    """
    place, gguf = locate(name)
    with reading(name):
        from transformers import AutoTokenizer

        where = {} if gguf is None else {"gguf_file": gguf}
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False, **where)
        text: str = tokenizer.backend_tokenizer.to_str()
    return text


@parsed_once()
def load_causal_lm(name: str) -> CausalLm:
    """A causal language model in float32, on the CPU; its files are never unpickled or run.

    Args:
        name: see `locate`.

    Raises:
        ConfigError: a library or the package is missing, or an architecture that is not supported.
        CheckpointError: no such model, or it cannot be read.
    """
    place, gguf = locate(name)
    where: dict[str, Any] = {} if gguf is None else {"gguf_file": gguf}
    with reading(name):
        from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

        config = AutoConfig.from_pretrained(place, trust_remote_code=False, **where)
    _check_family(config, name)
    how: dict[str, Any] = {"use_safetensors": True}
    if gguf is not None:
        how = {"quantization_config": GgufConfig(dequantize=True)}
    with reading(name):
        found: Any = AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.float32, output_loading_info=True, **where, **how
        )
        model, told = found
    if missing := sorted(told["missing_keys"]):  # the library would draw them at random
        raise CheckpointError(f"The weights of {name} lack {missing[0]}: fetch the model again.")
    return CausalLm(own_name(name), model.eval().requires_grad_(False), load_tokenizer_json(name))


def asked_layers(count: int, layers: str | None) -> tuple[int, ...] | int:
    """What a user says of layers: a list like 0,1,5 (or 5,), nothing for all, or how many.

    Args:
        count: layers of the model.
        layers: what was said.

    Returns:
        Their numbers, ascending; or how many, if that is fewer than all.

    Raises:
        ConfigError: neither, out of range, or a layer named twice.
    """
    if layers is None:
        return tuple(range(count))
    try:
        numbers = [int(part) for part in layers.removesuffix(",").split(",")]
    except ValueError:
        raise ConfigError(
            f"layers must be a number of layers or a list like 0,1,5, got {layers!r}.",
            "layers",
        ) from None
    if "," not in layers:
        (wanted,) = numbers
        if not 1 <= wanted <= count:
            raise ConfigError(
                f"layers must be from 1 to {count}, which the model has, got {wanted}.", "layers"
            )
        return wanted if wanted < count else tuple(range(count))
    if len(set(numbers)) < len(numbers) or not all(0 <= n < count for n in numbers):
        raise ConfigError(
            f"layers must be different numbers from 0 to {count - 1}, got {layers!r}.",
            "layers",
        )
    return tuple(sorted(numbers))


def adapt(
    lm: CausalLm,
    *,
    token_ids: Sequence[int | None],
    start_id: int | None,
    layers: Sequence[int],
    source: Source,
    context_length: int,
    attention: Attention = "bidirectional",
    schedule_power: float = 1.0,
) -> CausalNetwork:
    """A flow network with a language model's weights; the language model may be used up by it.

    Args:
        lm: the language model.
        token_ids: its ids of the tokens to keep, in their new order; None for a new token, which
            starts as the mean of the others (as does one that its embedding has no row for).
        start_id: new id of the token before the first; None: no shift.
        layers: which of its layers, in order.
        source: where x_0 comes from; `mask` adds a row, the mean of the others.
        context_length: tokens of a training sequence.
        attention: `causal` keeps the language model as it is.
        schedule_power: n in kappa_t = t ** n.
    """
    _check_window(lm.model.config, context_length)
    parts = lm.model.model
    config = CausalConfig(
        vocab_size=len(token_ids),
        blocks=len(layers),
        cond_size=COND_SIZE,
        context_length=context_length,
        source=source,
        schedule_power=schedule_power,
        start_id=start_id,
        attention=attention,
        **_shape(lm.model.config, parts.layers[layers[0]].self_attn),
    )
    network = CausalNetwork(config)
    rows = torch.tensor([-1 if i is None else i for i in token_ids])
    with torch.no_grad():
        _fill_rows(network.vocab_embed.weight, parts.embed_tokens.weight, rows)
        if not config.tied:
            _fill_rows(network.output_layer.linear.weight, lm.model.lm_head.weight, rows)
        network.output_layer.norm_final.weight.copy_(parts.norm.weight)
        for block, number in zip(network.blocks, layers, strict=True):
            assert isinstance(block, CausalBlock)
            _fill_block(block, parts.layers[number])
    return network.eval()


def _check_window(theirs: Any, context_length: int) -> None:
    """Raises ConfigError where some layers of a model see less than a sequence: ours see all."""
    window = getattr(theirs, "sliding_window", None)
    kinds = getattr(theirs, "layer_types", None)
    in_use = "sliding_attention" in kinds if kinds else window is not None
    if in_use and window is not None and window < context_length:
        raise ConfigError(
            f"This model's layers see the last {window} tokens: context_length must be {window} or "
            f"less, got {context_length}.",
            "context_length",
        )


def _shape(theirs: Any, attention: Any) -> dict[str, Any]:
    """What a twin takes over, as fields of its config: from a model's config and one attention."""
    heads = theirs.num_attention_heads
    return {
        "hidden_size": theirs.hidden_size,
        "heads": heads,
        "kv_heads": theirs.num_key_value_heads,
        "head_size": getattr(theirs, "head_dim", None) or theirs.hidden_size // heads,
        "mlp_size": theirs.intermediate_size,
        "rotary_base": _rotary_base(theirs),
        "norm_epsilon": theirs.rms_norm_eps,
        "qkv_bias": attention.q_proj.bias is not None,
        "qk_norm": hasattr(attention, "q_norm"),
        "tied": bool(theirs.tie_word_embeddings),
    }


def _fill_rows(ours: Tensor, theirs: Tensor, rows: Tensor) -> None:
    known = (rows >= 0) & (rows < len(theirs))  # a tokenizer may know more than its model
    kept = theirs[rows[known]]
    ours[:] = kept.mean(0)  # new tokens', and the mask's if there is one
    ours[: len(rows)][known] = kept


def _fill_block(block: CausalBlock, layer: Any) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    block.qkv.weight.copy_(torch.cat([linear.weight for linear in projections]))
    if block.qkv.bias is not None:
        block.qkv.bias.copy_(torch.cat([linear.bias for linear in projections]))
    if block.qk_norm:
        block.q_norm.weight.copy_(attention.q_norm.weight)
        block.k_norm.weight.copy_(attention.k_norm.weight)
    block.attn_out.weight.copy_(attention.o_proj.weight)
    block.mlp_in.weight.copy_(torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)))
    block.mlp_out.weight.copy_(mlp.down_proj.weight)
    block.norm1.weight.copy_(layer.input_layernorm.weight)
    block.norm2.weight.copy_(layer.post_attention_layernorm.weight)


def _check_family(config: Any, name: str) -> None:
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise ConfigError(
            f"{name} is a {kind} model: adapting supports {', '.join(FAMILIES)} "
            "(SmolLM2 is a llama)."
        )
    if config.hidden_act != "silu":
        raise ConfigError(f"{name} has the activation {config.hidden_act}: only silu is supported.")
    unknown = [
        field
        for field, there in (
            ("a bias in its MLP", getattr(config, "mlp_bias", False)),
            (
                "a bias after attention",
                kind != "qwen2" and getattr(config, "attention_bias", False),
            ),
            ("scaled rotary positions", _rotary_kind(config) != "default"),
        )
        if there
    ]
    if unknown:
        raise ConfigError(f"{name} has {' and '.join(unknown)}, which adapting does not support.")


def _rotary(config: Any) -> dict[str, Any]:
    """transformers 5 has `rope_parameters`, older files `rope_scaling` and `rope_theta`."""
    values = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    return dict(values or {})


def _rotary_kind(config: Any) -> str:
    values = _rotary(config)
    return str(values.get("rope_type", values.get("type", "default")))


def _rotary_base(config: Any) -> float:
    base = _rotary(config).get("rope_theta", getattr(config, "rope_theta", None))
    return float(base or 10_000.0)
