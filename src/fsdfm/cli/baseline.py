"""`fsdfm baseline`: texts of plain language models, as reference rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fsdfm.cli.console import work, write
from fsdfm.cli.flags import Flags, parse
from fsdfm.core.errors import ConfigError
from fsdfm.core.progress import Progress
from fsdfm.study.settings import AutoregressiveSettings, NgramSettings

HELP = """\
Texts of a plain language model, the floor beside a few-step model. One file of them makes a row:
fsdfm evaluate --reference NAME=FILE.jsonl

  fsdfm baseline ngram --data DATA --out FILE.jsonl   an n-gram model, fitted in seconds
  fsdfm baseline ar --model RUN --data DATA --out FILE.jsonl
                        a network of fsdfm adapt --attention causal, token by token

Each kind explains its flags: fsdfm baseline KIND --help.
"""
NGRAM = """\
Write texts of an n-gram model (modified Kneser-Ney smoothing), drawn token by token.

fsdfm evaluate --reference ngram=FILE.jsonl gives them a row of a report."""
AR = """\
Write texts of an autoregressive network, drawn token by token.

The network is a run of fsdfm adapt --attention causal: with the layers, vocabulary, data and hours
of a flow model, it is what the same work would have given."""


def run(argv: Sequence[str]) -> None:
    """Make texts of the kind that is named first."""
    if argv and argv[0] in KINDS:
        KINDS[argv[0]](argv[1:])
    elif argv and argv[0] in ("-h", "--help"):
        write(HELP)
    else:
        wrong = f"there is no baseline {argv[0]!r}" if argv else "a kind of baseline is missing"
        raise ConfigError(f"{wrong}: choose {', '.join(KINDS)}, or see fsdfm baseline --help.")


def _ngram(argv: Sequence[str]) -> None:
    (given,) = parse("baseline ngram", NGRAM, argv, Flags(of=NgramSettings))
    settings = NgramSettings(**given)
    from fsdfm.study import baseline

    _made("Counting n-grams", lambda progress: baseline.ngram(settings, progress))


def _ar(argv: Sequence[str]) -> None:
    (given,) = parse("baseline ar", AR, argv, Flags(of=AutoregressiveSettings))
    settings = AutoregressiveSettings(**given)
    from fsdfm.study import baseline

    _made("Reading held-out text", lambda progress: baseline.autoregressive(settings, progress))


def _made(first: str, make: Callable[[Progress], str]) -> None:
    with work(first) as progress:
        line = make(progress)
    write(line + "\n")


KINDS: dict[str, Callable[[Sequence[str]], None]] = {"ngram": _ngram, "ar": _ar}
