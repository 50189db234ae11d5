"""benchmarks/bound.py: every model reads the same passages, and all their bits are pooled."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scripts import ROOT, script
from test_generator import WORDS

from fsdfm.cli.main import main
from fsdfm.study.ngram import NgramModel
from fsdfm.text.store import TokenStore
from fsdfm.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def bound() -> ModuleType:
    return script("benchmarks/bound.py")


def test_passages_are_whole_words_of_the_documents_in_turn(bound: ModuleType) -> None:
    documents = ["one two three four five six seven", "eight nine ten eleven twelve", "no"]
    found = bound.passages(documents, 10, 99)
    assert [each.document for each in found[:4]] == [0, 1, 0, 1]
    assert {each.text for each in found if each.document == 1} <= {
        "eight nine",
        " ten",
        " eleven",
        " twelve",
    }
    for each in found:
        assert 5 <= len(each.text) <= 10 or each.text == " ten"
        assert each.text in documents[each.document]
    assert bound.passages(documents, 10, 3) == found[:3]
    assert list(bound._parts("a" * 25, 10)) == ["a" * 10, "a" * 10, "a" * 5]


def test_the_figure_is_all_bits_over_all_bytes(bound: ModuleType) -> None:
    chosen = [bound.Passage(0, "aaaa"), bound.Passage(2, "é"), bound.Passage(0, "b" * 10)]
    nats = [8.0, 3.0, 5.0]
    row = bound.bound(lambda number, text: (nats[number], len(text)), chosen)
    bits = np.array([13.0, 3.0]) / math.log(2.0)
    assert row["bits_per_byte"] == pytest.approx(bits.sum() / 16, abs=1e-4)
    assert row["nats_per_token"] == pytest.approx(16 / 15, abs=1e-4)
    left_out = np.array([bits[1] / 2, bits[0] / 14])
    spread = math.sqrt(0.5 * ((left_out - left_out.mean()) ** 2).sum())
    assert row["documents"] == 2
    assert row["interval"] == pytest.approx(12.706 * spread, rel=1e-3)


def test_an_ngram_model_is_judged_by_the_same_passages(bound: ModuleType, tmp_path: Path) -> None:
    source, data, text = (tmp_path / name for name in ("a.txt", "data", "b.txt"))
    source.write_text((WORDS + "\n") * 60)
    text.write_text("the quick brown fox jumps over the lazy dog " * 8)
    argv = ["prepare", source, "--out", data, "--vocab-size", 300, "--validation-fraction", 0.2]
    assert main([*map(str, argv)]) == 0
    asked = ["--ngram", data, "--text", text, "--characters", 64, "--passages", 3]
    told = subprocess.run(
        [sys.executable, ROOT / "benchmarks/bound.py", *map(str, asked)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    row = json.loads(told.stdout)
    assert (row["passages"], row["documents"], row["interval"]) == (3, 1, None)
    store = TokenStore.open(data)
    tokenizer = Tokenizer.from_json(store.tokenizer_json)
    ids = store.train.block(0, store.train.tokens).numpy()
    model = NgramModel.fit(ids, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    chosen = bound.passages([text.read_text()], 64, 3)
    nats = [-model.log_probability(np.array(tokenizer.encode(p.text))).sum() for p in chosen]
    size = sum(len(p.text.encode()) for p in chosen)
    assert row["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2.0) / size, abs=1e-4)
