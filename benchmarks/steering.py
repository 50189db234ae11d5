"""What steering costs and does, on a model of yours or the bundled one.

    python benchmarks/steering.py cost words lengths auto prompts infill seam --out steering.json

Each part prints its figures and keeps them in the JSON file. What was measured of each text is kept
at once in steering.json.rows: after a kill the same command goes on, and with a larger --texts it
measures the others only; another model, text or setting is measured anew. The judge is asked by
`auto`, `prompts`, `infill` and `seam`; `infill` has a causal language model fill the same gaps from
the left.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import fsdfm
from fsdfm.core.files import digest, file_digest
from fsdfm.eval.heldout import HeldOut
from fsdfm.eval.judge import CausalJudge, load_judge
from fsdfm.generate.generator import Generator
from fsdfm.generate.loading import load
from fsdfm.generate.request import Request
from fsdfm.model.io.causal_lm import load_causal_lm
from fsdfm.model.io.pretrained import load_pretrained
from fsdfm.study.autoregressive import Autoregressive
from fsdfm.text.tokenizer import Tokenizer
from fsdfm.text.vocabulary import tokens_within

WORDS = ("river", "morning", "captain", "green")
BANNED = ("the", "and", "of")
HIDDEN = (0.1, 0.25, 0.5)
"""Shares of the tokens of an infill, in spans of SPAN: as near as whole spans come."""
SPAN, INFILL, PROMPT, CONTINUATION = 8, 128, 64, 64
"""Tokens: of a hidden span, of a text to fill, of a prompt, of what follows it."""

BUNDLED = Path(fsdfm.__file__).parent / "assets" / "bundled"
READ = (".json", ".safetensors", ".bin", ".gguf")
"""Ends of the files that a model is read from."""


def content(name: str | None) -> str:
    """Digest of what a model's path holds, None the bundled one; empty where it is no path."""
    place = BUNDLED if name is None else Path(name)
    inside = sorted(each for each in place.rglob("*") if each.suffix in READ)
    files = [place] if place.is_file() else inside
    return digest(map(file_digest, files))[:16] if files else ""


@dataclass
class Bench:
    """The model, what is asked of it, and what was measured already."""

    args: argparse.Namespace

    @cached_property
    def generator(self) -> Generator:
        return load(self.args.model, device="cpu")

    @cached_property
    def judge(self) -> CausalJudge:
        return load_judge(self.args.judge, device=torch.device("cpu"), dtype=torch.float32)

    @cached_property
    def left(self) -> Left | Twin:
        return left_filler(self.args.left, self.generator.tokenizer)

    @cached_property
    def held_out(self) -> list[str]:
        return HeldOut.open(self.args.text).documents

    @cached_property
    def kept(self) -> dict[str, Any]:
        """Rows that are there; a last line that was cut by a kill counts as none."""
        found, file = {}, self.rows
        for line in file.read_text().splitlines() if file.exists() else ():
            try:
                name, row = json.loads(line)
            except ValueError:
                continue
            found[name] = row
        return found

    @cached_property
    def asked(self) -> str:
        """What rows depend on besides their part and key."""
        args = self.args
        models = (args.model, args.judge, args.left)
        names = " ".join(f"{name or 'bundled'} {content(name)}" for name in models)
        text = digest(["\0".join(self.held_out)])[:16]
        return f"{names} text {text} windows {args.windows} seam steps {args.seam_steps}"

    @property
    def rows(self) -> Path:
        return Path(f"{self.args.out}.rows")

    def each(self, part: str, keys: Iterable[Any], work: Callable[[Any], Any]) -> list[Any]:
        """What `work` finds of each key, measured once; says how far it is."""
        keys, found, began, done = list(keys), [], time.perf_counter(), 0
        for number, key in enumerate(keys, start=1):
            name = f"{part} {key} {self.asked}"
            if name not in self.kept:
                row, done = json.loads(json.dumps(work(key))), done + 1
                self.kept[name] = row
                with self.rows.open("a") as file:
                    file.write("\n" * (file.tell() > 0) + json.dumps([name, row]))
                left = (time.perf_counter() - began) / done * (len(keys) - number) / 60
                print(f"{part} {number}/{len(keys)}, {left:.1f} min left", file=sys.stderr)
            found.append(self.kept[name])
        return found

    def nats(self, text: str, prefix: str = "") -> tuple[float, int]:
        """The judge's nats of a text after a prefix, and its bytes."""
        (found,) = self.judge.judge([text], [prefix])
        return found.score.nats, len(text.encode())

    @cached_property
    def draws(self) -> dict[int, tuple[random.Random, list[list[int]]]]:
        """Of each size of a piece, its random numbers and those that were drawn."""
        return {}

    def piece(self, size: int, number: int) -> list[int]:
        """A held-out piece of `size` tokens; the same number gives the same one."""
        encode = self.generator.tokenizer.encode
        if size not in self.draws and all(len(encode(t[:4000])) <= size for t in self.held_out):
            sys.exit(f"No held-out document has more than {size} tokens: give --text longer ones.")
        draw, found = self.draws.setdefault(size, (random.Random(0), []))
        while len(found) <= number:
            text = draw.choice(self.held_out)
            begin = draw.randrange(max(1, len(text) - 4000))
            ids = encode(text[begin : begin + 4000])
            if len(ids) > size:
                first = draw.randrange(len(ids) - size)
                found.append(ids[first : first + size])
        return found[number]


def per_byte(pairs: Iterable[tuple[float, int]]) -> dict[str, float]:
    """Nats a byte of several texts together, with the standard error over them."""
    pairs = [tuple(pair) for pair in pairs]
    total = sum(n for _, n in pairs)
    mean = sum(x for x, _ in pairs) / total
    spread = math.sqrt(sum((x - mean * n) ** 2 for x, n in pairs)) / total
    return {"nats_per_byte": round(mean, 4), "standard_error": round(spread, 4)}


def mean(values: Iterable[float]) -> dict[str, float | None]:
    """The mean, with its standard error; one value has none."""
    values = list(values)
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    error = None if spread is None else round(spread, 4)
    return {"mean": round(statistics.fmean(values), 4), "standard_error": error}


def cost(bench: Bench) -> dict[str, Any]:
    """Seconds of a text by its length; the least of some repeats."""

    def work(key: tuple[int, int]) -> tuple[float, int]:
        (result,) = bench.generator.answer([Request(length=key[0], seed=key[1])])
        return result.seconds, result.calls

    found = {}
    for length in (16, 64, 256, 1024):
        length = min(length, bench.generator.config.context_length)
        rows = bench.each("cost", ((length, seed) for seed in range(bench.args.repeats)), work)
        found[str(length)] = {"seconds": round(min(rows)[0], 3), "calls": rows[0][1]}
    return found


def words(bench: Bench) -> dict[str, Any]:
    """Of some texts each: how many have a required word, and how many a banned one."""

    def has(text: str) -> bool:
        return any(word in text for word in BANNED)

    def work(seed: int) -> dict[str, Any]:
        plain = Request(length=24, seed=seed, end="never", steps=4)
        word = WORDS[seed % len(WORDS)]
        asked = [replace(plain, require=(word,)), replace(plain, ban=BANNED), plain]
        required, banned, free = bench.generator.answer(asked)
        return {
            "required_there": word in required.text,
            "banned_there": has(banned.text),
            "banned_there_if_not_banned": has(free.text),
            "calls_banned": banned.calls,
            "calls_plain": free.calls,
        }

    rows = bench.each("words", range(bench.args.requests), work)
    counts = {name: sum(row[name] for row in rows) for name in rows[0]}
    calls = {n: counts.pop(n) / len(rows) for n in ("calls_banned", "calls_plain")}
    return {"requests": len(rows), **counts, **calls}


def lengths(bench: Bench) -> dict[str, Any]:
    """Held-out spans of 1 to 12 tokens, found again as a gap of 1 to 16: true and chosen."""

    def work(number: int) -> tuple[int, int]:
        ids, decode = bench.piece(80, number), bench.generator.decode
        true = (1, 2, 3, 4, 6, 8, 10, 12)[number % 8]
        before, after = decode(ids[:40]), decode(ids[40 + true : 64 + true])
        before, after = (text.replace("[", "(").replace("]", ")") for text in (before, after))
        request = Request(template=f"{before}[[1-16]]{after}", steps=1, seed=number)
        (result,) = bench.generator.answer([request])
        return true, result.tokens

    pairs = bench.each("lengths", range(bench.args.texts), work)
    both = torch.tensor(pairs, dtype=torch.float64)
    return {
        "pairs": pairs,
        "correlation": float(torch.corrcoef(both.T)[0, 1]),
        "mean_error": float((both[:, 0] - both[:, 1]).abs().mean()),
        "mean_error_of_8": float((both[:, 0] - 8).abs().mean()),
    }


def auto(bench: Bench) -> dict[str, Any]:
    """Fixed numbers of calls and the automatic one: calls spent, and the judge's nats a byte."""

    def work(key: tuple[Any, int]) -> dict[str, Any]:
        request = Request(length=128, seed=key[1], steps=key[0], end="never")
        (result,) = bench.generator.answer([request])
        return {"calls": result.calls, "judged": bench.nats(result.text), "own": -result.score}

    found = {}
    for steps in (2, 4, 8, 16, "auto"):
        rows = bench.each("auto", ((steps, i) for i in range(bench.args.texts)), work)
        found[str(steps)] = {
            "calls": statistics.fmean(row["calls"] for row in rows),
            "own_nats_per_token": statistics.fmean(row["own"] for row in rows),
            **per_byte(row["judged"] for row in rows),
        }
    return found


def prompts(bench: Bench) -> dict[str, Any]:
    """Continuations of held-out prompts, judged after their own prompt and after another's.

    Where a model heeds its prompt its text is the likelier after it. `human` is what stood there.
    """

    def work(number: int) -> dict[str, Any]:
        ids, other = (bench.piece(PROMPT + CONTINUATION, n) for n in (number, number + 1))
        own, others, human = map(
            bench.generator.decode, (ids[:PROMPT], other[:PROMPT], ids[PROMPT:])
        )
        length = len(bench.generator.tokenizer.encode(own)) + CONTINUATION
        request = Request(prompt=own, length=length, end="never", seed=number)
        (result,) = bench.generator.answer([request])
        written = result.text[len(own) :]
        return {
            "own": bench.nats(written, own),
            "shuffled": bench.nats(written, others),
            "human_own": bench.nats(human, own),
            "human_shuffled": bench.nats(human, others),
        }

    rows = bench.each("prompts", range(bench.args.texts), work)
    found: dict[str, Any] = {name: per_byte(row[name] for row in rows) for name in rows[0]}
    for name in ("", "human_"):
        gains = [(r[f"{name}shuffled"][0] - r[f"{name}own"][0]) / r[f"{name}own"][1] for r in rows]
        found[f"{name}gain_nats_per_byte"] = mean(gains)
    return found


def left_filler(name: str, tokenizer: Tokenizer) -> Left | Twin:
    """A language model that fills gaps, with the same tokens: a run of ours, or any other."""
    ours = Path(name) / "run.json"
    return Twin(name, tokenizer) if ours.exists() else Left(name, tokenizer)


class Twin:
    """A run of `fsdfm adapt --attention causal`, whose data has the tokenizer."""

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        found = load_pretrained(name)
        if Tokenizer.from_json(found.tokenizer_json).fingerprint != tokenizer.fingerprint:
            sys.exit(f"{name} has another tokenizer: give --left a run that has this one's.")
        self.model = Autoregressive(found.model)

    def fill(self, x: list[int], hidden: list[bool], temperature: float, seed: int) -> list[int]:
        """As `Left.fill`."""
        text = [None if gap else token for token, gap in zip(x, hidden, strict=True)]
        return self.model.fill([text], [seed], temperature)[0]


class Left:
    """A causal language model that fills gaps from the left, with the same tokens.

    Args:
        name: see `load_causal_lm`.
        tokenizer: a cut of the model's, or its own.
    """

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        lm = load_causal_lm(name)
        theirs = Tokenizer.from_json(lm.tokenizer_json, name=name)
        within = tokens_within(tokenizer, theirs)
        if within is None:
            sys.exit(f"{name} has another tokenizer: give --left a model that has this one's.")
        self.model, self.start = lm.model, theirs.eos_id
        self.known = torch.tensor([i is not None for i in within])
        self.ids = torch.tensor([i or 0 for i in within])

    @torch.no_grad()
    def fill(self, x: list[int], hidden: list[bool], temperature: float, seed: int) -> list[int]:
        """The tokens with those hidden drawn one by one, each seeing all before it."""
        noise, found, past = torch.Generator().manual_seed(seed), list(x), None
        fed = torch.tensor([[self.start]])
        for place, gap in enumerate(hidden):
            if gap:
                out = self.model(fed, past_key_values=past, use_cache=True)
                past = out.past_key_values
                logits = out.logits[0, -1].float()[self.ids].masked_fill(~self.known, -math.inf)
                if temperature == 0.0:
                    found[place] = int(logits.argmax())
                else:
                    p = (logits / temperature).softmax(-1)
                    found[place] = int(torch.multinomial(p, 1, generator=noise))
                fed = fed[:, :0]
            fed = torch.cat((fed, self.ids[found[place]].view(1, 1)), 1)
        return found


def spans(share: float, number: int) -> list[bool]:
    """Which tokens of a text are hidden: spans of SPAN, none at the ends, none touching."""
    count = max(1, round(share * INFILL / SPAN))
    draw, room = random.Random(f"{share} {number}"), INFILL - 2 - count * (SPAN + 1)
    cuts = sorted(draw.randrange(room + 1) for _ in range(count))
    hidden = [False] * INFILL
    for k, cut in enumerate(cuts):
        first = 1 + cut + k * (SPAN + 1)
        hidden[first : first + SPAN] = [True] * SPAN
    return hidden


def infill(bench: Bench) -> dict[str, Any]:
    """Held-out texts with spans hidden, filled by the model and by one that sees the left alone.

    Accuracy is that of the likeliest tokens. The judge reads the whole text with the spans drawn at
    temperature 1; its loss is told as nats more than those of the text that was there, a byte of
    what was hidden.
    """

    def work(key: tuple[float, int]) -> dict[str, Any]:
        ids, hidden = bench.piece(INFILL, key[1]), spans(*key)
        frozen = [not h for h in hidden]

        def both(x: list[int], h: list[bool], temperature: float) -> dict[str, list[int]]:
            drawn = bench.generator.fill([x], [frozen], seed=key[1], temperature=temperature)
            return {
                "both": drawn.samples[0].token_ids,
                "left": bench.left.fill(x, h, temperature, key[1]),
            }

        decode, row = bench.generator.decode, dict[str, Any]()
        (truth, _), size = bench.nats(decode(ids)), 0
        size = len(decode([i for i, h in zip(ids, hidden, strict=True) if h]).encode())
        for name, found in both(ids, hidden, 0.0).items():
            hits = [a == b for a, b, h in zip(found, ids, hidden, strict=True) if h]
            row[name] = {"hits": sum(hits) / len(hits)}
        for name, found in both(ids, hidden, 1.0).items():
            row[name]["judged"] = (bench.nats(decode(found))[0] - truth, size)
        return row

    result = {}
    for share in HIDDEN:
        rows = bench.each("infill", ((share, i) for i in range(bench.args.texts)), work)
        result[f"{100 * sum(spans(share, 0)) / INFILL:g}%"] = {
            name: {
                "accuracy": mean(row[name]["hits"] for row in rows),
                "judged_above_truth": per_byte(row[name]["judged"] for row in rows),
            }
            for name in ("both", "left")
        }
    return result


def seam(bench: Bench) -> dict[str, Any]:
    """Long texts: the judge's nats a byte of 200 characters at seams, and elsewhere."""
    context = bench.generator.config.context_length
    stride = context - context // 4
    length = context + (bench.args.windows - 1) * stride

    def work(seed: int) -> dict[str, Any]:
        request = Request(length=length, seed=seed, end="keep", steps=bench.args.seam_steps)
        (result,) = bench.generator.answer([request])
        places: dict[str, list[tuple[float, int]]] = {"at": [], "elsewhere": []}
        for k in range(bench.args.windows - 1):
            for name, shift in (
                ("at", 0),
                ("elsewhere", context // 4),
                ("elsewhere", -stride // 2),
            ):
                end = context + k * stride + shift
                middle = len(bench.generator.decode(result.token_ids[:end]))
                before = result.text[max(0, middle - 1000) : middle]
                if text := result.text[middle : middle + 200]:
                    places[name].append(bench.nats(text, before))
        sentences = [s.strip() for s in result.text.split(".") if len(s.strip()) > 20]
        repeated = len(sentences) - len(set(sentences))
        return {**places, "repeated": repeated, "seconds": result.seconds, "calls": result.calls}

    rows = bench.each("seam", range(bench.args.long_texts), work)
    return {
        "tokens": length,
        "texts": len(rows),
        "at": per_byte(pair for row in rows for pair in row["at"]),
        "elsewhere": per_byte(pair for row in rows for pair in row["elsewhere"]),
        "repeated_sentences": sum(row["repeated"] for row in rows),
        "seconds": statistics.fmean(row["seconds"] for row in rows),
        "calls": statistics.fmean(row["calls"] for row in rows),
    }


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    each.__name__: each for each in (cost, words, lengths, auto, prompts, infill, seam)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--model", help="default: the bundled one")
    parser.add_argument("--judge", default="smollm2", help="no ancestor of the model, if you can")
    parser.add_argument("--left", default="smollm2", help="language model to fill with: a run too")
    parser.add_argument("--text", type=Path, help="held-out text; default: the bundled one")
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--long-texts", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--seam-steps", type=int, help="default: the model's own")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    bench = Bench(args)
    for part in args.parts:
        found = PARTS[part](bench)
        print(part, json.dumps(found), flush=True)
        kept = json.loads(args.out.read_text()) if args.out.exists() else {}
        args.out.write_text(json.dumps({**kept, part: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
