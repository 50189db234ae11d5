"""`fsdfm data`: what a prepared directory holds, and whether it is whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fsdfm.cli.console import write
from fsdfm.cli.flags import Flags, parse
from fsdfm.core.options import AT_LEAST_0, AT_LEAST_1, check, option

ABOUT = "Print what prepared data holds, verify its checksums, and show decoded samples."
POSITIONAL = ("data",)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Own:
    data: Path = option(form="DIR")
    """Directory that `fsdfm prepare` wrote."""
    samples: int = option(3, within=AT_LEAST_0)
    """Decoded samples of the training split."""
    sample_tokens: int = option(64, within=AT_LEAST_1)
    """Tokens of a sample."""
    seed: int = option(0, within=AT_LEAST_0)
    """Chooses the samples."""

    def __post_init__(self) -> None:
        check(self)


def run(argv: Sequence[str]) -> None:
    """Verify, count, show."""
    (given,) = parse("data", ABOUT, argv, Flags(of=_Own, positional=POSITIONAL))
    own = _Own(**given)
    from fsdfm.generate.live import printable
    from fsdfm.text.statistics import decoded, rows, summary
    from fsdfm.text.store import TokenStore

    store = TokenStore.open(own.data, verify=True)
    write(f"{own.data}: {summary(store.manifest)}\n\n")
    head = f"{'split':<12}{'documents':>14}{'tokens':>18}{'bytes a token':>16}{'shards':>8}\n"
    write(head)
    for row in rows(store.manifest):
        write(
            f"{row.split:<12}{row.documents:>14,}{row.tokens:>18,}{row.bytes_per_token:>16.3f}"
            f"{row.shards:>8,}\n"
        )
    write("\nAll checksums are right.\n")
    for number, text in enumerate(
        decoded(store, own.samples, own.sample_tokens, own.seed), start=1
    ):
        write(f"\n--- sample {number}\n{printable(text)}\n")
