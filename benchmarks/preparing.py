"""How fast texts are prepared, beside what `tokenizers` alone does, and with how much memory.

    python benchmarks/preparing.py TEXTS... --sizes 10 100 --workers 1 2

TEXTS are files for `fsdfm prepare`. They are repeated up to each size (MB), each document with a
number in front, so that none is a duplicate. `tokenizers alone` encodes the same documents in the
same batches, from memory, with as many threads as it likes, and keeps nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from fsdfm.text.packing import prepare
from fsdfm.text.shards import BATCH_CHARACTERS
from fsdfm.text.sources import find_sources
from fsdfm.text.tokenizer import Tokenizer, train_bpe


def grown(texts: list[str], megabytes: float) -> Iterator[str]:
    """The texts over and over, numbered."""
    left = megabytes * 1e6
    for turn in itertools.count():
        for text in texts:
            yield (line := f"{turn} {text}")
            left -= len(line.encode())
            if left <= 0:
                return


def alone(texts: list[str], tokenizer: Tokenizer) -> float:
    """Seconds of `tokenizers` for these texts."""
    backend, started = tokenizer._backend, time.perf_counter()
    batch, characters = list[str](), 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            backend.encode_batch_fast(batch, add_special_tokens=False)
            batch, characters = [], 0
    backend.encode_batch_fast(batch, add_special_tokens=False)
    return time.perf_counter() - started


def one(source: str, out: str, tokenizer: str, workers: int) -> None:
    """Prepare in this process, and print its seconds and its peak of memory, MB."""
    model, started = Tokenizer.from_file(tokenizer), time.perf_counter()
    prepare([source], Path(out), tokenizer=model, workers=workers)
    seconds = time.perf_counter() - started
    # Linux's own count: getrusage's begins with that of the process that started this one.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    print(json.dumps([seconds, int(peak[1]) / 1e3]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="*")
    parser.add_argument("--sizes", nargs="+", type=float, default=[10, 100], help="MB")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return one(*args.one[:3], int(args.one[3]))
    found = find_sources(args.texts)
    documents = ["".join(d) for source in found for d in source.documents(None, "text")]
    model = train_bpe(grown(documents, 5), args.vocab_size)
    print("| MB | side | MB/s | peak MB of the main process |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        (tokenizer := Path(place, "tokenizer.json")).write_text(model.to_json())
        for size in args.sizes:
            texts = list(grown(documents, size))
            with (path := Path(place, "texts.jsonl")).open("w") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
            seconds = alone(texts, model)
            del texts
            print(f"| {size:g} | tokenizers alone | {size / seconds:.2f} | |", flush=True)
            for workers in args.workers:
                words = ["--one", path, Path(place, f"out{size}-{workers}"), tokenizer, workers]
                done = subprocess.run(
                    [sys.executable, __file__, *map(str, words)], check=True, capture_output=True
                )
                seconds, peak = json.loads(done.stdout)
                row = f"prepare, {workers} worker{'s' * (workers != 1)}"
                print(f"| {size:g} | {row} | {size / seconds:.2f} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    main()
