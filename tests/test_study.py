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
from safetensors.torch import save_file

from fsdfm.model.transformer import ModelConfig, Transformer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Two threads over small tensors wait for each other wherever the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def test_pooled_nats_come_with_the_error_of_a_ratio(study: ModuleType) -> None:
    assert study.standard_error([10.0, 20.0], [5, 10]) == pytest.approx(0.0)
    # Equal lengths: the error of a mean.
    assert study.standard_error([10.0, 14.0], [2, 2]) == pytest.approx(
        2.0 / math.sqrt(2) / 1.414214
    )


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
    monkeypatch.setattr(study, "args_samples", lambda language: 64)
    monkeypatch.setattr(study, "MANY", 4)
    arguments = f"study --out {tmp_path / 'out'} --language markov --teacher-run {tmp_path}/teacher"
    arguments += " --budget 12 --budgets 1 2 --pairs 4096 --pair-steps 2 --recipes"
    monkeypatch.setattr(sys, "argv", [*arguments.split(), "rk4", "path only, pairs"])
    study.main()
    rows = [
        json.loads(line)
        for line in (tmp_path / "out" / "markov" / "results.jsonl").read_text().splitlines()
    ]
    # Two students and the teacher at 2 budgets x 2 temperatures, the teacher at many steps.
    assert len(rows) == 13
    printed = capsys.readouterr().out
    assert "| rk4 | 0 |" in printed and "| path only, pairs | 0 |" in printed
    assert "| teacher | 0 |" in printed
    study.main()
    again = (tmp_path / "out" / "markov" / "results.jsonl").read_text().splitlines()
    assert len(again) == 13
    pairs = torch.from_numpy(
        study.np.load(tmp_path / "out" / "markov" / "pairs.npy").astype("int64")
    )
    assert pairs.shape == (4096, 2, 12) and (pairs < 4).all()
