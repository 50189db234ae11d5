"""`fsdfm compare`: reports side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fsdfm.cli.console import note, write
from fsdfm.cli.flags import Flags, parse
from fsdfm.core.errors import ConfigError
from fsdfm.core.files import write_whole
from fsdfm.core.options import option

ABOUT = "Put reports side by side and say which differences are real."
POSITIONAL = ("reports",)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Own:
    """What is compared."""

    reports: tuple[Path, ...] = option((), form="REPORT")
    """Directories of fsdfm evaluate, or their report.json; the first model is the baseline."""
    baseline: str | None = option(None, form="NAME", unset="the first")
    """Model to compare with, by its name in the reports."""
    out: Path | None = option(None, form="FILE", unset="none")
    """Write the comparison to this Markdown file too."""


def run(argv: Sequence[str]) -> None:
    """Put reports side by side."""
    (given,) = parse("compare", ABOUT, argv, Flags(of=_Own, positional=POSITIONAL))
    args = _Own(**given)
    from fsdfm.eval.comparison import comparison, named_rows
    from fsdfm.eval.report import load_report
    from fsdfm.eval.several import different_judges, shared_judges

    labels = {str(path): load_report(path) for path in args.reports}
    if not labels:
        raise ConfigError("compare needs reports: fsdfm compare REPORT...")
    reports = list(labels.items())
    first = reports[0][1].facts
    for name, report in reports[1:]:
        same = report.facts["heldout"].get("sha256") == first["heldout"].get("sha256")
        if not same or report.facts["length"] != first["length"]:
            raise ConfigError(
                f"{name} and {reports[0][0]} differ in {'length' if same else 'heldout'}: their "
                "figures cannot be compared; evaluate again with the same."
            )
    reports = shared_judges(reports)
    judges = reports[0][1].judges
    if left_out := different_judges(labels.values(), judges):
        note(f"Left out, because not all reports have them: {', '.join(left_out)}.")
    rows = named_rows(reports)
    models = list(dict.fromkeys(named.name for named in rows if named.row.kind == "model"))
    if not models:
        raise ConfigError(f"{reports[0][0]} has no model's rows: there is nothing to compare.")
    baseline = models[0] if args.baseline is None else args.baseline
    if baseline not in models:
        raise ConfigError(f"There is no model {baseline!r}: choose {', '.join(models)}.")
    text = comparison(rows, baseline, judges)
    if args.out is not None:
        write_whole(args.out, text)
    write(text + "\n")
