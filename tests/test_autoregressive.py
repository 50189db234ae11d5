"""The autoregressive rival: one token at a time is the same law as all at once."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fsdfm.core.errors import ConfigError
from fsdfm.flow.grid import SMALLEST_STEP
from fsdfm.model.causal import CausalConfig, CausalNetwork
from fsdfm.model.io.pretrained import save_pretrained
from fsdfm.study.autoregressive import Autoregressive, _Past
from fsdfm.text.packing import prepare
from fsdfm.text.settings import PrepareSettings
from fsdfm.text.store import TokenStore
from fsdfm.text.tokenizer import Tokenizer
from fsdfm.train.next_token import TIME, NextToken

V = 11


def network(vocab_size: int = V, **changes: object) -> CausalNetwork:
    """A tiny causal network in which every part does something."""
    values: dict[str, object] = {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "blocks": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_size": 6,
        "mlp_size": 20,
        "cond_size": 8,
        "context_length": 12,
        "start_id": 0,
        "attention": "causal",
        **changes,
    }
    torch.manual_seed(0)
    model = CausalNetwork(CausalConfig(**values))  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def times(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((count,), TIME), torch.full((count,), SMALLEST_STEP)


@torch.no_grad()
def test_one_position_at_a_time_gives_the_hidden_rows_of_a_whole_pass() -> None:
    model = network()
    x = torch.randint(V, (3, 9), generator=torch.Generator().manual_seed(1))
    whole = model.body(x, *times(3))
    cos, sin = model.rotary_emb.tables(10)
    c = model.condition(*times(1))
    pasts = [_Past(block, 3, 10) for block in model.blocks]
    for place, token in enumerate(model.shifted(x)[:, :-1].unbind(1)):
        row = model.vocab_embed(token)[:, None]
        for past in pasts:
            row = past.step(row, c, cos[place : place + 1], sin[place : place + 1])
        row = model.output_layer.final(row, c)[:, 0]
        torch.testing.assert_close(row, whole[:, place], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_future_token_changes_nothing_before_it() -> None:
    model = network()
    x = torch.randint(V, (1, 9), generator=torch.Generator().manual_seed(1))
    changed = x.clone()
    changed[0, 5] = (x[0, 5] + 1) % V
    before, after = (model.body(each, *times(1)) for each in (x, changed))
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


def test_texts_follow_the_law_that_the_network_gives() -> None:
    model = Autoregressive(network(3))
    count = 4000
    texts = np.array(model.samples(2, range(count)))
    pairs = [(a, b) for a in range(3) for b in range(3)]
    p = np.exp([model.log_probability(np.array(pair)).sum() for pair in pairs])
    assert p.sum() == pytest.approx(1.0, abs=1e-5)
    seen = np.array([(texts == pair).all(1).sum() for pair in pairs])
    error = np.sqrt(count * p * (1 - p))
    assert (np.abs(seen - count * p) < 4.5 * error).all()
    assert model.sample(2, 7) == texts[7].tolist()


def test_a_temperature_sharpens_the_law_and_zero_takes_the_likeliest_token() -> None:
    model, count = Autoregressive(network(3)), 2000
    p = np.exp([model.log_probability(np.array([token])).sum() for token in range(3)])
    sharp = p**2 / (p**2).sum()
    first = np.array(model.samples(1, range(count), 0.5))[:, 0]
    seen = np.bincount(first, minlength=3)
    assert (np.abs(seen - count * sharp) < 4.5 * np.sqrt(count * sharp * (1 - sharp))).all()
    likeliest = model.samples(3, [1, 2], 0.0)
    assert likeliest[0] == likeliest[1] and likeliest[0][0] == int(p.argmax())


def test_gaps_are_filled_from_the_left_and_the_rest_is_kept() -> None:
    model = Autoregressive(network(3))
    texts: list[list[int | None]] = [[1, None, 2, None], [None, 0, 1, None]]
    count = 1500
    found = model.fill(texts * count, range(2 * count))
    law: dict[tuple[int, ...], float] = {}
    for text in texts:
        for a, b in ((a, b) for a in range(3) for b in range(3)):
            drawn = iter((a, b))
            whole = [next(drawn) if token is None else token for token in text]
            logs = model.log_probability(np.array(whole))
            law[tuple(whole)] = float(
                np.exp(sum(x for x, token in zip(logs, text, strict=True) if token is None))
            )
    assert sum(law.values()) == pytest.approx(2.0, abs=1e-5)
    seen = Counter(tuple(text) for text in found)
    assert seen.keys() <= law.keys()
    for text, p in law.items():
        assert abs(seen[text] - count * p) < 4.5 * np.sqrt(count * p * (1 - p)), text


def test_the_objective_is_the_mean_of_the_log_probabilities() -> None:
    model = network()
    x = torch.randint(V, (2, 12), generator=torch.Generator().manual_seed(2))
    objective = NextToken(V)
    loss = objective.loss(model, model, x, torch.Generator())["loss"]
    ours = Autoregressive(model)
    nats = -np.mean([ours.log_probability(row.numpy()) for row in x])
    assert loss.item() == pytest.approx(float(nats), rel=1e-5)
    logits = model(x, *times(2))
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), x.flatten()))


def test_a_network_that_sees_both_sides_is_refused() -> None:
    with pytest.raises(ConfigError, match="not autoregressive"):
        Autoregressive(network(attention="bidirectional"))
    with pytest.raises(ConfigError, match="no start token"):
        Autoregressive(network(start_id=None))


def test_the_command_writes_texts_and_tells_the_bits(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    source = tmp_path / "text.txt"
    source.write_text("one two three, and one more. " * 400)
    data = tmp_path / "data"
    prepare([source], data, settings=PrepareSettings(vocab_size=270, validation_fraction=0.1))
    store = TokenStore.open(data)
    tokenizer = Tokenizer.from_json(store.tokenizer_json)
    model = network(tokenizer.vocab_size, context_length=16)
    save_pretrained(tmp_path / "ar", model, tokenizer_json=store.tokenizer_json)
    out = tmp_path / "ar.jsonl"
    words = ("baseline", "ar", "--model", tmp_path / "ar", "--data", data, "--out", out)
    code, said, _ = run(*words, "--num-samples", "3", "--length", "20", "--seed", "5")
    assert code == 0
    ids = store.validation.block(0, store.validation.tokens)
    nats = -Autoregressive(model).log_probability(ids.numpy()).sum()
    size = len(tokenizer.decode(ids.tolist()).encode())
    assert f"{nats / math.log(2) / size:.3f} bits a byte" in said
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["seed"] for record in records] == [5, 6, 7]
    assert all(record["tokens"] == 20 for record in records)
    flow = network(tokenizer.vocab_size, context_length=16, attention="bidirectional")
    save_pretrained(tmp_path / "flow", flow, tokenizer_json=store.tokenizer_json)
    words = ("baseline", "ar", "--model", tmp_path / "flow", "--data", data, "--out", out)
    code, _, told = run(*words)
    assert code == 2 and told.startswith("error: The model is not autoregressive")
    assert told.count("\n") == 1
