"""What the number formats cost in quality, beside float32: the engine's, and attention's on a CPU.

    python benchmarks/precision.py
    python benchmarks/precision.py --model runs/student --blocks 8

First, KL(float32 || format) of the posterior on held-out text, a time a line, h = 1/8: so many nats
more a token costs when this format draws it. Then the bound on held-out text with PyTorch's
attention and with ours. Then errors of attention, relative to float64, for random queries and keys
whose scores have a standard deviation of 1, 10 and 30.
"""

from __future__ import annotations

import argparse
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from fsdfm.eval.heldout import HeldOut
from fsdfm.flow.loss import elbo_nats_per_token
from fsdfm.flow.path import make_source, mixture_state
from fsdfm.flow.schedule import Polynomial
from fsdfm.generate.generator import Generator
from fsdfm.generate.loading import load_with_network
from fsdfm.model import causal, transformer
from fsdfm.model.attention import attend
from fsdfm.model.engine import Engine
from fsdfm.model.int8 import has_int8
from fsdfm.model.transformer import FlowNetwork

TIMES, H = (0.0, 0.25, 0.5, 0.75, 0.875), 0.125
SCALES = (1.0, 10.0, 30.0)


def usual(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """PyTorch's attention, in the shape of ours."""
    shared = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=shared)
    return y.transpose(1, 2).flatten(2)


class Bound:
    """The network for the bound: body under bfloat16 autocast or not, logits in float32."""

    def __init__(self, model: FlowNetwork, autocast: bool) -> None:
        self.model, self.autocast = model, autocast

    def body(self, x_t: Tensor, t: Tensor, h: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.model.body(x_t, t, h).float()

    def told(self, rows: Tensor, at: Tensor, x: Tensor, known: Tensor) -> Tensor:
        return self.model.told(rows, at, x, known)

    def head_parameters(self) -> tuple[Tensor, Tensor]:
        return self.model.head_parameters()


def held_out(generator: Generator, blocks: int) -> Tensor:
    """Tokens of held-out text, (blocks, L)."""
    ids: list[int] = []
    for text in HeldOut.open(None).documents:
        ids += generator.tokenizer.encode(text)
    length = generator.config.context_length
    blocks = min(blocks, len(ids) // length)
    return torch.tensor(ids[: blocks * length]).view(blocks, length)


@torch.no_grad()
def log_posterior(engine: Engine, x: Tensor, t: float, vocab_size: int) -> Tensor:
    hidden = engine.hidden(x, t, H, torch.arange(x.numel()))
    return engine.head(hidden)[:, :vocab_size].float().log_softmax(-1)


def kl_of_formats(model: FlowNetwork, x_1: Tensor) -> None:
    """Nats a token, over the positions that are drawn: all, or the masked ones."""
    config, schedule = model.config, Polynomial(model.config.schedule_power)
    source = make_source(config.source, config.vocab_size)
    formats = {"bfloat16": torch.bfloat16} | ({"int8": torch.int8} if has_int8() else {})
    exact = Engine(model, torch.float32)
    engines = {name: Engine(model, dtype) for name, dtype in formats.items()}
    draw = torch.Generator().manual_seed(1)
    for t in TIMES:
        x_0 = source.draw(tuple(x_1.shape), draw)
        times = torch.full((len(x_1),), t, dtype=torch.float64)
        x = mixture_state(x_0, x_1, times, schedule, draw)
        counted = ((x == config.vocab_size) | (not source.absorbing)).flatten()
        p = log_posterior(exact, x, t, config.vocab_size)[counted]
        for name, engine in engines.items():
            q = log_posterior(engine, x, t, config.vocab_size)[counted]
            kl, entropy = (p.exp() * (p - q)).sum(-1).mean(), -(p.exp() * p).sum(-1).mean()
            print(f"t {t:5.3f}  {name:8}  KL {float(kl):.5f} of {float(entropy):.3f} nats")


def bound(model: FlowNetwork, x_1: Tensor) -> None:
    """Nats a token, the same noise for all."""
    config, schedule = model.config, Polynomial(model.config.schedule_power)
    source = make_source(config.source, config.vocab_size)
    for name, autocast, attention in (
        ("float32", False, usual),
        ("bfloat16, PyTorch's attention", True, usual),
        ("bfloat16, ours", True, attend),
    ):
        with (
            mock.patch.object(transformer, "attend", attention),
            mock.patch.object(causal, "attend", attention),
        ):
            nats = list(elbo_nats_per_token(Bound(model, autocast), x_1, source, schedule))
        print(f"bound  {name:30} {sum(nats) / len(nats):.5f} nats")


def attention_errors() -> None:
    """Output and gradients of q, k, v against float64, 4 heads x 256 positions x 32."""
    draw = torch.Generator().manual_seed(0)
    for scale in SCALES:
        sizes = (scale**0.5, scale**0.5, 1.0)
        given = [(torch.randn(1, 4, 256, 32, generator=draw) * s).bfloat16() for s in sizes]
        upstream = torch.randn(1, 256, 128, generator=draw).bfloat16()
        truth = derivatives(usual, [x.double() for x in given], upstream.double())
        for name, attention in (("PyTorch's", usual), ("ours", attend)):
            found = derivatives(attention, given, upstream)
            errors = [
                float((x.double() - y).norm() / y.norm()) for x, y in zip(found, truth, strict=True)
            ]
            figures = "  ".join(f"{e:.4f}" for e in errors)
            print(f"scores' deviation {scale:4.0f}  {name:10} y, dq, dk, dv  {figures}")


def derivatives(attention: object, given: list[Tensor], upstream: Tensor) -> list[Tensor]:
    inputs = [x.clone().requires_grad_() for x in given]
    y = attention(*inputs)  # type: ignore[operator]
    return [y.detach(), *torch.autograd.grad(y, inputs, upstream)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None, help="default: the bundled one")
    parser.add_argument("--blocks", type=int, default=2, help="of held-out text")
    args = parser.parse_args()
    generator, found = load_with_network(args.model, device="cpu")
    x_1 = held_out(generator, args.blocks)
    kl_of_formats(found.model, x_1)
    bound(found.model, x_1)
    attention_errors()


if __name__ == "__main__":
    main()
