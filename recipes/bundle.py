"""Save a run's model for shipping, in few bits.

    python recipes/bundle.py RUN OUT_DIR --bits vocab_embed=6 joint=4 blocks=5 --calibrate DATA

Bits are those of the tensors whose names begin so; the others are saved in float16. With
--calibrate, rounding looks at what the matrices read on training text of a prepared directory
(`fsdfm.model.rounding`): it takes minutes, and costs far less likelihood.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fsdfm.core.errors import FsdfmError
from fsdfm.model.io.pretrained import load_pretrained, save_pretrained
from fsdfm.recipes.calibration import rounded_on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", nargs="*", default=[], metavar="PREFIX=BITS")
    parser.add_argument("--calibrate", type=Path, metavar="DATA")
    parser.add_argument("--temperature", type=float, help="that it is to draw with by default")
    args = parser.parse_args()
    bits = {prefix: int(count) for prefix, _, count in (b.partition("=") for b in args.bits)}
    trained = load_pretrained(args.run)
    own = {} if args.temperature is None else {"temperature": args.temperature}
    packed = None
    if args.calibrate is not None:
        packed = rounded_on(trained, args.run, args.calibrate, bits, progress=say)
    save_pretrained(
        args.out,
        trained.model,
        tokenizer_json=trained.tokenizer_json,
        generation={**trained.generation, **own},
        bits=bits,
        packed=packed,
        ancestors=trained.ancestors,
    )
    size = (args.out / "model.safetensors").stat().st_size / 2**20
    print(f"{args.out}: {sum(p.numel() for p in trained.model.parameters()):,} parameters")
    print(f"{size:.1f} MiB, descends from {', '.join(trained.ancestors) or 'nothing'}")


def say(name: str, done: int, total: int) -> None:
    print(f"{done}/{total} {name}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main()
    except FsdfmError as error:
        sys.exit(f"error: {error}")
