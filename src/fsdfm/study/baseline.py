"""Texts of plain language models, as reference rows beside a few-step model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fsdfm.core.errors import ConfigError, DataError
from fsdfm.core.files import write_whole
from fsdfm.core.progress import Progress
from fsdfm.eval.heldout import HeldOut
from fsdfm.model.io.pretrained import load_pretrained
from fsdfm.study.autoregressive import Autoregressive
from fsdfm.study.ngram import NgramModel, stages
from fsdfm.study.settings import AutoregressiveSettings, BaselineSettings, NgramSettings
from fsdfm.text.store import TokenSplit, TokenStore
from fsdfm.text.tokenizer import Tokenizer

Tick = Callable[[str], None]
"""Told the kind of work that was just done."""
DRAWN = 50
"""Drawing a token takes about as long as 50 tokens take in one stage of the fit."""


class Baseline(Protocol):
    """A model that gives text from left to right, and its likelihood."""

    def log_probability(self, ids: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
        """Nats of each token given those before it; the first starts a document."""
        ...

    def sample(self, length: int, seed: int) -> list[int]:
        """`length` ids from the start of a document on; a function of the seed."""
        ...


def ngram(args: NgramSettings, progress: Progress) -> str:
    """Fit an n-gram model to a prepared directory, and write texts of it.

    Args:
        args: what is fitted, drawn and written.
        progress: told (what was done, work done, work in all), in thousands of tokens.

    Returns:
        One line for people.

    Raises:
        ConfigError: a value out of range.
        DataError: no such data, or a file that cannot be written.
    """
    store = TokenStore.open(args.data)
    tokenizer = Tokenizer.from_json(store.tokenizer_json)
    check_writable(args.out)
    tick = _counter(
        progress,
        {
            "counting n-grams": (stages(args.order), store.train.tokens),
            "drawing texts": (args.num_samples, DRAWN * args.length),
        },
    )
    model = NgramModel.fit(
        _all(store.train),
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        order=args.order,
        advance=lambda: tick("counting n-grams"),
    )
    bits = heldout_bits_per_byte(args.data, store, model)
    write_texts(args, tokenizer, model, tick)
    return (
        f"{args.out}: {args.num_samples:,} texts of {args.length:,} tokens by an n-gram model of "
        f"order {args.order} on {store.train.tokens:,} tokens, "
        f"{bits:.3f} bits a byte of held-out text"
    )


def autoregressive(args: AutoregressiveSettings, progress: Progress) -> str:
    """Draw texts of an autoregressive network, and write them.

    Args:
        args: what is drawn and written.
        progress: told (what was done, tokens done, tokens in all).

    Returns:
        One line for people.

    Raises:
        ConfigError: a value out of range, another tokenizer, or a network that is not causal.
        CheckpointError: no such model.
        DataError: no such data, or a file that cannot be written.
    """
    store = TokenStore.open(args.data)
    tokenizer = Tokenizer.from_json(store.tokenizer_json)
    loaded = load_pretrained(args.model)
    if Tokenizer.from_json(loaded.tokenizer_json).fingerprint != tokenizer.fingerprint:
        raise ConfigError(f"{args.model} and {args.data} have different tokenizers.")
    model = Autoregressive(loaded.model)
    check_writable(args.out)
    bits = heldout_bits_per_byte(args.data, store, model)
    seeds, done = range(args.seed, args.seed + args.num_samples), 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress("drawing tokens", done, args.length)

    _write(args, tokenizer, seeds, model.samples(args.length, seeds, args.temperature, advance))
    return (
        f"{args.out}: {args.num_samples:,} texts of {args.length:,} tokens by {args.model}, token "
        f"by token at temperature {args.temperature:g}, {bits:.3f} bits a byte of held-out text"
    )


def heldout_bits_per_byte(data: Path, store: TokenStore, model: Baseline) -> float:
    """Bits that a model needs for the validation split, a byte of its text.

        -sum_i log2 p(ids[i] | ids[:i]) / UTF-8 bytes

    The ends of the documents cost bits too; they are no bytes.
    """
    nats = -float(model.log_probability(_all(store.validation)).sum())
    text_bytes = sum(len(text.encode()) for text in HeldOut.open(data).documents)
    return nats / math.log(2) / text_bytes


def write_texts(args: BaselineSettings, tokenizer: Tokenizer, model: Baseline, tick: Tick) -> None:
    """Draw texts and write them, all or none, as lines {"text", "tokens", "seed"}.

    Raises:
        DataError: the file cannot be written.
    """
    seeds, texts = range(args.seed, args.seed + args.num_samples), []
    for seed in seeds:
        texts.append(model.sample(args.length, seed))
        tick("drawing texts")
    _write(args, tokenizer, seeds, texts)


def _write(
    args: BaselineSettings, tokenizer: Tokenizer, seeds: Iterable[int], texts: Iterable[list[int]]
) -> None:
    lines = []
    for seed, ids in zip(seeds, texts, strict=True):
        record = {"text": tokenizer.decode(ids), "tokens": args.length, "seed": seed}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_whole(args.out, "".join(lines))


def check_writable(out: Path) -> None:
    """Refuse a file that could not be written in the end, before there is work to lose.

    Raises:
        ConfigError: the name does not end in .jsonl.
        DataError: a directory, a file that may not be changed, or a place that takes no file.
    """
    if out.suffix != ".jsonl":
        raise ConfigError(f"out must be a .jsonl file, for fsdfm evaluate to read, got {out}.")
    if out.is_dir():
        raise DataError(f"{out} is a directory: choose another out.")
    if out.exists() and not os.access(out, os.W_OK):
        raise DataError(f"{out} may not be changed: choose another out.")
    probe = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            probe.touch()
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"Cannot write {out} ({error.strerror or error}): choose another out."
        ) from None


def _all(split: TokenSplit) -> NDArray[np.int64]:
    """The whole stream, shape (tokens,)."""
    ids: NDArray[np.int64] = split.block(0, split.tokens).numpy()
    return ids


def _counter(progress: Progress, work: dict[str, tuple[int, int]]) -> Tick:
    """Adds up work for `progress`.

    Args:
        progress: told (what was done, work done, work in all).
        work: kind -> how many times it will be done, and the tokens of each.
    """
    done, total = 0, sum(times * tokens for times, tokens in work.values())

    def tick(kind: str) -> None:
        nonlocal done
        done += work[kind][1]
        progress(kind, math.ceil(done / 1000), math.ceil(total / 1000))

    return tick
