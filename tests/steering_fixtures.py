"""Tiny models of every kind of source, for tests of requests."""

from __future__ import annotations

from test_generator import WORDS, network
from torch import Generator as Noise
from torch import nn

from fsdfm.generate.generator import Generator
from fsdfm.model.causal import CausalConfig, CausalNetwork
from fsdfm.text.tokenizer import Tokenizer, train_bpe

SOURCES = ("uniform", "mask", "twin")


def twin_network(tokenizer: Tokenizer, context_length: int = 64) -> CausalNetwork:
    """A twin of a causal model with a joint head."""
    config = CausalConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        blocks=2,
        heads=2,
        kv_heads=1,
        head_size=16,
        mlp_size=32,
        cond_size=16,
        context_length=context_length,
        source="mask",
        neighbours=1,
        start_id=0,
    )
    model, draw = CausalNetwork(config), Noise().manual_seed(5)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.3, generator=draw)
    return model


def make_generators(context_length: int = 64) -> dict[str, Generator]:
    """A generator of each of SOURCES, on the CPU."""
    tokenizer = train_bpe([WORDS * 20], 300)
    found = {
        source: Generator(
            network(tokenizer, source=source, context_length=context_length),
            tokenizer,
            device="cpu",
        )
        for source in SOURCES[:2]
    }
    twin = twin_network(tokenizer, context_length)
    return {**found, "twin": Generator(twin, tokenizer, device="cpu", defaults={"draws": 3})}
