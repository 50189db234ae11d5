"""A generator as an evaluation asks for texts (`fsdfm.eval.source.TextSource`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fsdfm.core.device import hardware
from fsdfm.core.files import digest, tensor_bytes
from fsdfm.flow.loss import elbo_nats_per_token
from fsdfm.flow.path import make_source
from fsdfm.flow.schedule import Polynomial
from fsdfm.generate.generator import Generator
from fsdfm.generate.loading import load_with_network
from fsdfm.generate.results import Sample
from fsdfm.model.transformer import FlowNetwork

BOUND_TIMES = 32
"""Of a text's bound, each a pass of the body: with 24 x 1,024 tokens its spread is 0.01 nats."""


class GeneratorSource:
    """Texts and bounds of a generator's model.

    Args:
        generator: the model.
        network: its network, in float32: what a bound needs, and a generator does not keep.
    """

    def __init__(self, generator: Generator, network: FlowNetwork) -> None:
        self.generator, self.network, config = generator, network, generator.config
        self.tokenizer, self.decode = generator.tokenizer, generator.decode
        self.context_length, self.joint = config.context_length, config.neighbours > 0
        self.defaults, self.ancestors = generator.defaults, generator.ancestors
        text = json.dumps(config.to_dict(), sort_keys=True)
        weights = digest(chain([text], tensor_bytes(network.parameters())))
        self.facts: dict[str, Any] = {
            "parameters": sum(p.numel() for p in network.parameters()),
            "weights_sha256": weights,
            "tokenizer": generator.tokenizer.fingerprint,
            "source": config.source,
            "step_embedding": config.step_embedding,
            "device": hardware(generator.device),
            "dtype": str(generator.dtype).removeprefix("torch."),
        }
        # Not the step rule and its like: the bound does not depend on them.
        names = ("weights_sha256", "tokenizer", "device")
        dtype = str(generator.engine.dtype).removeprefix("torch.")
        self.bound_facts: dict[str, Any] = {n: self.facts[n] for n in names} | {
            "dtype": dtype,
            "times": BOUND_TIMES,
        }

    def generate(self, **options: Any) -> list[Sample]:
        """See `Generator`."""
        return self.generator.generate(**options).samples

    def fill(
        self, token_ids: list[list[int]], frozen: list[list[bool]], **options: Any
    ) -> list[Sample]:
        """See `Generator`."""
        return self.generator.fill(token_ids, frozen, **options).samples

    def check(self, **options: Any) -> None:
        """See `TextSource`."""
        self.generator.batches(**options)

    def bound_nats(self, ids: Sequence[int], seed: int, number: int) -> float:
        """The ELBO of a text, nats a token; see `TextSource`."""
        generator, config = self.generator, self.generator.config
        source = make_source(config.source, config.vocab_size)
        schedule = Polynomial(config.schedule_power)
        x_1 = torch.tensor([list(ids)], device=generator.device)
        found = list(
            elbo_nats_per_token(
                _Precise(generator, self.network),
                x_1,
                source,
                schedule,
                times=BOUND_TIMES,
                seed=seed,
                first=number,
            )
        )
        return sum(found) / len(found)


def load_source(
    model: str | None, device: torch.device, precision: str | None = None
) -> GeneratorSource:
    """Load a model to be judged; arguments and errors are those of `load`."""
    generator, found = load_with_network(model, device=device, precision=precision)
    return GeneratorSource(generator, found.model)


@dataclass(frozen=True, slots=True)
class _Precise:
    """A generator's network for the bound: the body in its format, logits in float32."""

    generator: Generator
    network: FlowNetwork

    def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        """See `TrainableModel`."""
        with self.generator.autocast():
            return self.network.body(x_t, t, h).float()

    def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
        """See `JointHead`; in float32, as the head."""
        return self.network.told(rows, at, x, known)

    def head_parameters(self) -> tuple[Tensor, Tensor | None]:
        """See `TrainableModel`."""
        return self.network.head_parameters()
