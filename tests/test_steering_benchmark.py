"""The benchmark of steering: its parts run and go on after a kill; its baseline sees the left."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from language_models import save_lm
from scripts import script
from steering_fixtures import make_generators
from test_generator import WORDS

from fsdfm.model.io.causal_lm import load_causal_lm
from fsdfm.recipes.settings import AdaptSettings
from fsdfm.recipes.training import adapt
from fsdfm.text.packing import prepare
from fsdfm.text.settings import PrepareSettings
from fsdfm.text.tokenizer import Tokenizer, train_bpe

PARTS = ("cost", "words", "lengths", "auto", "prompts", "infill", "seam")


@pytest.fixture(scope="module")
def steering() -> ModuleType:
    return script("benchmarks/steering.py")


class Counting:
    """A judge of one nat a byte, and a baseline that fills nothing; both say how often."""

    asked = 0

    def judge(self, texts: list[str], prefixes: list[str]) -> list[Any]:
        self.asked += 1
        return [SimpleNamespace(score=SimpleNamespace(nats=float(len(t.encode())))) for t in texts]

    def fill(self, x: list[int], hidden: list[bool], temperature: float, seed: int) -> list[int]:
        self.asked += 1
        return list(x)


def bench(steering: ModuleType, out: Path, texts: int = 2) -> Any:
    numbers = {"texts": texts, "long_texts": 1, "repeats": 1, "requests": 4, "windows": 2}
    names = {"model": None, "judge": "none", "left": "none", "text": None, "seam_steps": 2}
    found = steering.Bench(argparse.Namespace(**numbers, **names, out=out))
    stub = Counting()
    found.__dict__ |= {"generator": make_generators(256)["twin"], "judge": stub, "left": stub}
    found.__dict__["held_out"] = [WORDS * 20]
    return found


def test_every_part_runs_and_measures_nothing_twice(steering: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "steering.json"
    first, again = bench(steering, out), bench(steering, out)
    assert tuple(steering.PARTS) == PARTS
    found = {part: steering.PARTS[part](first) for part in PARTS}
    assert first.judge.asked > 0
    assert found["words"]["required_there"] == found["words"]["requests"] == 4
    assert found["words"]["banned_there"] == 0
    assert found["infill"]["25%"]["left"]["accuracy"]["mean"] == 1.0
    assert found["infill"]["25%"]["left"]["judged_above_truth"]["nats_per_byte"] == 0.0
    assert found["prompts"]["own"] == {"nats_per_byte": 1.0, "standard_error": 0.0}
    again.generator.answer = None  # nothing is asked again
    rows = again.rows.read_text()
    again.rows.write_text(rows + '\n["words 9')  # as a kill leaves it
    for part in PARTS:
        assert steering.PARTS[part](again) == found[part]
    assert again.judge.asked == 0
    more = bench(steering, out, texts=3)
    steering.PARTS["prompts"](more)
    assert more.judge.asked == 4
    assert len(bench(steering, out).kept) == len(rows.splitlines()) + 1


def test_rows_of_another_model_text_or_setting_are_not_taken(
    steering: ModuleType, tmp_path: Path
) -> None:
    out, model = tmp_path / "steering.json", tmp_path / "model"
    model.mkdir()
    weights, generation = model / "model.safetensors", model / "generation.json"
    weights.write_bytes(b"some")
    generation.write_text("{}")

    def judged(text: str = WORDS * 20, **changes: Any) -> int:
        """How often the judge is asked."""
        found = bench(steering, out)
        vars(found.args).update({"model": str(model), **changes})
        found.__dict__["held_out"] = [text]
        steering.PARTS["prompts"](found)
        return int(found.judge.asked)

    assert judged() == 8 and judged() == 0
    for changes in ({"text": WORDS * 21}, {"windows": 3}, {"seam_steps": 4}, {"model": None}):
        assert judged(**changes) == 8 and judged(**changes) == 0
    for file, held in ((weights, b"others"), (generation, b'{"top_k": 5}')):
        file.write_bytes(held)
        assert judged() == 8
    assert judged(judge=str(weights)) == 8  # a judge's or a filler's path may be a file
    weights.write_bytes(b"again others")
    assert judged(judge=str(weights), model=None) == 8


def test_held_out_documents_that_are_too_short_are_refused(
    steering: ModuleType, tmp_path: Path
) -> None:
    found = bench(steering, tmp_path / "steering.json")
    size = len(found.generator.tokenizer.encode(WORDS))
    found.__dict__["held_out"] = [WORDS, "short"]
    with pytest.raises(SystemExit, match=f"No held-out document has more than {size} tokens: "):
        found.piece(size, 0)
    assert len(found.piece(size - 1, 0)) == size - 1


def test_the_hidden_share_is_told_as_it_is(steering: ModuleType, tmp_path: Path) -> None:
    found = steering.PARTS["infill"](bench(steering, tmp_path / "steering.json", texts=1))
    shares = [100 * sum(steering.spans(share, 0)) / steering.INFILL for share in steering.HIDDEN]
    assert list(found) == [f"{share:g}%" for share in shares] == ["12.5%", "25%", "50%"]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_spans_hide_a_share_and_touch_neither_each_other_nor_the_ends(
    steering: ModuleType, share: float
) -> None:
    for number in range(20):
        hidden = steering.spans(share, number)
        runs = "".join("x" if h else "." for h in hidden).split(".")
        assert {len(run) for run in runs} == {0, steering.SPAN}
        assert len(hidden) == steering.INFILL and not hidden[0] and not hidden[-1]
        assert abs(sum(hidden) / len(hidden) - share) < 0.05


def test_the_baseline_takes_the_likeliest_token_after_all_before_it(
    steering: ModuleType, tmp_path: Path
) -> None:
    save_lm(tmp_path / "lm")
    lm = load_causal_lm(str(tmp_path / "lm"))
    tokenizer = Tokenizer.from_json(lm.tokenizer_json)
    left = steering.left_filler(str(tmp_path / "lm"), tokenizer)
    x = tokenizer.encode("the miller saw a stranger at his door")[:12]
    hidden = [place in (0, 4, 5, 9) for place in range(len(x))]
    found = left.fill(x, hidden, 0.0, 0)
    assert [a for a, h in zip(found, hidden, strict=True) if not h] == [
        a for a, h in zip(x, hidden, strict=True) if not h
    ]
    for place, gap in enumerate(hidden):
        if gap:
            before = torch.tensor([[tokenizer.eos_id, *found[:place]]])
            with torch.no_grad():
                logits = lm.model(before).logits[0, -1]
            assert found[place] == int(logits.argmax())


def test_a_run_of_ours_fills_from_the_left_too(steering: ModuleType, tmp_path: Path) -> None:
    save_lm(tmp_path / "lm")
    text = tmp_path / "text.txt"
    text.write_text("the miller saw a stranger at his door. " * 200)
    lm = load_causal_lm(str(tmp_path / "lm"))
    tokenizer, data = Tokenizer.from_json(lm.tokenizer_json), tmp_path / "data"
    settings = PrepareSettings(validation_fraction=0.1)
    prepare([text], data, settings=settings, tokenizer=tokenizer)
    out = tmp_path / "rival"
    numbers: dict[str, Any] = {"steps": 1, "learning_rate": 1e-12, "context_length": 12}
    numbers |= {"attention": "causal", "batch_size": 2, "sample_every": 0, "device": "cpu"}
    assert adapt(AdaptSettings(model=str(tmp_path / "lm"), data=data, out=out, **numbers))
    x = tokenizer.encode("the miller saw a stranger at his door")[:12]
    hidden = [place in (0, 4, 5, 9) for place in range(len(x))]
    ours, theirs = (
        steering.left_filler(str(tmp_path / name), tokenizer).fill(x, hidden, 0.0, 0)
        for name in ("rival", "lm")
    )
    assert ours == theirs != x
    other = train_bpe(["another text"], 260)
    with pytest.raises(SystemExit, match="another tokenizer"):
        steering.left_filler(str(out), other)
