"""Several judges: their views of the rows, those that reports share, and whom they flatter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fsdfm.core.errors import ConfigError
from fsdfm.core.packaged import own_name
from fsdfm.eval.report import Report, Row


def views(rows: Sequence[Row], judges: Sequence[str]) -> list[list[Row]]:
    """The rows as each judge sees them.

    Args:
        rows: of one report.
        judges: names of its judges, the first one first.
    """
    return [list(rows), *([row.under(judge) for row in rows] for judge in judges[1:])]


def shared_judges(reports: Sequence[tuple[str, Report]]) -> list[tuple[str, Report]]:
    """The reports, each with only the judges that all have, in the first one's order and names.

    A judge is the same where its weights, tokenizer and number format are.

    Args:
        reports: each with a label.

    Raises:
        ConfigError: a report has none of the first one's.
    """
    tables = [{_identity(judge): judge["name"] for judge in r.judges} for _, r in reports]
    for (label, _), table in zip(reports, tables, strict=True):
        if not tables[0].keys() & table.keys():
            raise ConfigError(
                f"{label} and {reports[0][0]} differ in judge: their figures cannot be compared; "
                "evaluate again with the same."
            )
    keys = [key for key in tables[0] if all(key in table for table in tables)]
    if not keys:
        raise ConfigError("No judge is in all the reports: evaluate again with the same.")
    return [
        (label, report.only({table[key]: tables[0][key] for key in keys}))
        for (label, report), table in zip(reports, tables, strict=True)
    ]


def different_judges(reports: Iterable[Report], judges: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the judges of some reports that are none of the given ones."""
    given = {_identity(judge) for judge in judges}
    others = [judge for report in reports for judge in report.judges]
    return list(dict.fromkeys(j["name"] for j in others if _identity(j) not in given))


def _identity(judge: Mapping[str, Any]) -> tuple[Any, Any]:
    return judge.get("sha256"), judge.get("dtype")


def kinship(judge: str, ancestors: Sequence[str]) -> str | None:
    """How a judge is related to a model that descends from others.

    Args:
        judge: the judge's own name, such as SmolLM2-135M-Instruct.
        ancestors: names of what the model descends from.

    Returns:
        "an ancestor", where it is one of them; "of the family", where its name starts like one's,
        up to the first hyphen or underscore (SmolLM2 here); else None.
    """
    names = [name.casefold() for name in ancestors]
    if judge.casefold() in names:
        return "an ancestor"
    families = {re.split("[-_]", name)[0] for name in names}
    return "of the family" if re.split("[-_]", judge.casefold())[0] in families else None


def flattered(
    judges: Sequence[Mapping[str, Any]], models: Mapping[str, Sequence[str]]
) -> list[str]:
    """One line for each judge that is related to a model it judges.

    Args:
        judges: facts of each.
        models: what each model descends from, by the model's name.
    """
    related: dict[str, dict[str, str]] = {}
    owns = {judge["name"]: judge.get("model") or own_name(judge["name"]) for judge in judges}
    for name, own in owns.items():
        found = {model: kinship(own, ancestors) for model, ancestors in models.items()}
        related[name] = {model: kin for model, kin in found.items() if kin is not None}
    lines = []
    for name, kin in related.items():
        if kin:
            others = [o for o in owns if not related[o].keys() & kin.keys()]
            told = " and ".join(
                f"{what} of {', '.join(m for m in kin if kin[m] == what)}"
                for what in dict.fromkeys(kin.values())
            )
            lines.append(
                f"{name} ({owns[name]}) is {told}: its figures flatter "
                f"{'it' if len(kin) == 1 else 'them'}, read "
                f"{' or '.join(others) if others else 'another judge'}'s."
            )
    return lines
