"""`fsdfm prepare`: text files -> tokenizer and packed tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fsdfm.cli.console import bars, write
from fsdfm.cli.flags import Flags, parse
from fsdfm.core.options import option
from fsdfm.text.settings import PrepareSettings
from fsdfm.text.tokenizer import Tokenizer

ABOUT = "Turn text files into a tokenizer and packed tokens, ready for training."
POSITIONAL = ("files",)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Own:
    """Where it comes from and goes to."""

    files: tuple[Path, ...] = option(form="FILES")
    """.txt or .jsonl files, also as .gz or .zst."""
    out: Path = option()
    """Directory to write."""
    tokenizer: str | None = option(None, form="FILE|MODEL", unset="train one")
    """A tokenizer.json to use, or a language model whose tokenizer to use: whatever fsdfm adapt
    takes."""


def run(argv: Sequence[str]) -> None:
    """Pack text files and say what came out."""
    own, numbers = parse(
        "prepare", ABOUT, argv, Flags(of=_Own, positional=POSITIONAL), Flags(of=PrepareSettings)
    )
    args, settings = _Own(**own), PrepareSettings(**numbers)
    from fsdfm.text.packing import prepare

    titles = {"split": "Holding out", "tokenizer": "Training a tokenizer", "tokens": "Packing"}
    with bars(titles) as progress:
        manifest = prepare(
            list(args.files),
            args.out,
            settings=settings,
            tokenizer=_tokenizer(args.tokenizer) if args.tokenizer else None,
            progress=progress,
        )
    train, validation = (manifest["splits"][name] for name in ("train", "validation"))
    in_both = manifest["split_documents"]
    documents = train["documents"] + validation["documents"] - in_both
    split = ", one of them split (its end is for validation)" if in_both else ""
    write(
        f"{args.out}: {train['tokens']:,} training and {validation['tokens']:,} validation tokens "
        f"of {documents:,} document{'s' * (documents != 1)}{split}, "
        f"vocabulary {manifest['vocab_size']:,}\n"
    )


def _tokenizer(name: str) -> Tokenizer:
    """That of a file, or of a language model."""
    if name.endswith(".json") or (Path(name).is_file() and not name.endswith(".gguf")):
        return Tokenizer.from_file(name)
    from fsdfm.model.io.causal_lm import load_tokenizer_json
    from fsdfm.text.vocabulary import completed

    return completed(Tokenizer.from_json(load_tokenizer_json(name), name=name))
