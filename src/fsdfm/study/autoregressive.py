"""A causal twin drawn token by token: what the same hours of training would have given.

A network of the same layers, vocabulary and data, trained to predict the next token (attention
causal), is the honest rival of a flow model made from the same language model.

Shapes: B sequences, L positions, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fsdfm.core.errors import ConfigError
from fsdfm.flow.grid import SMALLEST_STEP
from fsdfm.model.attention import attend
from fsdfm.model.causal import CausalBlock, CausalNetwork
from fsdfm.model.fused import swiglu, turned
from fsdfm.model.transformer import FlowNetwork
from fsdfm.train.next_token import TIME


class Autoregressive:
    """A causal network as a language model with the keys and values of the past.

    Args:
        model: a `CausalNetwork` with causal attention and the shift.

    Raises:
        ConfigError: another network.
    """

    def __init__(self, model: FlowNetwork) -> None:
        if not isinstance(model, CausalNetwork) or not model.config.left_to_right:
            raise ConfigError("The model is not autoregressive: adapt one with attention=causal.")
        if model.config.start_id is None:
            raise ConfigError("The model has no start token: adapt with shift left.")
        self.model, self.config, self.start = model, model.config, model.config.start_id
        times = torch.tensor([TIME]), torch.tensor([SMALLEST_STEP])
        with torch.no_grad():
            self.condition = model.condition(*times)

    @torch.no_grad()
    def log_probability(self, ids: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """ln p of each id given those before it in its block of the context's length, nats."""
        context, found = self.config.context_length, []
        for start in range(0, len(ids), context):
            x = torch.as_tensor(ids[start : start + context], dtype=torch.int64)[None]
            hidden = self.model.body(x, torch.tensor([TIME]), torch.tensor([SMALLEST_STEP]))
            logits = self.model.head(hidden[0]).float()[:, : self.config.vocab_size]
            found.append(logits.log_softmax(-1).gather(1, x[0, :, None])[:, 0])
        return torch.cat(found).double().numpy()

    def sample(self, length: int, seed: int) -> list[int]:
        """One text, see `samples`."""
        return next(iter(self.samples(length, [seed])))

    def samples(
        self,
        length: int,
        seeds: Sequence[int],
        temperature: float = 1.0,
        advance: Callable[[], None] | None = None,
    ) -> list[list[int]]:
        """Draw texts token by token, all together; see `fill`.

        Args:
            length: L, tokens of each; it may exceed the context that training showed.
            seeds: one for each text.
            temperature: divides the logits.
            advance: called after every token of all texts.
        """
        return self.fill([[None] * length] * len(seeds), seeds, temperature, advance)

    @torch.no_grad()
    def fill(
        self,
        texts: Sequence[Sequence[int | None]],
        seeds: Sequence[int],
        temperature: float = 1.0,
        advance: Callable[[], None] | None = None,
    ) -> list[list[int]]:
        """Draw the open tokens of texts from left to right; each sees all before it and no other.

        Args:
            texts: B lists of L ids, None where one is to be drawn.
            seeds: one for each text.
            temperature: divides the logits; 0 takes the likeliest token.
            advance: called after every position of all texts.

        Returns:
            B lists of L ids.
        """
        length = len(texts[0])
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        cos, sin = self.model.rotary_emb.tables(length)
        pasts = [_Past(block, len(seeds), length) for block in self.model.blocks]
        token = torch.full((len(seeds),), self.start, dtype=torch.int64)
        written: list[Tensor] = []
        for place in range(length):
            x = self.model.vocab_embed(token)[:, None]
            for past in pasts:
                x = past.step(x, self.condition, cos[place : place + 1], sin[place : place + 1])
            given = [text[place] for text in texts]
            if None in given:
                hidden = self.model.output_layer.final(x, self.condition)[:, 0]
                logits = self.model.head(hidden).float()[:, : self.config.vocab_size]
                drawn = _drawn(logits.double(), temperature, generators)
                given = [d if g is None else g for g, d in zip(given, drawn, strict=True)]
            token = torch.tensor(given)
            written.append(token)
            if advance is not None:
                advance()
        return torch.stack(written, 1).tolist()


def _drawn(logits: Tensor, temperature: float, generators: list[torch.Generator]) -> list[int]:
    """A token of each row of logits (B, V)."""
    if temperature == 0.0:
        return logits.argmax(-1).tolist()
    p = (logits / temperature).softmax(-1)
    pairs = zip(p, generators, strict=True)
    return [int(torch.multinomial(row, 1, generator=generator)) for row, generator in pairs]


class _Past:
    """A block, and the keys and values that it has made so far."""

    def __init__(self, block: torch.nn.Module, batch: int, length: int) -> None:
        assert isinstance(block, CausalBlock)
        size = block.attn_out.in_features // block.heads
        self.block, self.filled = block, 0
        self.keys = torch.zeros(batch, block.kv_heads, length, size)
        self.values = torch.zeros(batch, block.kv_heads, length, size)

    def step(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """One position: x (B, 1, D), its tables (1, d) -> (B, 1, D)."""
        block = self.block
        shift_a, scale_a, shift_m, scale_m = block.modulations(c).chunk(4, dim=-1)
        q, k, v = block.split(block.qkv(block.norm1.modulated(x, shift_a, scale_a)))
        now, self.filled = self.filled, self.filled + 1
        self.keys[:, :, now] = turned(k, cos, sin)[:, :, 0]
        self.values[:, :, now] = v[:, 0]
        past = slice(0, self.filled)
        y = attend(turned(q, cos, sin), self.keys[:, :, past], self.values[:, :, past])
        x = x + block.attn_out(y)
        mixed: Tensor = x + block.mlp_out(
            swiglu(block.mlp_in(block.norm2.modulated(x, shift_m, scale_m)))
        )
        return mixed
