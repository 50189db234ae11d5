"""What few bits a weight cost: size, and the bound on the same text under the same noise.

    python benchmarks/bits.py MODEL --text DATA --rules =8 =6 =5 vocab_embed=5 blocks=5 \
        vocab_embed=6,joint=4,blocks=5 [--calibrate DATA]

A rule says how many bits the tensors get whose names begin so, as recipes/bundle.py takes it; =5 is
all of them. What is not named is float16. The loss is the difference to the model as it is, in nats
a token, with the deviation of its mean over sequences. With --calibrate, every rule is measured
once more, rounded with a view to the training text of DATA, as recipes/bundle.py does it. The bound
asks no joint head: what its bits cost is not in the loss.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path

from bound import nats_by_sequence

from fsdfm.model.io.pretrained import load_pretrained, save_pretrained
from fsdfm.recipes.calibration import rounded_on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--rules", nargs="+", required=True)
    parser.add_argument("--calibrate", type=Path, metavar="DATA")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--times", type=int, default=8)
    args = parser.parse_args()
    exact, _ = nats_by_sequence(str(args.model), args)
    model = load_pretrained(args.model)
    for rule in args.rules:
        pairs = (part.partition("=") for part in rule.split(","))
        bits = {prefix: int(count) for prefix, _, count in pairs}
        for data in dict.fromkeys((None, args.calibrate)):
            packed = None if data is None else rounded_on(model, args.model, data, bits)
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "few"
                save_pretrained(
                    out,
                    model.model,
                    tokenizer_json=model.tokenizer_json,
                    generation=model.generation,
                    bits=bits,
                    packed=packed,
                )
                size = sum(path.stat().st_size for path in out.iterdir()) / 2**20
                rounded, _ = nats_by_sequence(str(out), args)
            lost = [b - a for a, b in zip(exact, rounded, strict=True)]
            row = {
                "rule": rule,
                "rounding": "nearest" if data is None else "calibrated",
                "mebibytes": round(size, 1),
                "nats_per_token_lost": round(statistics.fmean(lost), 4),
                "deviation": round(statistics.stdev(lost) / math.sqrt(len(lost)), 4),
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
