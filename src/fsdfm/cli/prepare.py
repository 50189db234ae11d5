"""`fsdfm prepare`: texts -> tokenizer and packed tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fsdfm.cli.console import bars, write
from fsdfm.cli.flags import Flags, parse
from fsdfm.core.options import AT_LEAST_1, check, option
from fsdfm.text.settings import PrepareSettings
from fsdfm.text.tokenizer import Tokenizer

ABOUT = "Turn texts into a tokenizer and packed tokens, ready for training."
POSITIONAL = ("sources",)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Own:
    """Where it comes from and goes to."""

    sources: tuple[str, ...] = option(form="SOURCES")
    """Files: .txt or .jsonl, also as .gz or .zst, .parquet, .arrow. Directories of such files. Data
    sets of the Hugging Face Hub: hf:org/name, with :configuration and @split where there are
    several (default: train)."""
    out: Path = option()
    """Directory to write."""
    tokenizer: str | None = option(None, form="FILE|MODEL", unset="train one")
    """A tokenizer.json to use, or a model whose tokenizer to use: a model directory, bundled for
    that of the package, or a language model as fsdfm adapt takes it."""
    workers: int = option(1, within=AT_LEAST_1)
    """Processes that tokenize; 1 is this one, with threads. The result is the same."""

    def __post_init__(self) -> None:
        check(self)


def run(argv: Sequence[str]) -> None:
    """Pack texts and say what came out."""
    own, numbers = parse(
        "prepare", ABOUT, argv, Flags(of=_Own, positional=POSITIONAL), Flags(of=PrepareSettings)
    )
    args, settings = _Own(**own), PrepareSettings(**numbers)
    from fsdfm.text.packing import prepare
    from fsdfm.text.statistics import summary

    titles = {"split": "Holding out", "tokenizer": "Training a tokenizer", "tokens": "Packing"}
    with bars(titles) as progress:
        manifest = prepare(
            args.sources,
            args.out,
            settings=settings,
            tokenizer=_tokenizer(args.tokenizer) if args.tokenizer else None,
            workers=args.workers,
            progress=progress,
        )
    write(f"{args.out}: {summary(manifest)}\n")


def _tokenizer(name: str) -> Tokenizer:
    """That of a file, or of a language model."""
    if name.endswith(".json") or (Path(name).is_file() and not name.endswith(".gguf")):
        return Tokenizer.from_file(name)
    from fsdfm.model.io.directory import BUNDLED, TOKENIZER, find, resolve
    from fsdfm.model.io.pretrained import is_own

    if name == BUNDLED or is_own(Path(name)):  # as it is: a model goes on from data of the same
        return Tokenizer.from_file(find(resolve(name), TOKENIZER))
    from fsdfm.model.io.causal_lm import load_tokenizer_json
    from fsdfm.text.vocabulary import completed

    return completed(Tokenizer.from_json(load_tokenizer_json(name), name=name))
