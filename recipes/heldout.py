"""Write the validation documents of prepared data as text, gzipped JSON lines.

    python recipes/heldout.py DATA heldout.jsonl.gz

The held-out text that ships is the validation split of the first text that SmolLM2 was adapted on
here. What was trained later does without it (`corpus.py --without`).
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

from fsdfm.core.files import write_whole
from fsdfm.eval.heldout import HeldOut


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    data, out = map(Path, sys.argv[1:])
    documents = HeldOut.open(data).documents
    lines = "".join(json.dumps({"text": d}, ensure_ascii=False) + "\n" for d in documents)
    write_whole(out, gzip.compress(lines.encode(), mtime=0))
    print(f"{out}: {len(documents)} documents, {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
