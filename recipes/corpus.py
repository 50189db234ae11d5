"""Pick the documents of the bundled model from packed corpus files.

    python recipes/corpus.py PACKED.jsonl.gz [...] --sources austen sotu:0.5 --out prose.jsonl

A share after a name keeps that part of its documents, spread evenly.
Each line of the packed files (.jsonl, .jsonl.gz) is {"source": ..., "text": ...}; recipes/README.md
says from which packages a stranger rebuilds them.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path


def documents(path: Path) -> Iterator[dict[str, str]]:
    """The lines of a packed file."""
    unpack = gzip.open if path.suffix == ".gz" else open
    with unpack(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def share(text: str) -> tuple[str, float]:
    """PREFIX or PREFIX:SHARE, where the prefix may hold a colon of its own."""
    prefix, colon, number = text.rpartition(":")
    if colon and number.strip().replace(".", "", 1).isdigit():
        return prefix, float(number)
    return text, 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packed", type=Path, nargs="+")
    parser.add_argument(
        "--sources", nargs="+", required=True, help="PREFIX[:SHARE] of source names"
    )
    parser.add_argument(
        "--without", type=Path, help="packed documents that are left out: held-out ones"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    shares = dict(share(text) for text in args.sources)
    left_out = {document["text"] for document in documents(args.without)} if args.without else set()
    characters: dict[str, int] = {}
    due = dict.fromkeys(shares, 0.0)
    with args.out.open("w", encoding="utf-8") as out:
        for document in (each for path in args.packed for each in documents(path)):
            prefix = next((n for n in shares if document["source"].startswith(n)), None)
            if prefix is None or document["text"] in left_out:
                continue
            due[prefix] += shares[prefix]
            if due[prefix] >= 1.0:
                due[prefix] -= 1.0
                out.write(json.dumps({"text": document["text"]}, ensure_ascii=False) + "\n")
                name = document["source"]
                characters[name] = characters.get(name, 0) + len(document["text"])
    for name, count in characters.items():
        print(f"{count / 1e6:6.2f} M characters  {name}")
    if not characters:
        raise SystemExit("No document of these sources: nothing was written.")


if __name__ == "__main__":
    main()
