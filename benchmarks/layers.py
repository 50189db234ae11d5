"""Which layers of a language model matter least to its flow model: one after the other is left out.

    python benchmarks/layers.py RUN --data DATA [--keep 12] [--sequences 8] > layers.jsonl

RUN is a run or model directory of `fsdfm adapt`, best with all layers and after some updates. From
the layers that are left, the one whose absence costs least is left out next; a line names it, those
that stay, and the bound with them: nats a token over sequences of the training split with fixed
noise, at times spread evenly. Of a run with attention=causal it is the exact likelihood. Nothing is
trained in between, so the figures rank layers and say nothing of what training would mend.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fsdfm.core.device import preferred_dtype
from fsdfm.flow.grid import SMALLEST_STEP
from fsdfm.model.causal import CausalNetwork
from fsdfm.model.io.pretrained import load_pretrained
from fsdfm.study.autoregressive import TIME
from fsdfm.text.store import TokenStore


class Probe:
    """Sequences of data in which some tokens are hidden, and what a network says of these.

    Args:
        model: of `fsdfm adapt`.
        x_1: data, (B, L). Sequence k is at time (k + 1/2) / B.
    """

    def __init__(self, model: CausalNetwork, x_1: Tensor) -> None:
        self.model, self.x_1 = model, x_1
        count = len(x_1)
        if model.config.left_to_right:
            self.t = torch.full((count,), TIME)
            self.hidden = torch.ones(x_1.shape, dtype=torch.bool)
            shown = x_1
        else:
            self.t = (torch.arange(count) + 0.5) / count
            u = torch.rand(x_1.shape, generator=torch.Generator().manual_seed(0))
            self.hidden = u >= self.t[:, None]
            shown = x_1.masked_fill(self.hidden, model.config.vocab_size)
        tokens = model.shifted(shown)
        self.condition = model.condition(self.t, torch.full((count,), SMALLEST_STEP))
        self.tables = model.rotary_emb.tables(tokens.shape[1])
        self.start = model.vocab_embed(tokens)

    def through(self, x: Tensor, blocks: Sequence[int]) -> Iterator[Tensor]:
        """What follows each of some blocks."""
        for number in blocks:
            x = self.model.blocks[number](x, self.condition, *self.tables)
            yield x

    def nats(self, x: Tensor) -> float:
        """A token, from what follows the last block: the mean over sequences of their means."""
        rows = self.model.output_layer.final(x[:, : self.x_1.shape[1]], self.condition)
        means = []
        for row, data, hidden in zip(rows, self.x_1, self.hidden, strict=True):
            if hidden.any():
                logits = self.model.head(row[hidden])[:, : self.model.config.vocab_size]
                means.append(float(F.cross_entropy(logits.float(), data[hidden])))
        return statistics.fmean(means)


def left_out(probe: Probe, keep: int) -> Iterator[dict[str, object]]:
    """One layer after the other, the cheapest first."""
    kept, x = list(range(len(probe.model.blocks))), probe.start
    *_, last = probe.through(x, kept)
    yield {"layers": len(kept), "without": None, "nats": probe.nats(last), "kept": kept}
    while len(kept) > keep:
        before = [probe.start, *probe.through(probe.start, kept[:-1])]
        nats = []
        for place in range(len(kept)):
            *_, last = [before[place], *probe.through(before[place], kept[place + 1 :])]
            nats.append(probe.nats(last))
        place = min(range(len(kept)), key=nats.__getitem__)
        without = kept.pop(place)
        yield {"layers": len(kept), "without": without, "nats": nats[place], "kept": list(kept)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run or model directory")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--keep", type=int, default=12)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    model = load_pretrained(args.run).model
    if not isinstance(model, CausalNetwork):
        parser.error(f"{args.run} is no run of fsdfm adapt.")
    split = TokenStore.open(args.data).train
    x_1 = split.batch(0, batch_size=args.sequences, length=args.length, seed=1)
    dtype = preferred_dtype(torch.device("cpu"))
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for row in left_out(Probe(model, x_1), args.keep):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
