"""The n-gram model: closed forms, a slow twin, its sampler, and `fsdfm baseline ngram`."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from conftest import Run

from fsdfm.core.errors import ConfigError, DataError
from fsdfm.eval.heldout import read_texts
from fsdfm.study.ngram import FALLBACK_DISCOUNTS, NgramModel, stages
from fsdfm.text.packing import prepare
from fsdfm.text.settings import PrepareSettings
from fsdfm.text.store import TokenStore
from fsdfm.text.tokenizer import Tokenizer

EOS, A, B = 0, 1, 2
SYMBOLS = 5


def documents(seed: int, tokens: int) -> np.ndarray:
    """Skewed random symbols 1 to 4 with an EOS here and there; symbol 4 comes late or never."""
    chance = np.random.default_rng(seed)
    return np.append(chance.choice(SYMBOLS, size=tokens - 1, p=[0.1, 0.5, 0.25, 0.14, 0.01]), EOS)


def law(model: NgramModel, history: tuple[int, ...]) -> np.ndarray:
    """p(. | history), history from the start of a document on, shape (V,)."""
    tokens = range(model.vocab_size)
    return np.exp([model.log_probability(np.array([*history, w]))[-1] for w in tokens])


class SlowTwin:
    """The same law from dictionaries and the formulas, one context at a time."""

    def __init__(self, ids: np.ndarray, vocab_size: int, order: int) -> None:
        self.vocab_size, self.order = vocab_size, order
        padded: list[tuple[int, ...]] = []
        history = (EOS,) * (order - 1)
        for w in ids.tolist():
            padded.append((*history, w))
            history = self.after(history, w)
        self.counts = {order: Counter(padded)}
        for k in range(order - 1, 0, -1):
            behind = defaultdict(set)
            for gram in self.counts[k + 1]:
                behind[gram[1:]].add(gram[0])
            self.counts[k] = Counter({gram: len(tokens) for gram, tokens in behind.items()})

    def after(self, history: tuple[int, ...], token: int) -> tuple[int, ...]:
        longer = (*history, token) if token != EOS else (EOS,) * self.order
        return longer[len(longer) - self.order + 1 :]

    def discount(self, k: int, count: int) -> float:
        n = Counter(self.counts[k].values())
        if not all(n[j] for j in (1, 2, 3, 4)):
            return (0.0, 0.5, 1.0, 1.5)[min(count, 3)]
        y = n[1] / (n[1] + 2 * n[2])
        found = [0.0, 1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]]
        return found[min(count, 3)] if min(found[1:]) > 0 else (0.0, 0.5, 1.0, 1.5)[min(count, 3)]

    def p(self, w: int, history: tuple[int, ...]) -> float:
        k = len(history) + 1
        lower = self.p(w, history[1:]) if k > 1 else 1.0 / self.vocab_size
        after = {g[-1]: c for g, c in self.counts[k].items() if g[:-1] == history}
        total = sum(after.values())
        if not total:
            return lower
        backoff = sum(self.discount(k, c) for c in after.values()) / total
        count = after.get(w, 0)
        return (count - self.discount(k, count)) / total + backoff * lower


def test_a_bigram_law_by_hand() -> None:
    # Text a b a b EOS. Too few counts for an estimate: the discounts are 1/2, 1, 3/2.
    model = NgramModel.fit(np.array([A, B, A, B, EOS]), vocab_size=3, eos_id=EOS, order=2)
    # The token a comes after EOS and b; b after a; EOS after b: continuation counts 2, 1, 1.
    backoff = Fraction(1, 2) + Fraction(1, 2) + 1  # discounts of 1, 1 and 2 ...
    unigram = {
        A: (2 - Fraction(1)) / 4 + backoff / 4 / 3,
        B: (1 - Fraction(1, 2)) / 4 + backoff / 4 / 3,
        EOS: (1 - Fraction(1, 2)) / 4 + backoff / 4 / 3,
    }
    assert unigram == {A: Fraction(5, 12), B: Fraction(7, 24), EOS: Fraction(7, 24)}
    # b follows a twice; a and EOS follow b once each; a follows EOS once.
    half = Fraction(1, 2)
    expected = {
        A: {A: half * unigram[A], B: half + half * unigram[B], EOS: half * unigram[EOS]},
        B: {w: (half if w != B else 0) / 2 + half * unigram[w] for w in (EOS, A, B)},
        EOS: {w: (half if w == A else 0) + half * unigram[w] for w in (EOS, A, B)},
    }
    assert expected[A][B] == Fraction(31, 48) and expected[B][A] == Fraction(11, 24)
    for history, after in ((), EOS), ((A,), A), ((A, B), B), ((A, EOS), EOS):
        numbers = [float(expected[after][w]) for w in range(3)]
        assert law(model, history) == pytest.approx(numbers, rel=1e-14)


def test_modified_discounts_by_hand() -> None:
    # 8 tokens once, 4 twice, 2 three times, 1 four times: Y = 8 / 16, D = 1/2, 5/4, 2.
    counts = [1] * 8 + [2] * 4 + [3] * 2 + [4]
    ids = np.repeat(np.arange(15), counts)
    model = NgramModel.fit(ids, vocab_size=16, eos_id=15, order=1)
    backoff = (8 * 0.5 + 4 * 1.25 + 3 * 2.0) / 26
    kept = {1: 0.5, 2: 0.75, 3: 1.0, 4: 2.0}
    expected = [kept[c] / 26 + backoff / 16 for c in counts] + [backoff / 16]
    assert law(model, ()) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("tokens", [1, 2, 30, 400])
def test_it_equals_the_slow_twin(order: int, tokens: int) -> None:
    ids, unseen = documents(7, tokens), documents(8, 60)
    model = NgramModel.fit(ids, vocab_size=SYMBOLS, eos_id=EOS, order=order)
    twin, history, expected = SlowTwin(ids, SYMBOLS, order), (EOS,) * (order - 1), []
    for w in unseen.tolist():
        expected.append(math.log(twin.p(w, history)))
        history = twin.after(history, w)
    assert model.log_probability(unseen) == pytest.approx(expected, rel=1e-12)


def test_the_twins_cover_estimated_discounts_and_the_fallback() -> None:
    model = NgramModel.fit(documents(7, 400), vocab_size=SYMBOLS, eos_id=EOS, order=4)
    fallback = [tuple(known.discounts) == FALLBACK_DISCOUNTS for known in model.orders]
    assert fallback[0] and not fallback[-1]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_sum_to_one_after_every_history(order: int) -> None:
    ids = documents(3, 90)
    assert 4 not in ids, "else no context is unseen for sure"
    model = NgramModel.fit(ids, vocab_size=SYMBOLS, eos_id=EOS, order=order)
    for history in product(range(SYMBOLS), repeat=3):
        p = law(model, history)
        assert p.min() > 0.0
        assert p.sum() == pytest.approx(1.0, rel=1e-13)


def test_order_1_is_the_discounted_unigram_law_whatever_came_before() -> None:
    ids = documents(5, 200)
    model = NgramModel.fit(ids, vocab_size=SYMBOLS, eos_id=EOS, order=1)
    counts = np.bincount(ids, minlength=SYMBOLS)
    kept = counts - np.array(FALLBACK_DISCOUNTS)[np.minimum(counts, 3)]
    expected = kept / 200 + (200 - kept.sum()) / 200 / SYMBOLS
    for history in ((), (1, 2), (3, EOS)):
        assert law(model, history) == pytest.approx(expected, rel=1e-14)


def test_an_unseen_context_has_the_law_of_its_longest_seen_end() -> None:
    ids = np.array([A, A, B, A, B, B, A, EOS])
    model = NgramModel.fit(ids, vocab_size=4, eos_id=EOS, order=3)
    never = 3
    assert (law(model, (A, never)) == law(model, (B, never))).all()
    # The discounts are 1/2, 1, 3/2. The token a comes after EOS, a and b; b after a and b; EOS
    # after a. The pair b a comes after a and b; b b after a.
    unigram = np.array([0.5, 1.5, 1.0, 0.0]) / 6 + 3.0 / 6 / 4
    after_b = np.array([0.0, 1.0, 0.5, 0.0]) / 3 + 1.5 / 3 * unigram
    assert law(model, (A, never)) == pytest.approx(unigram, rel=1e-14)
    assert law(model, (never, B)) == pytest.approx(after_b, rel=1e-14)


def test_nothing_before_a_document_tells_what_follows() -> None:
    model = NgramModel.fit(documents(6, 300), vocab_size=SYMBOLS, eos_id=EOS, order=4)
    for start in ((), (1,), (2, 1)):
        assert (law(model, (3, 1, EOS, *start)) == law(model, start)).all()


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_sampler_draws_the_law(order: int) -> None:
    # 60 tokens leave most contexts of two and three unseen or seen once: all ways down are taken.
    model = NgramModel.fit(documents(11, 60), vocab_size=SYMBOLS, eos_id=EOS, order=order)
    seen: dict[tuple[int, ...], np.ndarray] = defaultdict(lambda: np.zeros(SYMBOLS))
    history: tuple[int, ...] = ()
    for w in model.sample(40_000, seed=1):
        seen[history][w] += 1
        history = () if w == EOS or order == 1 else (*history, w)[1 - order :]
    statistic, freedom, contexts = 0.0, 0, 0
    for context, counts in seen.items():
        # Fewer than order - 1 tokens are the beginning of a document, for `law` too.
        expected = law(model, context) * counts.sum()
        if expected.min() < 5.0:
            continue
        statistic += float(((counts - expected) ** 2 / expected).sum())
        freedom += SYMBOLS - 1
        contexts += 1
    assert contexts >= (1, 4, 8, 12)[order - 1]
    # Wilson and Hilferty's normal score of chi-square.
    spread = 2.0 / (9.0 * freedom)
    assert abs(((statistic / freedom) ** (1 / 3) - (1.0 - spread)) / math.sqrt(spread)) < 4.0


def test_the_same_seed_gives_the_same_text_and_a_longer_one_begins_alike() -> None:
    model = NgramModel.fit(documents(2, 500), vocab_size=SYMBOLS, eos_id=EOS, order=3)
    text = model.sample(80, seed=4)
    assert text == model.sample(80, seed=4) == model.sample(200, seed=4)[:80]
    assert text != model.sample(80, seed=5)
    assert len(text) == 80 and set(text) <= set(range(SYMBOLS))


def markov_chain(tokens: int) -> tuple[np.ndarray, float]:
    """Text of a chain of order 2 over symbols 1 to 4, and its entropy in nats a token."""
    chance = np.random.default_rng(9)
    next_law = chance.dirichlet([0.4] * 4, size=(4, 4))
    step = np.zeros((16, 16))
    for i, j, k in product(range(4), repeat=3):
        step[4 * i + j, 4 * j + k] = next_law[i, j, k]
    stationary = np.linalg.matrix_power(step, 10_000)[0]
    entropies = -(next_law * np.log(next_law)).sum(-1).ravel()
    ids, a, b = [], 0, 0
    for u in chance.random(tokens):
        a, b = b, min(int(np.searchsorted(np.cumsum(next_law[a, b]), u)), 3)
        ids.append(b + 1)
    return np.array(ids), float(stationary @ entropies)


def test_the_held_out_figure_falls_to_the_entropy_of_a_markov_chain() -> None:
    ids, entropy = markov_chain(300_000)
    train, heldout = ids[:200_000], ids[200_000:]
    nats, spread = {}, 0.0
    for order in (1, 2, 3, 5):
        model = NgramModel.fit(train, vocab_size=SYMBOLS, eos_id=EOS, order=order)
        logs = model.log_probability(heldout)
        nats[order] = -float(logs.mean())
        batches = logs.reshape(100, -1).mean(1)  # tokens depend on each other, batches hardly
        spread = float(batches.std(ddof=1)) / 10.0
    assert nats[1] > nats[2] + 0.05 and nats[2] > nats[3] + 0.05
    assert abs(nats[3] - entropy) < 4.5 * spread < 0.02
    assert nats[3] < nats[5] < nats[3] + 0.01, "more order than the chain has only costs counts"


def test_a_fit_tells_of_every_stage() -> None:
    told: list[int] = []
    ids = documents(1, 50)
    NgramModel.fit(ids, vocab_size=5, eos_id=EOS, order=4, advance=lambda: told.append(1))
    assert len(told) == stages(4)


def test_a_large_vocabulary_and_the_highest_order_need_no_more_than_64_bits() -> None:
    ids = np.random.default_rng(0).integers(1 << 20, size=3_000)
    model = NgramModel.fit(ids, vocab_size=1 << 20, eos_id=0, order=8)
    assert model.log_probability(ids).mean() > -1.0, "each token follows what it followed"
    assert set(model.sample(50, seed=0)) <= set(range(1 << 20))


def test_what_cannot_be_fitted_is_refused() -> None:
    for order in (0, 9):
        with pytest.raises(ConfigError, match=f"^order must be from 1 to 8, got {order}.$"):
            NgramModel.fit(np.array([1]), vocab_size=5, eos_id=EOS, order=order)
    with pytest.raises(DataError, match="at least one token"):
        NgramModel.fit(np.array([], np.int64), vocab_size=5, eos_id=EOS)
    with pytest.raises(ValueError, match=r"ids must be in \[0, 5\), got 1 to 5"):
        NgramModel.fit(np.array([1, 5]), vocab_size=5, eos_id=EOS)


# -- the command


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared directory of 200 short documents."""
    folder = tmp_path_factory.mktemp("ngram")
    chance = np.random.default_rng(0)
    words = ["the", "a", "fox", "dog", "über", "runs", "sees", "into", "quick", ".", "and"]
    texts = [" ".join(chance.choice(words, size=30)) for _ in range(200)]
    source = folder / "docs.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = PrepareSettings(vocab_size=300, validation_fraction=0.1)
    prepare([source], folder / "data", settings=settings)
    return folder / "data"


def test_the_command_writes_texts_that_evaluate_reads(run: Run, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "ngram.jsonl"
    argv = "--order", 3, "--num-samples", 4, "--length", 50, "--seed", 7
    code, told, err = run("baseline", "ngram", "--data", data, "--out", out, *argv)
    store = TokenStore.open(data)
    tokenizer = Tokenizer.from_json(store.tokenizer_json)
    train, heldout = (
        split.block(0, split.tokens).numpy() for split in (store.train, store.validation)
    )
    model = NgramModel.fit(train, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id, order=3)
    bits = -model.log_probability(heldout).sum() / math.log(2)
    bits_per_byte = bits / store.manifest["splits"]["validation"]["text_bytes"]
    assert (code, told) == (
        0,
        f"{out}: 4 texts of 50 tokens by an n-gram model of order 3 on {len(train):,} tokens, "
        f"{bits_per_byte:.3f} bits a byte of held-out text\n",
    )
    assert "counting n-grams" in err and "drawing texts" in err and "ETA" in err
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [list(record) for record in records] == [["text", "tokens", "seed"]] * 4
    assert [(record["tokens"], record["seed"]) for record in records] == [
        (50, 7 + k) for k in range(4)
    ]
    texts = [tokenizer.decode(model.sample(50, 7 + k)) for k in range(4)]
    assert [record["text"] for record in records] == read_texts(out) == texts
    assert "über" in out.read_text(encoding="utf-8"), "ensure_ascii is off"
    assert [path.name for path in out.parent.iterdir()] == ["ngram.jsonl"]


def test_text_k_of_a_seed_is_the_first_text_of_seed_plus_k(
    run: Run, data: Path, tmp_path: Path
) -> None:
    files = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for out, seed, count in zip(files, (3, 4), (2, 1), strict=True):
        argv = "--num-samples", count, "--length", 20, "--seed", seed
        assert run("baseline", "ngram", "--data", data, "--out", out, *argv)[0] == 0
    assert files[0].read_text().splitlines()[1:] == files[1].read_text().splitlines()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--order 0", "--order must be a whole number from 1 to 8, got 0."),
        ("--order 9", "--order must be a whole number from 1 to 8, got 9."),
        ("--length 0", "--length must be a whole number >= 1, got 0."),
        ("--num-samples 0", "--num-samples must be a whole number >= 1, got 0."),
        ("--seed -1", f"--seed must be a whole number from 0 to {2**63 - 1}, got -1."),
    ],
)
def test_bad_numbers_are_one_line(
    run: Run, data: Path, tmp_path: Path, argv: str, message: str
) -> None:
    out = tmp_path / "x.jsonl"
    done = run("baseline", "ngram", "--data", data, "--out", out, *argv.split())
    assert done == (2, "", f"error: {message}\n")
    assert not out.exists()


def test_places_that_cannot_be_read_or_written_are_one_line(
    run: Run, data: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "none"
    assert run("baseline", "ngram", "--data", missing, "--out", tmp_path / "x.jsonl") == (
        2,
        "",
        f"error: {missing / 'manifest.json'} is missing: make it with fsdfm prepare.\n",
    )
    folder, file = tmp_path / "folder.jsonl", tmp_path / "file"
    folder.mkdir()
    file.touch()
    told = {
        folder: f"{folder} is a directory: choose another out.",
        tmp_path / "x.txt": "out must be a .jsonl file, for fsdfm evaluate to read, got "
        f"{tmp_path / 'x.txt'}.",
        file / "x.jsonl": f"Cannot write {file / 'x.jsonl'} (File exists): choose another out.",
    }
    for out, message in told.items():
        done = run("baseline", "ngram", "--data", data, "--out", out)
        assert done == (2, "", f"error: {message}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.jsonl"]


def test_an_interrupt_leaves_what_was_there(
    run: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.jsonl"
    out.write_text("before\n")
    sample = NgramModel.sample

    def interrupted(self: NgramModel, length: int, seed: int) -> list[int]:
        if seed == 2:
            raise KeyboardInterrupt
        return sample(self, length, seed)

    monkeypatch.setattr(NgramModel, "sample", interrupted)
    code, told, err = run("baseline", "ngram", "--data", data, "--out", out, "--length", 5)
    assert (code, told) == (130, "")
    assert err.endswith("interrupted\n")
    assert out.read_text() == "before\n"
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_a_kind_of_baseline_is_needed(run: Run) -> None:
    choices = "choose ngram, ar, or see fsdfm baseline --help."
    assert run("baseline") == (2, "", f"error: a kind of baseline is missing: {choices}\n")
    assert run("baseline", "bigram") == (
        2,
        "",
        f"error: there is no baseline 'bigram': {choices}\n",
    )
    code, out, err = run("baseline", "--help")
    assert (code, err) == (0, "")
    assert "fsdfm baseline ngram --data DATA --out FILE.jsonl" in out
    code, out, err = run("baseline", "ngram", "--help")
    assert (code, err) == (0, "")
    assert "usage: fsdfm baseline ngram" in out
    for flag in ("data", "out", "order", "num-samples", "length", "seed"):
        assert f"--{flag} " in out
