"""The bound on the likelihood of a text, in bits a byte: of flow models, whatever their tokenizers.

    python benchmarks/bound.py MODEL... [--text FILE] [--characters 1024] [--passages 88]

Of a network of `fsdfm adapt --attention causal` it is the likelihood itself, and so it is of the
n-gram model of order 4 that `--ngram DATA` fits to prepared data: both whatever `times`.

FILE is a .txt or .jsonl (also .gz), or a directory of fsdfm prepare, whose validation split is
taken; without it, the held-out text of the package. It is cut into passages of whole words, which
every model reads on their own, with nothing before them; they are taken from the documents in turn.
So all models are judged by the same text: a row has its digest. 1,024 characters are some 250
tokens. Every passage has its own noise, so that a row does not depend on the batch.

The figure is all bits over all bytes. The interval (95 %) is a jackknife over documents: passages
of one book are no independent samples. Bounds of a uniform and of a masked source are not
comparable: the uniform one is loose.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from fsdfm.core.device import preferred_dtype
from fsdfm.core.errors import FsdfmError
from fsdfm.core.files import digest
from fsdfm.eval.heldout import HeldOut
from fsdfm.eval.statistics import Ratio, student_quantile
from fsdfm.flow.loss import elbo_nats_per_token
from fsdfm.flow.path import make_source
from fsdfm.flow.schedule import Polynomial
from fsdfm.generate.generator import Generator
from fsdfm.generate.loading import load_with_network
from fsdfm.model.io.directory import resolve
from fsdfm.model.io.pretrained import Pretrained, load_pretrained, read_config
from fsdfm.study.autoregressive import Autoregressive
from fsdfm.study.ngram import NgramModel
from fsdfm.text.store import TokenStore
from fsdfm.text.tokenizer import Tokenizer

Loaded = tuple[Generator, Pretrained]
Judge = Callable[[int, str], tuple[float, int]]
"""(number of a passage, its text) -> nats of it, and its tokens."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A part of a document."""

    document: int
    text: str


def passages(documents: list[str], characters: int, count: int) -> list[Passage]:
    """Passages of the documents in turn, each time another place of a document.

    Args:
        documents: the texts.
        characters: of a passage, at most; the end of a document is left out if it has fewer than
            half as many.
        count: passages, at most.
    """
    rng = np.random.default_rng(0)
    dealt = []
    for number, text in enumerate(documents):
        parts = list(_parts(text, characters))
        dealt.append([Passage(number, parts[i]) for i in rng.permutation(len(parts))])
    turns = itertools.zip_longest(*dealt)
    return [each for turn in turns for each in turn if each is not None][:count]


def _parts(text: str, characters: int) -> Iterator[str]:
    """A text cut before white space."""
    at = 0
    while len(text) - at > characters:
        end = max((text.rfind(blank, at + 1, at + characters + 1) for blank in " \n"), default=-1)
        end = at + characters if end <= at else end
        yield text[at:end]
        at = end
    if len(text) - at >= characters / 2:
        yield text[at:]


def judge(name: str, times: int) -> Judge:
    """How a model judges a passage.

    Args:
        name: of a model directory, or `bundled`.
        times: at which the bound of a flow model is looked at.
    """
    if read_config(resolve(name))[0].left_to_right:
        return _causal(load_pretrained(name))
    loaded = load_with_network(name, device="cpu")

    def nats(number: int, text: str) -> tuple[float, int]:
        ids = loaded[0].tokenizer.encode(text)
        return nats_per_token(loaded, ids, times, number) * len(ids), len(ids)

    return nats


def nats_per_token(loaded: Loaded, ids: Sequence[int], times: int, number: int) -> float:
    """The bound of a flow model.

    Args:
        loaded: the model.
        ids: tokens of a sequence.
        times: that are looked at.
        number: of the sequence, which its noise depends on.
    """
    generator, found = loaded
    config = generator.config
    source = make_source(config.source, config.vocab_size)
    schedule, x_1 = Polynomial(config.schedule_power), torch.tensor([ids])
    with generator.autocast():
        return statistics.fmean(
            elbo_nats_per_token(found.model, x_1, source, schedule, times=times, first=number)
        )


def _causal(found: Pretrained) -> Judge:
    model, tokenizer = Autoregressive(found.model), Tokenizer.from_json(found.tokenizer_json)
    dtype = preferred_dtype(torch.device("cpu"))

    def nats(_: int, text: str) -> tuple[float, int]:
        ids = np.array(tokenizer.encode(text))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return -float(model.log_probability(ids).sum()), len(ids)

    return nats


def _ngram(data: Path) -> Judge:
    store = TokenStore.open(data)
    tokenizer = Tokenizer.from_json(store.tokenizer_json)
    ids = store.train.block(0, store.train.tokens).numpy()
    model = NgramModel.fit(ids, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id, order=4)

    def nats(_: int, text: str) -> tuple[float, int]:
        ids = np.array(tokenizer.encode(text))
        return -float(model.log_probability(ids).sum()), len(ids)

    return nats


def bound(judged: Judge, chosen: list[Passage]) -> dict[str, object]:
    """Bits a byte with their interval, and nats a token."""
    found = [judged(number, passage.text) for number, passage in enumerate(chosen)]
    documents = 1 + max(passage.document for passage in chosen)
    bits, sizes = np.zeros(documents), np.zeros(documents)
    for passage, (nats, _) in zip(chosen, found, strict=True):
        bits[passage.document] += nats / math.log(2.0)
        sizes[passage.document] += len(passage.text.encode())
    ratio = Ratio(bits[sizes > 0], sizes[sizes > 0])
    without, n = ratio.without_one(), ratio.count
    spread = math.sqrt((n - 1) / n * float(((without - without.mean()) ** 2).sum()))
    return {
        "bits_per_byte": round(ratio.value, 4),
        "interval": round(spread * student_quantile(0.975, n - 1), 4) if n > 1 else None,
        "nats_per_token": round(sum(each for each, _ in found) / sum(n for _, n in found), 4),
        "documents": n,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help="directories; `bundled`: the package's model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--characters", type=int, default=1024)
    parser.add_argument("--passages", type=int, default=88)
    parser.add_argument("--times", type=int, default=8)
    parser.add_argument("--ngram", type=Path, metavar="DATA", help="judge by its n-gram model, too")
    args = parser.parse_args()
    try:
        heldout = HeldOut.open(args.text)
        chosen = passages(heldout.documents, args.characters, args.passages)
        if not chosen:
            parser.error(f"the text has no passage of {args.characters // 2} characters.")
        named = [(Path(name).name, partial(judge, name, args.times)) for name in args.models]
        if args.ngram:
            named.append((f"ngram4 of {args.ngram.name}", partial(_ngram, args.ngram)))
        for name, made in named:
            row = {"model": name, "text": heldout.name, "passages": len(chosen)}
            row |= {"characters": args.characters, "times": args.times, **bound(made(), chosen)}
            row |= {"sha256": digest(["\0".join(each.text for each in chosen)])[:12]}
            print(json.dumps(row), flush=True)
    except FsdfmError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
