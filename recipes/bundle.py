"""Save a run's model for shipping, in few bits.

    python recipes/bundle.py RUN OUT_DIR --bits vocab_embed=6 joint=4 blocks=5

Bits are those of the tensors whose names begin so; the others are saved in float16.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fsdfm.model.io.pretrained import load_pretrained, save_pretrained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", nargs="*", default=[], metavar="PREFIX=BITS")
    args = parser.parse_args()
    bits = {prefix: int(count) for prefix, _, count in (b.partition("=") for b in args.bits)}
    trained = load_pretrained(args.run)
    save_pretrained(
        args.out,
        trained.model,
        tokenizer_json=trained.tokenizer_json,
        generation=trained.generation,
        bits=bits,
        ancestors=trained.ancestors,
    )
    size = (args.out / "model.safetensors").stat().st_size / 2**20
    print(f"{args.out}: {sum(p.numel() for p in trained.model.parameters()):,} parameters")
    print(f"{size:.1f} MiB, descends from {', '.join(trained.ancestors) or 'nothing'}")


if __name__ == "__main__":
    main()
