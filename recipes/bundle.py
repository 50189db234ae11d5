"""Save a run's model for shipping: half the size, weights in float16.

python recipes/bundle.py RUN OUT_DIR
"""

from __future__ import annotations

import sys

import torch

from fsdfm.model.io.pretrained import load_pretrained, save_pretrained


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    run, out = sys.argv[1:]
    trained = load_pretrained(run)
    save_pretrained(
        out,
        trained.model,
        tokenizer_json=trained.tokenizer_json,
        generation=trained.generation,
        dtype=torch.float16,
        ancestors=trained.ancestors,
    )
    print(f"{out}: {sum(p.numel() for p in trained.model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
