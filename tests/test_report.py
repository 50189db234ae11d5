"""Reports and comparisons: which differences are called real, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fsdfm.cli import main as cli
from fsdfm.core.errors import DataError
from fsdfm.eval.comparison import Named, comparison, differences, named_rows
from fsdfm.eval.report import Report, Row, load_report
from fsdfm.eval.tables import cell, markdown

FACTS: dict[str, Any] = {
    "fsdfm": "1",
    "torch": "2",
    "machine": "a machine",
    "length": 64,
    "seed": 0,
    "batch_size": 1,
    "preset": None,
    "judge": {
        "name": "j",
        "parameters": 1,
        "dtype": "float32",
        "window_tokens": 9,
        "stride_tokens": 4,
        "sha256": "1",
    },
    "heldout": {"name": "h", "sha256": "0", "blocks": 2},
    "models": {},
}


def made(
    name: str,
    nats: float,
    *,
    spread: float = 0.1,
    entropy: float = 5.0,
    count: int = 24,
    steps: int = 8,
    temperature: float = 1.0,
    seed: int = 0,
) -> Row:
    """A row whose samples have about `nats` a token."""
    draws = np.random.default_rng(seed).normal(nats, spread, size=count)
    records = [
        {
            "nats": 100.0 * float(x),
            "judge_tokens": 100.0,
            "utf8_bytes": 400.0,
            "entropy_nats": entropy,
            "repetition_4": 0.01,
        }
        for x in draws
    ]
    return Row(name, "model", "unconditional", steps, temperature, records)


def named(*rows: Row) -> list[Named]:
    return named_rows([("report", Report(FACTS, list(rows)))])


def verdicts(*rows: Row) -> dict[str, str]:
    return {d.metric: d.verdict for d in differences(named(*rows), rows[0].name)}


def test_a_difference_beyond_the_noise_is_real_and_one_within_it_is_not() -> None:
    base = made("a", 5.0, seed=1)
    assert verdicts(base, made("b", 4.7, seed=2))["ppl_pooled"] == "**lower**"
    assert verdicts(base, made("b", 5.3, seed=2))["ppl_pooled"] == "**higher**"
    assert verdicts(base, made("b", 5.0, seed=2))["ppl_pooled"] == "no clear difference"
    assert verdicts(base, made("b", 5.0, seed=2))["repetition_4"] == "no clear difference"


def test_pairs_cancel_what_they_share() -> None:
    """Same noise in both rows: a tenth of its spread is a real difference only in pairs."""
    base = made("a", 5.0, spread=0.5, seed=1)
    assert verdicts(base, made("b", 4.95, spread=0.5, seed=1))["ppl_pooled"] == "**lower**"
    other = made("b", 4.95, spread=0.5, seed=1, count=23)
    assert verdicts(base, other)["ppl_pooled"] == "no clear difference"


def test_many_comparisons_together_call_a_tie_real_once_in_twenty_times() -> None:
    """Families of 20 budgets, four samples each: some tie is called real in 5 % of the families.

    (20 budgets make 80 comparisons, of which two a budget, perplexity and bits, are one draw.)
    """
    wrong, families = 0, 60
    for family in range(families):
        rows = [
            made(name, 5.0, count=4, steps=k, seed=10_000 * family + 100 * k + (name == "b"))
            for k in range(1, 21)
            for name in ("a", "b")
        ]
        found = differences(named(*rows), "a")
        assert len(found) == 20 * 4
        wrong += any("**" in d.verdict for d in found)
    assert wrong / families <= 0.05 + 4.5 * (0.05 * 0.95 / families) ** 0.5


def test_one_sample_cannot_tell() -> None:
    assert (
        verdicts(made("a", 5.0, count=1), made("b", 3.0, count=1))["ppl_pooled"]
        == "one sample: cannot tell"
    )


def test_only_equal_settings_are_compared() -> None:
    assert verdicts(made("a", 5.0, steps=8), made("b", 4.0, steps=4)) == {}
    assert verdicts(made("a", 5.0), made("b", 4.0, temperature=0.9)) == {}


def test_quality_at_equal_entropy_is_read_off_the_frontier() -> None:
    """Half way between entropies 4.8 and 5.2 lies the geometric mean of the perplexities."""
    rows = [
        made("teacher", np.log(100.0), spread=0.0, entropy=5.0, steps=64),
        made("student", np.log(50.0), spread=0.0, entropy=4.8, temperature=0.8),
        made("student", np.log(98.0), spread=0.0, entropy=5.2),
        made("teacher", np.log(100.0), spread=0.0, entropy=4.0, steps=64, temperature=0.8),
    ]
    text = comparison(named(*rows), "teacher")
    assert "| student | 8 | 4.80 to 5.20 | 70.0 | 0.70x |" in text
    assert "at 5.00 nats" in text
    shifted = [made("teacher", 5.0, entropy=5.5, steps=64), *rows[1:3]]
    assert "out of range" in comparison(named(*shifted), "teacher")


def test_a_gain_is_set_beside_what_a_temperature_would_do() -> None:
    """The student's 60 at 4.9 nats; the teacher, cooled to 4.9, has sqrt(50 * 98) = 70."""
    rows = [
        made("teacher", np.log(50.0), spread=0.0, entropy=4.8, temperature=0.9),
        made("teacher", np.log(98.0), spread=0.0, entropy=5.0),
        made("student", np.log(60.0), spread=0.0, entropy=4.9),
    ]
    text = comparison(named(*rows), "teacher")
    setting = "8 steps, temperature 1"
    assert f"| student | unconditional | {setting} | 60.0 at 4.90 | 70.0 | 0.86x |" in text


def test_a_cell_shows_value_and_interval_or_nothing() -> None:
    row = made("a", np.log(50.0), spread=0.0)
    assert cell(row, "ppl_pooled") == "50.0 (50.0-50.0)"
    assert cell(row, "entropy_nats") == "5.000"
    assert cell(row, "token_accuracy") == "" and cell(row, "mauve") == ""
    assert cell(made("a", 1.0, count=1), "ppl_pooled").count("(") == 0


def test_an_empty_text_has_no_perplexity_and_takes_none_from_the_others() -> None:
    row = made("a", np.log(50.0), spread=0.0, count=3)
    row.records[1] |= {"nats": 0.0, "judge_tokens": 0.0, "utf8_bytes": 0.0}
    assert row.estimate("ppl_pooled").value == pytest.approx(50.0)
    assert row.estimate("ppl_mean").value == pytest.approx(50.0)
    assert row.estimate("ppl_mean").count == 2


def test_models_of_one_name_in_two_reports_are_told_apart() -> None:
    reports = [
        ("first", Report(FACTS, [made("m", 5.0)])),
        ("second", Report(FACTS, [made("m", 4.0)])),
    ]
    reports[0][1].rows[0].pooled["mauve"] = reports[1][1].rows[0].pooled["mauve"] = 0.5
    rows = named_rows(reports)
    assert [n.row.pooled for n in rows] == [{"mauve": 0.5}, {}]  # one report's human row only
    assert [n.name for n in rows] == [n.row.name for n in rows] == ["first: m", "second: m"]
    assert {d.verdict for d in differences(rows, "first: m") if d.metric == "ppl_pooled"} == {
        "**lower**"
    }


def test_the_legend_explains_every_column_that_is_shown() -> None:
    text = markdown(Report(FACTS, [made("m", 5.0)]))
    for name in ("ppl_pooled", "ppl_mean", "bits_per_byte", "entropy_bits", "repetition_4"):
        assert f"- `{name}`:" in text
    assert "- `token_accuracy`" not in text


def test_only_what_has_one_unit_is_compared() -> None:
    """Entropy between two tokenizers, a bound between two sources, times never."""
    rows = [made("a", 5.0), made("b", 4.0)]
    for row in rows:
        for record in row.records:
            record |= {"elbo_nats": 9.0, "elbo_bytes": 4.0, "seconds": 1.0}
    alike = named(*rows)
    whole = {d.metric for d in differences(alike, "a")}
    assert whole == {
        *("ppl_pooled", "bits_per_byte", "entropy_nats", "repetition_4"),
        "elbo_bits_per_byte",
    }
    for fact, lost in (
        ("tokenizer", {"entropy_nats", "repetition_4"}),
        ("source", {"elbo_bits_per_byte"}),
    ):
        other = replace(alike[1], about={**alike[1].about, fact: "another"})
        assert {d.metric for d in differences([alike[0], other], "a")} == whole - lost


def test_pairs_stay_pairs_where_a_sample_is_empty() -> None:
    """Sample 3 of one and 5 of the other say nothing: both go from both sides."""
    rows = [made("a", 5.0, spread=0.5, seed=1), made("b", 4.95, spread=0.5, seed=1)]
    for row, k in zip(rows, (3, 5), strict=True):
        row.records[k] |= {"nats": 0.0, "judge_tokens": 0.0, "utf8_bytes": 0.0}
    found = {d.metric: d for d in differences(named(*rows), "a")}["ppl_pooled"]
    assert found.figure.count == 22
    assert found.figure.value == pytest.approx(np.exp(-0.05), rel=1e-9)
    assert found.verdict == "**lower**"


@pytest.mark.parametrize(
    "content",
    [
        *("", "{}", "[]", '{"format": "fsdfm-report"}', "\x00"),
        '{"format": "fsdfm-report", "format_version": 1, "facts": {}, "rows": []}',
        json.dumps(
            {"format": "fsdfm-report", "format_version": 1}
            | {"facts": {**FACTS, "judge": None}, "rows": []}
        ),
        "[" * 100_000,
    ],
    ids=range(8),
)
def test_a_foreign_or_damaged_report_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(DataError, match="Cannot read report") as caught:
        load_report(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="There is no report"):
        load_report(tmp_path / "elsewhere")


def test_reports_of_different_judges_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {**FACTS, "judge": {**FACTS["judge"], "name": "k"}}
    other["judge"]["sha256"] = "2"
    for name, facts in (("a", FACTS), ("b", other)):
        Report(facts, [made("m", 5.0)]).save(tmp_path / name / "report.json")
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "differ in judge" in capsys.readouterr().err
    assert json.loads((tmp_path / "a" / "report.json").read_text())["format"] == "fsdfm-report"
    assert cli.main(["compare", str(tmp_path / "a"), "--baseline", "x"]) == 2
    assert "choose m" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_comparison_is_written_through_to_a_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Report(FACTS, [made("m", 5.0)]).save(tmp_path / "report.json")
    assert cli.main(["compare", str(tmp_path), "--out", "/dev/full"]) == 2
    assert capsys.readouterr().err.startswith("error: Cannot write /dev/full (No space left")
    assert Path("/dev/full").is_char_device()
