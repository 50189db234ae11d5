"""What the README claims is what docs/results/claims.json says, and nothing else."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from fsdfm.core.errors import DataError
from fsdfm.study.claims import Claim, Shown, read_claims, shown

ROOT = Path(__file__).parents[1]
CLAIMS = ROOT / "docs" / "results" / "claims.json"
README = ROOT / "README.md"


def test_every_figure_of_the_readme_is_a_claim() -> None:
    claims = read_claims(CLAIMS)
    found = list(shown(README.read_text()))
    assert found
    unknown = [each.id for each in found if each.id not in claims]
    assert unknown == [], "name these in docs/results/claims.json (CONTRIBUTING.md)"
    wrong = [(each, claims[each.id].numbers) for each in found if not each.says(claims[each.id])]
    assert wrong == []


def test_every_claim_says_where_it_comes_from() -> None:
    for claim in read_claims(CLAIMS).values():
        assert claim.n >= 1 and claim.command and claim.machine, claim.id
        assert datetime.date.fromisoformat(claim.date)
        if claim.interval is not None:
            assert claim.interval[0] <= claim.value <= claim.interval[1], claim.id


DOCUMENT = """# A title

Faster: 5.7 seconds<!-- claim: speed/ours/seconds --> and 12 others.

<!-- claims: speed -->

| what | seconds | tokens |
|---|---|---|
| **ours** | **5.7** (5.1-6.3) | 1,024 |
| [theirs](x.md) | **23.7 MiB** | 3 words |

| what | n |
|---|---|
| unnamed | 3 |
"""


def claim(value: float, interval: tuple[float, float] | None = None) -> Claim:
    return Claim(
        id="x",
        value=value,
        interval=interval,
        n=3,
        command="c",
        machine="m",
        date="2026-01-01",
    )


def test_tables_and_sentences_are_read_with_the_ids_of_their_figures() -> None:
    assert list(shown(DOCUMENT)) == [
        Shown("speed/ours/seconds", ("5.7", "5.1", "6.3")),
        Shown("speed/ours/tokens", ("1,024",)),
        Shown("speed/theirs/seconds", ("23.7",)),
        Shown("?/unnamed/n", ("3",)),
        Shown("speed/ours/seconds", ("5.7",)),
    ]


@pytest.mark.parametrize(
    ("texts", "told", "right"),
    [
        (("5.7",), claim(5.71), True),
        (("5.7",), claim(5.76), False),
        (("5.70",), claim(5.7), True),
        (("1,024",), claim(1024.4), True),
        (("5.7",), claim(5.7, (5.1, 6.3)), True),
        (("5.7", "5.1", "6.3"), claim(5.7, (5.1, 6.3)), True),
        (("5.7", "5.1", "6.4"), claim(5.7, (5.1, 6.3)), False),
        (("5.7", "5.1", "6.3"), claim(5.7), False),
        ((), claim(5.7), False),
    ],
)
def test_a_figure_agrees_with_its_claim_to_the_digits_shown(
    texts: tuple[str, ...], told: Claim, right: bool
) -> None:
    assert Shown("x", texts).says(told) is right


def test_a_file_of_claims_is_refused_with_the_name_of_the_wrong_one(tmp_path: Path) -> None:
    path = tmp_path / "claims.json"
    fields = {"interval": None, "n": 1, "command": "c", "machine": "m", "date": "2026-01-01"}
    good = {"id": "a", "value": 1.0, **fields}
    path.write_text(json.dumps([good, good]))
    with pytest.raises(DataError, match="a is there twice"):
        read_claims(path)
    path.write_text(json.dumps([{"id": "b", "value": 1.0}]))
    with pytest.raises(DataError, match="b needs the fields id, value"):
        read_claims(path)
    path.write_text("{")
    with pytest.raises(DataError, match="Cannot read"):
        read_claims(path)
