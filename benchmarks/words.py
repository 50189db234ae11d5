"""How many words of some texts occur nowhere in others.

    fsdfm generate --num-samples 8 --seed 100 --json > texts.jsonl
    python benchmarks/words.py texts.jsonl --known PACKED.jsonl.gz [...]

A word is a run of letters; case does not count. Texts and known texts are what fsdfm prepare reads.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from fsdfm.text.corpus import read_documents

WORD = re.compile(r"[^\W\d_]+")


def words(path: Path) -> Iterator[str]:
    """The words of a file, in lower case."""
    for document in read_documents(path):
        yield from (word.lower() for word in WORD.findall("".join(document)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path)
    parser.add_argument("--known", type=Path, nargs="+", required=True)
    args = parser.parse_args()
    known = {word for path in args.known for word in words(path)}
    found = list(words(args.texts))
    unknown = [word for word in found if word not in known]
    share = 100.0 * len(unknown) / max(1, len(found))
    print(f"{share:.1f} % of {len(found):,} words, such as {', '.join(unknown[:12])}")


if __name__ == "__main__":
    main()
