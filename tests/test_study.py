"""The study harness: equal compute, matched entropy, and a whole run at a toy size."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from fsdfm.model.config import ModelConfig
from fsdfm.model.transformer import Transformer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    """The benchmark, a script that imports its neighbour `markov`."""
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("study_benchmark", BENCHMARKS / "study.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCHMARKS))
    for name in (spec.name, "markov"):
        sys.modules.pop(name, None)


def test_recipes_spend_the_same_compute(study: ModuleType) -> None:
    # Path rows: forward 1, backward 2. Others: the same, and the target's evaluations.
    assert study.Recipe(share=1.0).updates(600) == 200
    assert study.Recipe("rk4", share=0.25).updates(600) == 100
    assert study.Recipe("semigroup", share=0.5).updates(600) == 150
    # 1/h: 1,024 of 2,047 rows are at the smallest step, 5 - .0005 * 2 in all.
    assert study.Recipe("rk4", share=0.0).updates(1000) == 200


@pytest.mark.parametrize("name", ["reverse_kl", "jensen_shannon", "total_variation"])
def test_divergences_vanish_at_equality_and_are_positive_elsewhere(
    name: str, study: ModuleType
) -> None:
    logits = torch.tensor([[0.5, -1.0, 2.0], [0.0, 0.0, 0.0]])
    divergence = study.DIVERGENCES[name]
    torch.testing.assert_close(
        divergence(logits.softmax(-1), logits), torch.zeros(2), atol=1e-6, rtol=0.0
    )
    target = torch.tensor([[0.25, 0.25, 0.5]])
    p = torch.tensor([[0.5, 0.25, 0.25]])
    both = (p + target) / 2
    known = {
        "reverse_kl": (p * (p / target).log()).sum(),
        "jensen_shannon": ((p * (p / both).log()).sum() + (target * (target / both).log()).sum())
        / 2,
        "total_variation": torch.tensor(0.25),
    }
    torch.testing.assert_close(divergence(target, p.log())[0], known[name])


def test_nats_are_read_off_the_line_at_the_goal(study: ModuleType) -> None:
    rows = [{"entropy": 5.0, "nats": 6.0}, {"entropy": 5.4, "nats": 7.0}]
    nats, inside = study.at_entropy(rows, 5.1)
    assert nats == pytest.approx(6.25) and inside
    nats, inside = study.at_entropy(rows, 5.8)
    assert nats == pytest.approx(8.0) and not inside
    assert study.at_entropy(rows[:1], 5.0) == (6.0, False)


def test_the_table_has_ratios_at_the_goals_entropy(study: ModuleType) -> None:
    def row(model: str, steps: int, entropy: float, perplexity: float) -> dict[str, object]:
        nats = {"nats": math.log(perplexity), "nats_se": 0.01}
        return {"model": model, "seed": 0, "steps": steps, "entropy": entropy, **nats}

    rows = [
        row("teacher", study.MANY, 5.5, 400.0),
        row("s", 2, 5.0, 300.0),
        row("s", 2, 6.0, 1200.0),
    ]
    table = study.ratios(rows).table([2, 4])
    assert "perplexity 400, entropy 5.500" in table
    # exp of the mean of ln 300 and ln 1200 is 600; 1.96 * sqrt(2) * .01 on either side.
    assert table.splitlines()[-1] == "| s | 0 | 1.50 (1.46-1.54) |  |"
    assert "teacher |" not in table
    assert study.ratios(rows[1:]) is None


def test_pooled_nats_come_with_the_error_of_a_ratio(study: ModuleType) -> None:
    assert study.standard_error([10.0, 20.0], [5, 10]) == pytest.approx(0.0)
    # Equal lengths: the error of a mean.
    assert study.standard_error([10.0, 14.0], [2, 2]) == pytest.approx(
        2.0 / math.sqrt(2) / 1.414214
    )


def test_an_old_row_says_the_same_where_it_says_nothing(study: ModuleType) -> None:
    facts = {"model": "rk4", "steps": 1, "first_sample": 0, "recipe": study.asdict(study.Recipe())}
    assert study.same_facts(facts, {"model": "rk4", "steps": 1, "recipe": {"target": "rk4"}})
    assert not study.same_facts(facts, {"model": "rk4", "steps": 1, "recipe": {"power": 1.0}})
    assert not study.same_facts(facts, {"model": "rk4", "steps": 1, "first_sample": 8})


def test_a_study_trains_judges_resumes_and_prints_one_table(
    study: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    config = {"vocab_size": 4, "hidden_size": 64, "blocks": 2, "heads": 4, "cond_size": 64}
    teacher = Transformer(ModelConfig.from_dict({**config, "context_length": 12}))
    tensors = {f"ema.{k}": v.clone() for k, v in teacher.state_dict().items()}
    (tmp_path / "teacher").mkdir()
    save_file(tensors, tmp_path / "teacher" / "checkpoint.safetensors")
    monkeypatch.setattr(study, "MANY", 4)
    arguments = f"study --out {tmp_path / 'out'} --language markov --teacher-run {tmp_path}/teacher"
    arguments += " --budget 12 --budgets 1 2 --samples 64 --recipes"
    monkeypatch.setattr(sys, "argv", [*arguments.split(), "rk4", "path only"])
    study.main()
    rows = [
        json.loads(line)
        for line in (tmp_path / "out" / "markov" / "results.jsonl").read_text().splitlines()
    ]
    # Two students and the teacher at 2 budgets, the teacher at many steps.
    assert len(rows) == 7 and all(0.0 < row["kl"] < 10.0 for row in rows)
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / "markov" / "table 0 64.md").read_text() in printed
    assert (tmp_path / "out" / "markov" / "figure 0 64.png").read_bytes()[1:4] == b"PNG"
    assert "| rk4 | 0 |" in printed and "| path only | 0 |" in printed
    assert "| teacher | 0 |" in printed
    study.main()
    again = (tmp_path / "out" / "markov" / "results.jsonl").read_text().splitlines()
    assert len(again) == 7


def averages(run: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(run / "checkpoint.safetensors")
    return {k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")}


def test_a_study_of_the_mask_source_trains_its_own_teacher(
    study: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(study, "MANY", 8)
    arguments = f"study --out {tmp_path} --language markov --source mask --teacher-steps 2"
    arguments += " --budget 6 --budgets 4 --temperatures 1 --samples 8 --recipes"
    names = ["rk4", "joint head", "joint head, drawn alone"]
    monkeypatch.setattr(sys, "argv", [*arguments.split(), *names])
    study.main()
    printed = capsys.readouterr().out
    for name in ("teacher", *names):
        assert f"| {name} | 0 |" in printed
    teacher, student = (
        averages(tmp_path / "markov, mask" / run) for run in ("teacher", "joint head 0")
    )
    assert teacher["vocab_embed.weight"].shape == (5, 64)
    assert "vocab_embed.weight" not in student  # a joint head leaves it as it is

    # The teacher is the same one, whichever seed comes first.
    again = f"study --out {tmp_path / 'again'} --language markov --source mask --teacher-steps 2"
    again += " --budget 6 --budgets 4 --samples 8 --seed 1 --recipes rk4"
    monkeypatch.setattr(sys, "argv", again.split())
    study.main()
    other = averages(tmp_path / "again" / "markov, mask" / "teacher")
    assert all(torch.equal(other[name], teacher[name]) for name in teacher)

    monkeypatch.setattr(
        sys, "argv", ["study", "--out", "x", "--language", "prose", "--source", "mask"]
    )
    with pytest.raises(SystemExit):
        study.main()
    assert "--source is for the Markov language" in capsys.readouterr().err
