"""The bound on the likelihood of a text, in bits a byte: of flow models, whatever their tokenizers.

Of a network of `fsdfm adapt --attention causal` it is the likelihood itself, whatever `times`.

    python benchmarks/bound.py MODEL... [--text FILE] [--length 256] [--sequences 64] [--times 16]

FILE is a .txt or .jsonl (also .gz), or a directory of fsdfm prepare, whose validation split is
taken; without it, the held-out text of the package. Every sequence has its own noise, so that a row
does not depend on the batch. The interval is that of the mean over sequences (95 %). Bounds of a
uniform and of a masked source are not comparable: the uniform one is loose.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

import numpy as np
import torch

from fsdfm.core.device import preferred_dtype
from fsdfm.eval.heldout import Blocks, HeldOut
from fsdfm.eval.statistics import student_quantile
from fsdfm.flow.loss import elbo_nats_per_token
from fsdfm.flow.path import make_source
from fsdfm.flow.schedule import Polynomial
from fsdfm.generate.loading import load_with_network
from fsdfm.model.io.directory import resolve
from fsdfm.model.io.pretrained import Pretrained, load_pretrained, read_config
from fsdfm.study.autoregressive import Autoregressive
from fsdfm.text.tokenizer import Tokenizer


def nats_by_sequence(name: str, args: argparse.Namespace) -> tuple[list[float], list[int]]:
    """The bound of every sequence in nats a token (of a causal network exact), and its UTF-8 bytes.

    Args:
        name: of a model directory, or `bundled`.
        args: text, length, sequences, times.
    """
    if name != "bundled" and read_config(resolve(name))[0].left_to_right:
        return exact_nats(load_pretrained(name), args)
    generator, found = load_with_network(None if name == "bundled" else name, device="cpu")
    config, chosen = generator.config, held_out(generator.tokenizer, args)
    source = make_source(config.source, config.vocab_size)
    schedule, nats = Polynomial(config.schedule_power), []
    for number, ids in enumerate(chosen):
        with generator.autocast():
            bounds = elbo_nats_per_token(
                found.model,
                torch.tensor([ids]),
                source,
                schedule,
                times=args.times,
                first=number,
            )
            nats.append(statistics.fmean(bounds))
    return nats, [len(generator.decode(ids).encode()) for ids in chosen]


def exact_nats(found: Pretrained, args: argparse.Namespace) -> tuple[list[float], list[int]]:
    """As `nats_by_sequence`, of a language model."""
    model, tokenizer = Autoregressive(found.model), Tokenizer.from_json(found.tokenizer_json)
    chosen, dtype = held_out(tokenizer, args), preferred_dtype(torch.device("cpu"))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        nats = [-float(model.log_probability(np.array(ids)).mean()) for ids in chosen]
    return nats, [len(tokenizer.decode(ids).encode()) for ids in chosen]


def held_out(tokenizer: Tokenizer, args: argparse.Namespace) -> list[list[int]]:
    """Token ids of the sequences to judge by."""
    blocks = Blocks.cut(HeldOut.open(args.text), tokenizer, args.length, seed=0)
    return (blocks.human + blocks.others)[: args.sequences]


def bound(name: str, args: argparse.Namespace) -> dict[str, object]:
    """One row: bits a byte with its interval, nats a token."""
    nats, sizes = nats_by_sequence(name, args)
    pairs = zip(nats, sizes, strict=True)
    bits = [each * args.length / math.log(2.0) / size for each, size in pairs]
    spread = statistics.stdev(bits) / math.sqrt(len(bits))
    return {
        "model": Path(name).name,
        "text": "bundled" if args.text is None else args.text.name,
        "length": args.length,
        "sequences": len(bits),
        "times": args.times,
        "bits_per_byte": round(statistics.fmean(bits), 4),
        "interval": round(spread * student_quantile(0.975, len(bits) - 1), 4),
        "nats_per_token": round(statistics.fmean(nats), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", help="model directories, or `bundled`")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--times", type=int, default=16)
    args = parser.parse_args()
    for name in args.models:
        print(json.dumps(bound(name, args)), flush=True)


if __name__ == "__main__":
    main()
