"""`fsdfm generate`: texts in a pipe, one text while it settles in a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fsdfm.cli.console import note, status, write
from fsdfm.cli.flags import Flags, parse
from fsdfm.core.errors import ConfigError, DataError
from fsdfm.core.files import one_line
from fsdfm.core.options import known, option
from fsdfm.generate.generator import Generator, load
from fsdfm.generate.live import printable, show
from fsdfm.generate.options import RequestOptions, SamplingOptions
from fsdfm.generate.precision import PRECISIONS
from fsdfm.generate.results import Sample, Snapshot

SEPARATOR = "---"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Own:
    """What is not said to `Generator.generate`."""

    model: str | None = option(None, form="DIR", unset="the bundled model")
    """Model or run directory, or org/name on the Hugging Face Hub."""
    prompt_file: str | None = option(None, form="FILE", unset="none; - for standard input")
    """File with the prompt, in UTF-8; one line end at its end is left out."""
    device: str | None = option(None, form="DEVICE", unset="cuda, else mps, else cpu")
    """cpu, cuda, cuda:N or mps."""
    precision: str | None = option(None, choices=PRECISIONS, unset="bfloat16 where it is fast")
    """Of the matrix products; int8 is faster for large models on CPUs with AVX512-VNNI or AMX."""
    json: bool = False
    """Print one JSON object per text: text, tokens, nfe, seed, seconds, tokens_per_second."""


ABOUT = "Generate text. In a terminal, one text is shown while it settles."


def run(argv: Sequence[str]) -> None:
    """Print texts; live in a terminal."""
    sampling, request, own = parse(
        "generate",
        ABOUT,
        argv,
        Flags(of=SamplingOptions, unsaid=known(SamplingOptions), decides="the model's own"),
        Flags(of=RequestOptions),
        Flags(of=_Own),
    )
    args, options = _Own(**own), {**sampling, **request}
    if args.prompt_file is not None:
        options["prompt"] = _prompt(args.prompt_file, options["prompt"])
    terminal = Console()
    with status("Loading the model"):
        generator = load(args.model, device=args.device, precision=args.precision)
    if terminal.is_terminal and not terminal.is_dumb_terminal and not args.json:
        _on_terminal(generator, options, terminal)
        return
    batches = generator.batches(**options)
    for number, sample in enumerate(sample for batch in batches for sample in batch):
        write(_json_line(sample) if args.json else _separated(sample.text, number))


def _prompt(file: str, prompt: str | None) -> str:
    """The text of the prompt's file, less one line end at its end (editors and echo add it).

    Raises:
        ConfigError: there is a prompt besides.
        DataError: the file cannot be read, or is not UTF-8.
    """
    if prompt is not None:
        raise ConfigError(
            "prompt and prompt_file are both given: leave one out.", "prompt", "prompt_file"
        )
    name = "Standard input" if file == "-" else file
    try:
        if file == "-":
            data = sys.stdin.buffer.read() if sys.stdin is not None else b""
        else:
            data = Path(name).read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"Cannot read {name}: {one_line(error)}.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 (byte {error.start}): convert it first.") from None
    return text.removesuffix("\n").removesuffix("\r")


def _on_terminal(generator: Generator, options: dict[str, Any], terminal: Console) -> None:
    if options["num_samples"] == 1:
        alone = {k: v for k, v in options.items() if k != "batch_size"}
        last: Snapshot = show(generator.stream(**alone), terminal)
        write(printable(last.text) + "\n")
        rate = last.tokens / last.seconds
        note(_cost(last.tokens, last.calls, last.seconds, rate, options["seed"]))
        return
    batches, done = generator.batches(**options), 0
    while done < options["num_samples"]:
        with status(f"Generating text {done + 1} of {options['num_samples']}"):
            batch = next(batches)
        for sample in batch:
            write(_separated(printable(sample.text), done))
            cost = sample.tokens, sample.nfe, sample.seconds, sample.tokens_per_second
            note(_cost(*cost, sample.seed))
            done += 1


def _json_line(sample: Sample) -> str:
    names = ("text", "tokens", "nfe", "seed", "seconds", "tokens_per_second")
    return json.dumps({name: getattr(sample, name) for name in names}, ensure_ascii=False) + "\n"


def _separated(text: str, number: int) -> str:
    return f"{SEPARATOR}\n{text}\n" if number else f"{text}\n"


def _cost(tokens: int, calls: int, seconds: float, rate: float, seed: int) -> str:
    return (
        f"{tokens:,} tokens in {calls} model calls, {seconds:.2f} s, {rate:,.0f} tokens/s, "
        f"seed {seed}"
    )
