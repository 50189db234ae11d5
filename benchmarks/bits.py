"""What few bits a weight cost: size, and the bound on the same text under the same noise.

    python benchmarks/bits.py MODEL --text DATA --rules 8 6 5 vocab_embed=5 blocks=5 \
        vocab_embed=6,joint=4,blocks=5 [--data DATA] [--beside MODEL ...]

A rule says how many bits the tensors get whose names begin so, as `fsdfm quantize` takes it; 5 is
all of them. What is not named is float16. The loss is the difference of the bound to that of the
model as it is, in nats a token, and the divergence is KL(as it is || rounded) of what they predict,
weighted as the bound; both with the deviation of their means over sequences. A model in the middle
of its training can lose less than nothing; the divergence tells what rounding changed.

With --data, every rule is measured once more, rounded with a view to the training text of DATA, as
`fsdfm quantize` does it. The models of --beside are measured against MODEL as they are, such as one
that was trained on after it was rounded. The loss asks a joint head, where there is one, so it has
what the head's bits cost; the divergence does not.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from bound import Loaded, nats_per_token
from torch import Tensor

from fsdfm.eval.heldout import Blocks, HeldOut
from fsdfm.flow.grid import SMALLEST_STEP
from fsdfm.flow.loss import LATEST_TIME, hidden_rows
from fsdfm.flow.path import Batch, make_source, on_the_path
from fsdfm.flow.schedule import Polynomial
from fsdfm.generate.loading import load_with_network
from fsdfm.recipes.quantizing import quantize
from fsdfm.text.tokenizer import Tokenizer


def nats_by_sequence(loaded: Loaded, args: argparse.Namespace) -> list[float]:
    """The bound of every sequence, in nats a token."""
    chosen = held_out(loaded[0].tokenizer, args)
    return [nats_per_token(loaded, ids, args.times, number) for number, ids in enumerate(chosen)]


def held_out(tokenizer: Tokenizer, args: argparse.Namespace) -> list[list[int]]:
    """Token ids of the sequences to judge by."""
    blocks = Blocks.cut(HeldOut.open(args.text), tokenizer, args.length, seed=0)
    return (blocks.human + blocks.others)[: args.sequences]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rules", nargs="+", required=True)
    parser.add_argument("--data", type=Path, metavar="DATA")
    parser.add_argument("--beside", nargs="*", default=[], metavar="MODEL")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--times", type=int, default=8)
    args = parser.parse_args()
    as_it_is = load_with_network(args.model, device="cpu")
    exact = nats_by_sequence(as_it_is, args)
    for rule in args.rules:
        for data in dict.fromkeys((None, args.data)):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "few"
                quantize(args.model, out, rule.split(","), data=data)
                size = sum(path.stat().st_size for path in out.iterdir()) / 2**20
                said = {
                    "rule": rule,
                    "rounding": "nearest" if data is None else "calibrated",
                    "mebibytes": round(size, 1),
                }
                tell(args, exact, as_it_is, out, said)
    for other in args.beside:
        tell(args, exact, as_it_is, Path(other), {"beside": other})


def tell(
    args: argparse.Namespace,
    exact: list[float],
    as_it_is: Loaded,
    other: Path,
    said: dict[str, Any],
) -> None:
    """What another model loses, as a line."""
    rounded = load_with_network(other, device="cpu")
    nats, apart = nats_by_sequence(rounded, args), divergences(as_it_is, rounded, args)
    lost = [b - a for a, b in zip(exact, nats, strict=True)]
    row = {
        **said,
        "nats_per_token_lost": round(statistics.fmean(lost), 4),
        "deviation": of_mean(lost),
        "divergence": round(statistics.fmean(apart), 4),
        "divergence_deviation": of_mean(apart),
    }
    print(json.dumps(row), flush=True)


@torch.no_grad()
def divergences(exact: Loaded, rounded: Loaded, args: argparse.Namespace) -> list[float]:
    """KL(exact || rounded) of the posteriors on the path, of every sequence, in nats a token.

        mean over t of g(t) sum of KL(p || q) over open positions / L

    Times are stratified over [0, 1).
    """
    config, tokenizer = exact[0].config, exact[0].tokenizer
    source = make_source(config.source, config.vocab_size)
    schedule, found = Polynomial(config.schedule_power), []
    for seed, ids in enumerate(held_out(tokenizer, args)):
        x_1, total = torch.tensor([ids]), 0.0
        noise = torch.Generator().manual_seed(seed)
        for k in range(args.times):
            u = torch.rand(1, dtype=torch.float64, generator=noise)
            t = ((k + u) / args.times).clamp_max(LATEST_TIME)
            h = torch.full_like(t, SMALLEST_STEP)
            batch = on_the_path(x_1, t, h, source, schedule, noise)
            p, q = (log_posterior(each, batch) for each in (exact, rounded))
            nats = (p.exp() * (p - q)).sum()
            total += float(schedule.rate(t) * nats) / len(ids) / args.times
        found.append(total)
    return found


def log_posterior(loaded: Loaded, batch: Batch) -> Tensor:
    """Of the rows that count, float32."""
    generator, network = loaded[0], loaded[1].model
    with generator.autocast():
        logits = network.head(hidden_rows(network, batch)[batch.places])
    return logits[..., : generator.config.vocab_size].float().log_softmax(-1)


def of_mean(values: list[float]) -> float:
    """Deviation of their mean."""
    return round(statistics.stdev(values) / math.sqrt(len(values)), 4)


if __name__ == "__main__":
    main()
