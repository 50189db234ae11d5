"""Let SmolLM2-135M-Instruct write the training text: simple stories, many at once.

    python recipes/stories.py OUT.jsonl --minutes 30

A model that writes all positions at once learns the text of another model sooner than that of
people, because it varies less (sequence-level distillation, Kim and Rush 2016). Each story is asked
for by a few words from story_words.txt. Run it again to add more: the seed follows from the size of
OUT. Each line of OUT is {"source", "ask", "text"}.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from fsdfm.core.packaged import locate

WORDS = dict(
    line.split(": ", 1)
    for line in Path(__file__).with_name("story_words.txt").read_text(encoding="utf-8").splitlines()
)
NOUNS, NAMES, KINDS = (WORDS[name].split(", ") for name in ("nouns", "names", "kinds"))
PLOTS = (
    "about {a} and {b}",
    "about {name} and {a}",
    "in which {name} finds {a}",
    "about {name}, {a} and {b}",
    "in which {name} meets {other}",
)
UNWANTED = re.compile(
    r"\*\*|^#|^\d+\.|\bAI\b|I'm sorry|I cannot|[Hh]ere(?:'s| is) a|<\|"
    r"|[Tt]h(?:e|is) story (?:is|of|tells|begins)",
    re.MULTILINE,
)
SENTENCE = re.compile(r'.*[.!?]["\u201d\u2019]?(?=\s|$)', re.DOTALL)


def request(rng: random.Random) -> str:
    """One request for a story."""
    article = lambda noun: ("an " if noun[0] in "aeiou" else "a ") + noun  # noqa: E731
    a, b = rng.sample(NOUNS, 2)
    name, other = rng.sample(NAMES, 2)
    plot = rng.choice(PLOTS).format(a=article(a), b=article(b), name=name, other=other)
    return f"Write a short {rng.choice(KINDS)} {plot}. Do not write a title."


def repetition(text: str, n: int = 4) -> float:
    """Share of the runs of n words that have been there before."""
    words = text.split()
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1.0 - len(set(runs)) / max(1, len(runs))


class Writer:
    """The language model, with a batch of prompts at a time."""

    def __init__(self, limit: int, temperature: float, top_k: int) -> None:
        directory, file = locate("smollm2")
        self.tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=file)
        self.tokenizer.padding_side, self.tokenizer.pad_token = "left", "<|endoftext|>"
        self.network = AutoModelForCausalLM.from_pretrained(
            directory,
            gguf_file=file,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        ).eval()
        self.how = {"max_new_tokens": limit, "temperature": temperature, "top_k": top_k}
        self.end = self.tokenizer.convert_tokens_to_ids("<|im_end|>")

    @torch.inference_mode()
    def write(self, requests: list[str]) -> Iterator[tuple[str, int]]:
        """The texts, and their tokens; one that does not end ends with its last whole sentence."""
        chats = [[{"role": "user", "content": request}] for request in requests]
        prompts = self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        stops = [self.end, self.tokenizer.pad_token_id]
        rows = self.network.generate(**prompts, do_sample=True, eos_token_id=stops, **self.how)
        for row in rows[:, prompts["input_ids"].shape[1] :].tolist():
            end = next((i for i, token in enumerate(row) if token in stops), None)
            text = self.tokenizer.decode(row[:end]).strip()
            if end is None:
                ended = SENTENCE.match(text)
                text = ended.group(0).rstrip() if ended else ""
            yield text, len(row[:end])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--limit", type=int, default=352, help="tokens a story has at most")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=40)
    args = parser.parse_args()
    seed = args.out.stat().st_size if args.out.exists() else 0
    torch.manual_seed(seed)
    rng, writer = random.Random(seed), Writer(args.limit, args.temperature, args.top_k)
    begun, tokens, stories = time.monotonic(), 0, 0
    with args.out.open("a", encoding="utf-8") as out:
        while time.monotonic() - begun < 60 * args.minutes:
            asked = [request(rng) for _ in range(args.batch)]
            for ask, (text, size) in zip(asked, writer.write(asked), strict=True):
                tokens += size
                if len(text) > 200 and not UNWANTED.search(text) and repetition(text) < 0.1:
                    stories += 1
                    line = {"source": "smollm2", "ask": ask, "text": text}
                    out.write(json.dumps(line, ensure_ascii=False) + "\n")
            out.flush()
            elapsed = time.monotonic() - begun
            left = max(0.0, args.minutes - elapsed / 60)
            rate = tokens / elapsed
            print(f"{stories:,} stories, {rate:.0f} tokens/s, {left:.0f} minutes left", flush=True)


if __name__ == "__main__":
    main()
