"""`fsdfm bench`: speed and memory here, beside references."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fsdfm.bench.settings import BenchSettings
from fsdfm.cli.console import note, work, write
from fsdfm.cli.flags import Flags, parse
from fsdfm.core.errors import BenchError

if TYPE_CHECKING:
    from fsdfm.bench.figures import Row

TABLE_WIDTH = 120
ABOUT = """\
Measure speed and memory on this machine, beside reference implementations.

Each side runs in a process of its own, in turn with the others. Sampling is compared with the
published sampler as the formulas have it, and with an autoregressive model of the same size in
transformers and in CTranslate2;
distillation and pretraining with plain loops. Weights are random: they do not change the speed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Own:
    """How it is shown."""

    json: bool = False
    """Print one JSON object with the machine and all figures."""


def run(argv: Sequence[str]) -> None:
    """Measure speed and memory; one table for each task."""
    given, own = parse("bench", ABOUT, argv, Flags(of=BenchSettings), Flags(of=_Own))
    args, settings = _Own(**own), BenchSettings(**given)
    from fsdfm.bench import benchmark
    from fsdfm.bench.figures import described
    from fsdfm.bench.sides import missing

    with work("Starting the sides") as progress:
        machine, rows = benchmark.bench(settings, progress)
    if args.json:
        write(json.dumps({**machine, "rows": [row.to_dict() for row in rows]}) + "\n")
    else:
        write(f"{described(machine)}\n")
        write(_tables(rows))
    if (left_out := missing()) is not None:
        note(left_out)
    if failed := [row.error for row in rows if row.error is not None]:
        for error in failed[:-1]:
            note(f"error: {error}")
        raise BenchError(failed[-1])


def _tables(rows: Sequence[Row]) -> str:
    """The rows as text, for the terminal or for a pipe."""
    from fsdfm.bench.figures import HEADERS, cells, grouped

    console = Console(highlight=False)
    console.width = max(console.width, TABLE_WIDTH)
    with console.capture() as capture:
        for name, group in grouped(rows).items():
            table = Table(title=name, title_justify="left", box=SIMPLE_HEAD)
            for header in HEADERS:
                side = header == "side"
                table.add_column(header, justify="left" if side else "right", no_wrap=side)
            for row in group:
                table.add_row(*cells(row))
            console.print(table)
    return capture.get()
