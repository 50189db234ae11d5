"""Which layers of a network from `fsdfm adapt` are missed least: one after the other is left out.

    python benchmarks/layers.py RUN --data DATA [--keep 12] [--sequences 8] > layers.jsonl

RUN has all layers. A line names the layer that is left out next, those that stay, and nats a token
with them over sequences of the training split, at times spread evenly (of a run with
attention=causal: of the next token). `--looked-at 99` tries every layer at each turn; the default
is what `fsdfm adapt --layers K` does. `--kept 0,1,5 0,2,5` tells the nats with these layers
instead. Nothing is trained in between, so the figures rank layers and say nothing of what training
would mend.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from fsdfm.core.device import preferred_dtype
from fsdfm.model.causal import CausalNetwork
from fsdfm.model.io.pretrained import load_pretrained
from fsdfm.recipes.depth import LOOKED_AT, Depth, Probe, left_out
from fsdfm.text.store import TokenStore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run or model directory")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--keep", type=int, default=12)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--looked-at", type=int, default=LOOKED_AT)
    parser.add_argument("--kept", nargs="+", help="lists of layers, instead of a choice")
    args = parser.parse_args()
    model = load_pretrained(args.run).model
    if not isinstance(model, CausalNetwork):
        parser.error(f"{args.run} is no run of fsdfm adapt.")
    split = TokenStore.open(args.data).train
    x_1 = split.batch(0, batch_size=args.sequences, length=args.length, seed=0)
    dtype = preferred_dtype(torch.device("cpu"))
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        probe = Probe(model, x_1)
        for layers in args.kept or ():
            kept = tuple(map(int, layers.split(",")))
            print(json.dumps(asdict(Depth(kept, None, probe.nats(probe.start, kept)))), flush=True)
        choice = () if args.kept else left_out(probe, args.keep, looked_at=args.looked_at)
        for depth in choice:
            print(json.dumps(asdict(depth)), flush=True)


if __name__ == "__main__":
    main()
