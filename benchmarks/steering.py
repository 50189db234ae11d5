"""What steering costs and does, on a model of yours or the bundled one.

    python benchmarks/steering.py cost words lengths auto sides seam --out steering.json

Each part prints its figures and keeps them in the JSON file. `auto` and `seam` ask a judge.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fsdfm.eval.heldout import HeldOut
from fsdfm.eval.judge import load_judge
from fsdfm.generate.generator import Generator
from fsdfm.generate.loading import load
from fsdfm.generate.request import Request

WORDS = ("river", "morning", "captain", "green")


def cost(generator: Generator, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a text by its length; the least of some repeats."""
    found = {}
    for length in (16, 64, 256, 1024):
        times = []
        for seed in range(args.repeats):
            (result,) = generator.answer([Request(length=length, seed=seed)])
            times.append(result.seconds)
        found[str(length)] = {"seconds": round(min(times), 3), "calls": result.calls}
    return found


def words(generator: Generator, args: argparse.Namespace) -> dict[str, Any]:
    """Of some texts each: how many have a required word, and how many a banned one."""
    plain = [Request(length=24, seed=i, end="never", steps=4) for i in range(args.requests)]
    required = [replace(r, require=(WORDS[i % 4],)) for i, r in enumerate(plain)]
    banned = [replace(r, ban=("the", "and", "of")) for r in plain]
    with_it = generator.answer(required)
    without = generator.answer(banned)
    as_it_is = generator.answer(plain)

    def has(text: str) -> bool:
        return any(word in text for word in ("the", "and", "of"))

    return {
        "required_there": sum(WORDS[i % 4] in r.text for i, r in enumerate(with_it)),
        "banned_there": sum(has(r.text) for r in without),
        "banned_there_if_not_banned": sum(has(r.text) for r in as_it_is),
        "calls_banned": sum(r.calls for r in without) / args.requests,
        "calls_plain": sum(r.calls for r in as_it_is) / args.requests,
    }


def pieces(generator: Generator, count: int, size: int, seed: int = 0) -> list[list[int]]:
    """Held-out pieces of `size` tokens."""
    draw, texts, found = random.Random(seed), HeldOut.open(None).documents, []
    while len(found) < count:
        text = draw.choice(texts)
        begin = draw.randrange(max(1, len(text) - 4000))
        ids = generator.tokenizer.encode(text[begin : begin + 4000])
        if len(ids) > size:
            first = draw.randrange(len(ids) - size)
            found.append(ids[first : first + size])
    return found


def lengths(generator: Generator, args: argparse.Namespace) -> dict[str, Any]:
    """Held-out spans of 1 to 12 tokens, found again as a gap of 1 to 16: true and chosen."""
    pairs = []
    for i, ids in enumerate(pieces(generator, args.texts, 80)):
        true, decode = (1, 2, 3, 4, 6, 8, 10, 12)[i % 8], generator.decode
        before, after = decode(ids[:40]), decode(ids[40 + true : 64 + true])
        before, after = (text.replace("[", "(").replace("]", ")") for text in (before, after))
        request = Request(template=f"{before}[[1-16]]{after}", steps=1, seed=i)
        (result,) = generator.answer([request])
        pairs.append((true, result.tokens))
    both = torch.tensor(pairs, dtype=torch.float64)
    return {
        "pairs": pairs,
        "correlation": float(torch.corrcoef(both.T)[0, 1]),
        "mean_error": float((both[:, 0] - both[:, 1]).abs().mean()),
        "mean_error_of_8": float((both[:, 0] - 8).abs().mean()),
    }


def judged(judge: Any, texts: list[str]) -> float:
    """Nats a byte of texts."""
    scores = [j.score for j in judge.judge(texts)]
    return sum(s.nats for s in scores) / sum(len(t.encode()) for t in texts)


def auto(generator: Generator, args: argparse.Namespace) -> dict[str, Any]:
    """Fixed numbers of calls and the automatic one: calls spent, and the judge's nats a byte."""
    judge, found = make_judge(args), {}
    for steps in (2, 4, 8, 16, "auto"):
        requests = [
            Request(length=128, seed=i, steps=steps, end="never")  # type: ignore[arg-type]
            for i in range(args.texts)
        ]
        results = generator.answer(requests)
        found[str(steps)] = {
            "calls": sum(r.calls for r in results) / len(results),
            "judge_nats_per_byte": judged(judge, [r.text for r in results]),
            "own_nats_per_token": -sum(r.score for r in results) / len(results),
        }
    return found


def sides(generator: Generator, args: argparse.Namespace) -> dict[str, Any]:
    """Held-out gaps of 8 tokens: exact tokens where both sides are seen, and the left one only."""
    hits: dict[str, int] = {"both": 0, "left": 0}
    texts = pieces(generator, args.texts, 72)
    for i, ids in enumerate(texts):
        before, true, after = ids[:32], ids[32:40], ids[40:]
        x = [*before, *true, *after]
        for name, row in (("both", x), ("left", x[:40])):
            frozen = [not 32 <= k < 40 for k in range(len(row))]
            (sample,) = generator.fill([row], [frozen], seed=i, temperature=0.0).samples
            hits[name] += sum(p == q for p, q in zip(sample.token_ids[32:40], true, strict=True))
    return {name: count / (8 * len(texts)) for name, count in hits.items()}


def seam(generator: Generator, args: argparse.Namespace) -> dict[str, Any]:
    """A long text: the judge's nats a byte of 200 characters at seams, and elsewhere."""
    judge, context = make_judge(args), generator.config.context_length
    length = context + (args.windows - 1) * (context - context // 4)
    began = time.perf_counter()
    (result,) = generator.answer([Request(length=length, seed=1, end="keep")])
    seconds = time.perf_counter() - began
    at, elsewhere = [], []
    for k in range(args.windows - 1):
        for places, shift in ((at, 0), (elsewhere, context // 4), (elsewhere, -context // 4)):
            end = context + k * (context - context // 4) + shift
            middle = len(generator.decode(result.token_ids[:end]))
            before = result.text[max(0, middle - 1000) : middle]
            places.append((before, result.text[middle : middle + 200]))

    def nats(places: list[tuple[str, str]]) -> float:
        prefixes, texts = [p for p, _ in places], [t for _, t in places]
        scores = [j.score for j in judge.judge(texts, prefixes)]
        return sum(s.nats for s in scores) / sum(len(t.encode()) for t in texts)

    sentences = [s.strip() for s in result.text.split(".") if len(s.strip()) > 20]
    return {
        "tokens": length,
        "seconds": seconds,
        "calls": result.calls,
        "seam_nats_per_byte": nats(at),
        "elsewhere_nats_per_byte": nats(elsewhere),
        "repeated_sentences": len(sentences) - len(set(sentences)),
        "characters": len(result.text),
    }


def make_judge(args: argparse.Namespace) -> Any:
    """The judge that was asked for."""
    return load_judge(args.judge, device=torch.device("cpu"), dtype=torch.float32)


PARTS: dict[str, Callable[[Generator, argparse.Namespace], dict[str, Any]]] = {
    each.__name__: each for each in (cost, words, lengths, auto, sides, seam)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--model")
    parser.add_argument("--judge", default="smollm2")
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    generator = load(args.model, device="cpu")
    for part in args.parts:
        began = time.perf_counter()
        found = PARTS[part](generator, args)
        found["minutes"] = round((time.perf_counter() - began) / 60, 1)
        print(part, json.dumps(found), flush=True)
        kept = json.loads(args.out.read_text()) if args.out.exists() else {}
        args.out.write_text(json.dumps({**kept, part: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
