"""Several judges: each one's figures everywhere, what reports share, and whom judges flatter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_report import FACTS, made

from fsdfm.cli import main as cli
from fsdfm.core.errors import ConfigError, DataError
from fsdfm.eval.comparison import comparison, differences, named_rows
from fsdfm.eval.report import Opinion, Report, Row, load_report
from fsdfm.eval.several import flattered, kinship, shared_judges, views
from fsdfm.eval.tables import markdown, section, table

J = {**FACTS["judge"], "model": "SmolLM2-135M-Instruct"}
K = {**FACTS["judge"], "name": "k", "model": "Gemma-3-270M", "sha256": "2"}
SEVERAL: dict[str, Any] = {**FACTS, "judge": J, "other_judges": [K]}
MODEL = {
    **{"parameters": 1, "dtype": "float32", "source": "uniform", "step_embedding": "log2"},
    **{"step": "exact", "movers": "independent", "top_p": 1.0},
}


def seen(row: Row, nats: float, mauve: float | None = None) -> Row:
    """The row with the judgement of k, for whom each sample has `nats` a token of its own."""
    sums = [{"nats": 80.0 * nats, "judge_tokens": 80.0} for _ in row.records]
    told = Opinion(sums, {} if mauve is None else {"mauve": mauve})
    return replace(row, others={"k": told})


def likelihood(name: str) -> Row:
    record = {"elbo_nats": 9.0, "elbo_tokens": 3.0, "elbo_bytes": 8.0}
    return Row(name, "model", "likelihood", None, None, [record, record])


def several(*rows: Row, **facts: Any) -> Report:
    return Report({**SEVERAL, **facts}, [*rows])


def test_each_judge_has_its_own_view_of_a_row() -> None:
    row = seen(made("m", 5.0, spread=0.0), 4.0, mauve=0.25)
    row.pooled.update(mauve=0.5, distinct_2=0.9)
    own, other = (rows[0] for rows in views([row], ["j", "k"]))
    assert own is row
    assert row.estimate("ppl_pooled").value == pytest.approx(148.4, abs=0.1)
    assert other.estimate("ppl_pooled").value == pytest.approx(54.6, abs=0.1)
    bits = [r.estimate("bits_per_byte").value for r in (row, other)]
    assert bits[1] / bits[0] == pytest.approx(4 * 80 / (5 * 100))
    assert other.estimate("entropy_nats") == row.estimate("entropy_nats")
    assert other.pooled == {"mauve": 0.25, "distinct_2": 0.9}
    assert likelihood("m").under("k").records == likelihood("m").records
    assert seen(row, 4.0).under("k").pooled == {"distinct_2": 0.9}  # not the other judge's


def test_a_report_of_several_judges_comes_back_from_its_file(tmp_path: Path) -> None:
    report = several(seen(made("m", 5.0), 4.0, mauve=0.25), likelihood("m"))
    report.save(tmp_path / "report.json")
    assert load_report(tmp_path) == report
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    figures = rows[0]["others"]["k"]["figures"]
    assert figures.keys() == {"ppl_pooled", "ppl_mean", "bits_per_byte", "mauve"}
    assert figures["ppl_pooled"]["value"] == pytest.approx(54.6, abs=0.1)
    assert "others" not in rows[1]


def test_a_report_of_one_judge_is_written_as_it_always_was(tmp_path: Path) -> None:
    Report(FACTS, [made("m", 5.0)]).save(tmp_path / "report.json")
    values = json.loads((tmp_path / "report.json").read_text())
    assert values["facts"] == FACTS
    fields = {"name", "kind", "task", "steps", "temperature", "records", "pooled", "excerpt"}
    assert values["rows"][0].keys() == fields | {"figures"}


@pytest.mark.parametrize(
    "damage",
    [
        lambda values: values["rows"][0].pop("others"),
        lambda values: values["rows"][0]["others"]["k"]["records"].pop(),
        lambda values: values["rows"][0]["others"]["k"]["records"][0].update(nats="x"),
        lambda values: values["rows"][0]["others"].update(l=values["rows"][0]["others"]["k"]),
        lambda values: values["facts"].update(other_judges=[K, K]),
        lambda values: values["facts"].update(other_judges=[None]),
    ],
    ids=range(6),
)
def test_a_report_that_lacks_a_judgement_is_damaged(tmp_path: Path, damage: Any) -> None:
    several(seen(made("m", 5.0), 4.0)).save(tmp_path / "report.json")
    values = json.loads((tmp_path / "report.json").read_text())
    damage(values)
    (tmp_path / "report.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="Cannot read report"):
        load_report(tmp_path)


def test_every_judge_has_its_columns_and_other_figures_stand_once() -> None:
    row = seen(made("m", 5.0, spread=0.0, count=1), 4.0)
    head, _, line = table([row], ["j", "k"])
    columns = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    assert columns["ppl_pooled (j)"] == "148.4" and columns["ppl_pooled (k)"] == "54.6"
    assert columns["entropy_nats"] == "5.000"
    assert not any(name in columns for name in ("ppl_pooled", "entropy_nats (k)"))
    assert "| ppl_pooled |" in table([made("m", 5.0)], ["j"])[0]
    text = markdown(several(row))
    assert text.count("- judge: ") == 2 and "- judge: k, " in text
    assert "- `ppl_pooled`:" in text and "- `ppl_pooled (k)`" not in text


def test_each_judge_compares_what_depends_on_it() -> None:
    """b is better than a for j, worse for k."""
    rows = named_rows([("r", several(seen(made("a", 5.0), 4.0), seen(made("b", 4.5), 4.1)))])
    found = {(d.metric, d.judge): d for d in differences(rows, "a", ["j", "k"])}
    assert found["ppl_pooled", "j"].verdict == found["bits_per_byte", "j"].verdict == "**lower**"
    assert found["ppl_pooled", "k"].verdict == "**higher**"
    assert found["ppl_pooled", "k"].figure.value == pytest.approx(1.105, abs=0.001)
    assert {judge for metric, judge in found if metric == "entropy_nats"} == {None}
    assert len(found) == 2 * 2 + 2
    text = comparison(rows, "a", [J, K])
    assert "| ppl_pooled (k) | 1.105x |" in text and "6 comparisons" in text


def test_frontiers_are_read_under_each_judge() -> None:
    """j: sqrt(50 * 98) = 70 at 5.0 nats. k: sqrt(20 * 45) = 30."""
    rows = [
        seen(made("teacher", 4.6, spread=0.0, entropy=5.0, steps=64), 4.0),
        seen(made("student", 3.912, spread=0.0, entropy=4.8, temperature=0.8), 2.99573),
        seen(made("student", 4.58497, spread=0.0, entropy=5.2), 3.80666),
    ]
    text = comparison(named_rows([("r", several(*rows))]), "teacher", [J, K])
    first, second = text.split("## At equal entropy: unconditional, judge ")[1:]
    assert first.startswith("j") and "| student | 8 | 4.80 to 5.20 | 70.0 |" in first
    assert second.startswith("k") and "| student | 8 | 4.80 to 5.20 | 30.0 |" in second


def test_pooled_figures_of_every_judge_stand_beside_one_reports_human_row_only() -> None:
    reports = [(name, several(seen(made(name, 5.0), 4.0, mauve=0.5))) for name in ("a", "b")]
    first, second = (named.row.others["k"].pooled for named in named_rows(reports))
    assert (first, second) == ({"mauve": 0.5}, {})


def test_reports_are_compared_by_the_judges_that_all_have(tmp_path: Path, capsys: Any) -> None:
    """The second report knows k alone, by another name and as its first judge."""
    alone = Report({**FACTS, "judge": {**K, "name": "other/k"}}, [made("b", 4.5, spread=0.0)])
    both = several(seen(made("a", 5.0), 4.0), likelihood("a"))
    for first, second in ((both, alone), (alone, both)):
        found = [report for _, report in shared_judges([("1", first), ("2", second)])]
        assert [j["sha256"] for r in found for j in r.judges] == ["2", "2"]
        assert len({r.judges[0]["name"] for r in found}) == 1
        row = found[0 if first is both else 1].rows[0]
        assert row.estimate("ppl_pooled").value == pytest.approx(54.6, abs=0.1)
        assert row.others == {}
    for name, report in (("a", both), ("b", alone)):
        report.save(tmp_path / name / "report.json")
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    printed = capsys.readouterr()
    assert "| b | unconditional | 8 steps, temperature 1 | ppl_pooled | 1.649x |" in printed.out
    assert "Left out, because not all reports have them: j." in printed.err


def test_judges_in_another_order_are_the_same_judges() -> None:
    row = made("b", 4.0, spread=0.0)
    turned = replace(row, others={"j": Opinion([{"nats": 500.0, "judge_tokens": 100.0}] * 24)})
    other = Report({**FACTS, "judge": K, "other_judges": [J]}, [turned])
    first = several(seen(made("a", 5.0), 4.0))
    (_, a), (_, b) = shared_judges([("1", first), ("2", other)])
    assert a == first
    assert [j["name"] for j in b.judges] == ["j", "k"]
    assert b.rows[0].estimate("ppl_pooled").value == pytest.approx(148.4, abs=0.1)
    assert b.rows[0].under("k").estimate("ppl_pooled").value == pytest.approx(54.6, abs=0.1)


def test_reports_without_a_common_judge_are_not_compared() -> None:
    reports = [(str(s), Report({**FACTS, "judge": {**J, "sha256": s}}, [])) for s in (1, 2)]
    with pytest.raises(ConfigError, match="2 and 1 differ in judge"):
        shared_judges(reports)


@pytest.mark.parametrize(
    ("judge", "ancestors", "what"),
    [
        ("SmolLM2-135M", ["SmolLM2-135M"], "an ancestor"),
        ("smollm2-135m", ["Other", "SmolLM2-135M"], "an ancestor"),
        ("SmolLM2-135M-Instruct", ["SmolLM2-135M"], "of the family"),
        ("SmolLM2-360M", ["SmolLM2-135M"], "of the family"),
        ("gpt2-large", ["gpt2"], "of the family"),
        ("Gemma-3-270M", ["SmolLM2-135M"], None),
        ("SmolLM-135M", ["SmolLM2-135M"], None),
        ("Gemma-3-270M", [], None),
    ],
)
def test_kin_share_the_beginning_of_their_names(
    judge: str, ancestors: list[str], what: str | None
) -> None:
    assert kinship(judge, ancestors) == what


def test_one_line_says_whom_a_judge_flatters_and_whom_to_read() -> None:
    models = {"a": ["SmolLM2-135M"], "b": [], "c": ["SmolLM2-135M-Instruct"]}
    assert flattered([J, K], models) == [
        "j (SmolLM2-135M-Instruct) is of the family of a and an ancestor of c: its figures flatter "
        "them, read k's."
    ]
    assert flattered([J], {"a": models["a"]}) == [
        "j (SmolLM2-135M-Instruct) is of the family of a: its figures flatter it, "
        "read another judge's."
    ]
    assert flattered([K], models) == []
    old = {"name": "smollm2"}  # a report from before judges knew their models
    assert "smollm2 (SmolLM2-135M-Instruct) is of the family" in flattered([old], models)[0]


def test_the_line_stands_under_every_table_of_such_a_model() -> None:
    kin = {"m": {**MODEL, "ancestors": ["SmolLM2-135M"]}}
    report = several(seen(made("m", 5.0), 4.0), likelihood("m"), models=kin)
    note = "j (SmolLM2-135M-Instruct) is of the family of m: its figures flatter it, read k's."
    assert section(report, "unconditional")[-2:] == ["", note]
    assert note not in section(report, "likelihood")  # nobody judged it
    assert markdown(report).count(note) == 1
    assert ", from SmolLM2-135M" in markdown(report)
    rows = named_rows([("r", report)])
    assert comparison(rows, "m", report.judges).count(note) == 1
    strangers = several(seen(made("m", 5.0), 4.0), models={"m": MODEL})
    assert "flatter" not in markdown(strangers)
