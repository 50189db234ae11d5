"""Generating text: what is counted, what a seed fixes, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fsdfm
from fsdfm.core.device import pick_device, preferred_dtype
from fsdfm.core.errors import CheckpointError, ConfigError, DataError
from fsdfm.flow.step import STEP_RULES
from fsdfm.generate.generator import Generator
from fsdfm.model.config import ModelConfig
from fsdfm.model.io.pretrained import save_pretrained
from fsdfm.model.transformer import Transformer
from fsdfm.text.tokenizer import Tokenizer, train_bpe

CONTEXT = 64
WORDS = "the quick brown fox jumps over the lazy dog and runs into the deep dark forest again "


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([WORDS * 20], 300)


def network(tokenizer: Tokenizer, **changes: Any) -> Transformer:
    """A tiny network whose posterior depends on its input: nothing is left at its silent zero."""
    shape = {"hidden_size": 32, "blocks": 2, "heads": 2, "cond_size": 16}
    config = {**shape, "context_length": CONTEXT, "step_embedding": "log2", **changes}
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, **config))
    draw = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=draw)
    return model


@pytest.fixture(scope="module")
def generator(tokenizer: Tokenizer) -> Generator:
    return Generator(network(tokenizer), tokenizer, device="cpu")


def count_calls(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the states that the engine is called with from now on."""
    shapes: list[tuple[int, ...]] = []
    hidden = generator.engine.hidden

    def counted(x: Tensor, *rest: Any) -> Tensor:
        shapes.append(tuple(x.shape))
        return hidden(x, *rest)

    monkeypatch.setattr(generator.engine, "hidden", counted)
    return shapes


@pytest.mark.parametrize("steps", [1, 7, 8])
@pytest.mark.parametrize("step_embedding", ["none", "raw", "log2"])
def test_steps_are_model_calls(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, steps: int, step_embedding: str
) -> None:
    generator = Generator(network(tokenizer, step_embedding=step_embedding), tokenizer)
    shapes = count_calls(generator, monkeypatch)
    (sample,) = generator.generate(steps=steps, seed=3).samples
    assert shapes == [(1, CONTEXT)] * steps
    assert sample.nfe == steps
    assert sample.tokens == len(sample.token_ids) == CONTEXT
    assert sample.text == tokenizer.decode(sample.token_ids)


@pytest.mark.parametrize("movers", ["independent", "systematic"])
@pytest.mark.parametrize("step", ["exact", "published", "euler"])
def test_a_seed_fixes_the_text(generator: Generator, step: Any, movers: Any) -> None:
    def texts(seed: int) -> list[str]:
        return generator.generate(step=step, movers=movers, seed=seed).texts

    assert texts(3) == texts(3) != texts(4)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_sample_is_the_same_alone_and_among_others(generator: Generator, batch_size: int) -> None:
    together = generator.generate(num_samples=3, seed=10, batch_size=batch_size).samples
    alone = [generator.generate(seed=seed).samples[0] for seed in (10, 11, 12)]
    assert [s.seed for s in together] == [10, 11, 12]
    assert [s.token_ids for s in together] == [s.token_ids for s in alone]
    assert len({s.text for s in together}) == 3


def test_a_batch_shares_its_calls_and_its_seconds(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = count_calls(generator, monkeypatch)
    batches = generator.batches(steps=4, num_samples=3, batch_size=2, length=40, prompt="the ")
    first = next(batches)
    assert shapes == [(2, 40)] * 4, "a batch is handed out before the next one is begun"
    (last,) = next(batches)
    assert shapes[4:] == [(1, 40)] * 4
    assert first[0].seconds == first[1].seconds > 0.0
    for sample, size in ((first[0], 2), (last, 1)):
        assert sample.nfe == 4
        assert sample.tokens_per_second == pytest.approx(size * sample.tokens / sample.seconds)


def test_a_step_that_moves_nothing_is_not_a_call(generator: Generator) -> None:
    # A single position moves in one of the first seven steps or not; in the last one it must.
    nfe = [generator.generate(length=1, steps=8, seed=seed).samples[0].nfe for seed in range(20)]
    assert 1 <= min(nfe) < 8


def test_a_prompt_is_kept_in_front_and_not_counted(
    generator: Generator, tokenizer: Tokenizer
) -> None:
    prompt = "the quick brown fox über "
    ids = tokenizer.encode(prompt)
    for sample in generator.generate(prompt=prompt, num_samples=2, length=50).samples:
        assert sample.token_ids[: len(ids)] == ids
        assert len(sample.token_ids) == 50
        assert sample.tokens == 50 - len(ids)
        assert sample.text.startswith(prompt)


def test_the_longest_prompt_leaves_one_token(generator: Generator, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(WORDS)
    (sample,) = generator.generate(prompt=WORDS, length=len(ids) + 1).samples
    assert sample.tokens == 1
    with pytest.raises(ConfigError) as caught:
        generator.generate(prompt=WORDS, length=len(ids))
    assert str(caught.value) == (
        f"The prompt has {len(ids)} tokens, but with length={len(ids)} only {len(ids) - 1} fit: "
        "shorten it or raise the length."
    )


def test_no_prompt_and_an_empty_one_are_the_same(generator: Generator) -> None:
    assert generator.generate(prompt="").texts == generator.generate().texts


def test_a_prompt_that_is_not_unicode_is_refused(generator: Generator) -> None:
    with pytest.raises(DataError):
        generator.generate(prompt="caf\udce9")


@pytest.mark.parametrize("prompt", [None, "the lazy dog "])
@pytest.mark.parametrize("source", ["uniform", "mask"])
def test_a_stream_ends_where_generate_does(
    tokenizer: Tokenizer, source: str, prompt: str | None
) -> None:
    generator = Generator(network(tokenizer, source=source), tokenizer)
    snapshots = list(generator.stream(steps=5, seed=2, prompt=prompt))
    (sample,) = generator.generate(steps=5, seed=2, prompt=prompt).samples
    assert [s.step for s in snapshots] == [0, 1, 2, 3, 4, 5]
    assert [s.calls for s in snapshots] == [0, 1, 2, 3, 4, 5]
    assert {(s.steps, s.tokens) for s in snapshots} == {(5, sample.tokens)}
    given = len(tokenizer.encode(prompt or ""))
    for snapshot in snapshots:
        assert snapshot.frozen == [True] * given + [False] * (CONTEXT - given)
        assert snapshot.token_ids[:given] == sample.token_ids[:given]
        assert len(snapshot.pieces) == CONTEXT
    assert snapshots[-1].token_ids == sample.token_ids
    assert snapshots[-1].text == sample.text


def test_a_mask_is_seen_on_the_way_but_never_in_a_text(tokenizer: Tokenizer) -> None:
    model = network(tokenizer, source="mask")
    mask = model.config.mask_id
    with torch.no_grad():  # the head favours the mask; it must not be drawn all the same
        model.output_layer.linear.bias[-1] = 100.0
    generator = Generator(model, tokenizer)
    first, *_, last = generator.stream(steps=3)
    assert first.token_ids == [mask] * CONTEXT
    assert (first.text, set(first.pieces)) == ("", {""})
    assert mask not in last.token_ids
    for sample in generator.generate(steps=1, num_samples=4).samples:
        assert mask not in sample.token_ids


@pytest.mark.parametrize(("power", "shown"), [(1.0, 32), (2.0, 16)])
def test_the_model_names_the_schedule(tokenizer: Tokenizer, power: float, shown: int) -> None:
    # Half way, kappa_{1/2} = 2 ** -n of the positions have moved.
    model = network(tokenizer, source="mask", schedule_power=power)
    _, middle, _ = Generator(model, tokenizer).stream(steps=2, movers="systematic")
    assert CONTEXT - middle.token_ids.count(tokenizer.vocab_size) == shown


def test_rows_that_pad_the_vocabulary_are_no_text(tokenizer: Tokenizer) -> None:
    config = network(tokenizer).config.to_dict()
    padded = Transformer(ModelConfig(**{**config, "vocab_size": tokenizer.vocab_size + 100}))
    (sample,) = Generator(padded, tokenizer).generate(steps=2).samples
    assert max(sample.token_ids) >= tokenizer.vocab_size
    assert sample.text == tokenizer.decode(i for i in sample.token_ids if i < tokenizer.vocab_size)


def test_a_temperature_too_small_to_divide_by_is_zero(generator: Generator) -> None:
    assert generator.generate(temperature=1e-40).texts == generator.generate(temperature=0).texts


def test_the_model_directory_names_the_defaults(tokenizer: Tokenizer) -> None:
    model = network(tokenizer)
    defaults = {"steps": 3, "step": "euler", "temperature": 0.7, "top_p": 0.9, "author": "x"}
    plain, named = (
        Generator(model, tokenizer),
        Generator(model, tokenizer, defaults=defaults),
    )
    chosen: Any = {name: value for name, value in defaults.items() if name != "author"}
    assert plain.generate().samples[0].nfe == 8
    assert named.generate().samples[0].nfe == 3
    assert named.generate().texts == plain.generate(**chosen).texts
    back: Any = {"steps": 8, "step": "exact", "temperature": 1.0, "top_p": 1.0}
    assert named.generate(**back).texts == plain.generate().texts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a whole number from 1 to 1000000, got 0."),
        ({"steps": 2.5}, "steps must be a whole number from 1 to 1000000, got 2.5."),
        ({"steps": True}, "steps must be a whole number from 1 to 1000000, got True."),
        ({"length": 0}, "length must be a whole number >= 1, got 0."),
        (
            {"length": 65},
            "length=65 is more than this model's context of 64 tokens: ask for 64 at most, or "
            "give a Request of this length to answer, which makes it in windows.",
        ),
        ({"num_samples": 0}, "num_samples must be a whole number >= 1, got 0."),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1, got 0."),
        ({"seed": -1}, "seed must be a whole number >= 0, got -1."),
        (
            {"seed": 2**32 - 1, "num_samples": 2},
            "seed must be at most 4294967295, and sample k takes seed + k: "
            "got seed=4294967295 for 2 samples.",
        ),
        ({"temperature": -0.5}, "temperature must be in [0, 1000], got -0.5."),
        ({"temperature": float("nan")}, "temperature must be in [0, 1000], got nan."),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'."),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0."),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5."),
        ({"step": "heun"}, f"step must be one of {', '.join(STEP_RULES)}, got 'heun'."),
        ({"movers": "all"}, "movers must be one of independent, systematic, got 'all'."),
        ({"grid": "early"}, "grid must be one of even, late, latest, got 'early'."),
    ],
)
def test_values_that_cannot_work_are_refused_at_once(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, options: Any, message: str
) -> None:
    shapes = count_calls(generator, monkeypatch)
    with pytest.raises(ConfigError) as caught:
        generator.batches(**options)  # before the first batch is asked for
    assert str(caught.value) == message
    assert shapes == []


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_precision_asked_for_is_that_of_the_logits(
    precision: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Generator(network(tokenizer), tokenizer, device="cpu", precision=precision)
    dtypes: set[torch.dtype] = set()
    head = made.engine.head

    def watched(rows: Tensor) -> Tensor:
        logits = head(rows)
        dtypes.add(logits.dtype)
        return logits

    monkeypatch.setattr(made.engine, "head", watched)
    assert made.generate(prompt=WORDS[:20]).samples[0].text.startswith(WORDS[:20])
    assert dtypes == {getattr(torch, precision)}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_long_texts_have_the_same_tokens_alone_and_in_a_batch(
    precision: Any, tokenizer: Tokenizer
) -> None:
    model = network(tokenizer, context_length=300)
    made = Generator(model, tokenizer, device="cpu", precision=precision)
    alone, together = (
        made.generate(steps=3, num_samples=3, seed=5, batch_size=size).samples for size in (1, 3)
    )
    assert [s.token_ids for s in together] == [s.token_ids for s in alone]


@pytest.mark.parametrize(
    ("grid", "times"), [("even", [0.0, 0.25, 0.5, 0.75]), ("late", [0.0, 7 / 16, 3 / 4, 15 / 16])]
)
def test_the_grid_says_when_the_model_is_called(
    grid: Any, times: list[float], generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float]] = []
    hidden = generator.engine.hidden

    def watched(x: Tensor, t: Any, h: Any, *rest: Any) -> Tensor:
        seen.extend(zip(t, h, strict=True))
        return hidden(x, t, h, *rest)

    monkeypatch.setattr(generator.engine, "hidden", watched)
    generator.generate(steps=4, grid=grid)
    ends = [*times[1:], 1.0]
    assert seen == [(t, end - t) for t, end in zip(times, ends, strict=True)]


def test_the_largest_seed_works(generator: Generator) -> None:
    assert generator.generate(seed=2**32 - 1, length=2).samples[0].seed == 2**32 - 1


def test_only_one_sample_can_be_streamed(generator: Generator) -> None:
    with pytest.raises(ConfigError, match="Only one sample"):
        generator.stream(num_samples=2)


def test_too_little_memory_is_told_in_one_line(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hidden(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 TiB")

    monkeypatch.setattr(generator.engine, "hidden", hidden)
    with pytest.raises(ConfigError) as caught:
        generator.generate(num_samples=2, batch_size=2)
    assert str(caught.value) == (
        "cpu has not enough memory for 2 x 64 tokens: "
        "take a smaller batch_size or length, or the device cpu."
    )


def test_load_gives_back_what_was_saved(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = network(tokenizer)
    save_pretrained(
        tmp_path / "m", model, tokenizer_json=tokenizer.to_json(), generation={"steps": 5}
    )
    loaded = fsdfm.load(tmp_path / "m", device="cpu")
    (sample,) = loaded.generate(seed=9).samples
    assert sample.nfe == 5
    assert sample.text == Generator(model, tokenizer).generate(steps=5, seed=9).texts[0]
    assert isinstance(loaded, fsdfm.Generator)


def test_an_installation_without_its_model_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fsdfm.model.io.directory.resources.files", lambda package: tmp_path)
    with pytest.raises(CheckpointError, match="came without its bundled model"):
        fsdfm.load()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tpu", "device must be cpu, cuda, cuda:N or mps, got 'tpu'."),
        ("meta", "device must be cpu, cuda, cuda:N or mps, got 'meta'."),
        ("cuda:99", "This machine has no device cuda:99: leave it out, or choose cpu."),
    ],
)
def test_a_device_that_is_not_there_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        pick_device(name)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("features", "dtype"),
    [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
    ],
)
def test_a_cpu_gets_bfloat16_only_where_it_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, features: dict[str, bool], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert preferred_dtype(torch.device("cpu")) == dtype
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert preferred_dtype(torch.device("cpu")) == torch.float32


def test_an_option_that_there_is_not_is_refused_everywhere(generator: Generator) -> None:
    wrong: Any = {"stpes": 2}
    for call in (
        generator.batches,
        generator.stream,
        lambda **options: generator.fill([[1, 2]], [[True, False]], **options),
    ):
        with pytest.raises(ConfigError) as caught:
            call(**wrong)
        assert str(caught.value) == "There is no option 'stpes': did you mean steps?"
    wrong = {"width": 2}
    with pytest.raises(ConfigError, match=r"no option 'width': choose steps, step, movers"):
        generator.stream(**wrong)


# ------------------------------------------------------------------------------------------- fill


def test_fill_keeps_what_is_given_and_makes_the_rest(generator: Generator) -> None:
    length, draw = 20, torch.Generator().manual_seed(1)
    given = torch.randint(generator.config.vocab_size, (3, length), generator=draw).tolist()
    frozen = (torch.rand(3, length, generator=draw) < 0.6).tolist()
    found = generator.fill(given, frozen, steps=3, seed=7, batch_size=2)
    assert [s.seed for s in found.samples] == [7, 8, 9]
    for sample, row, mask in zip(found.samples, given, frozen, strict=True):
        assert sample.tokens == length - sum(mask)
        assert all(a == b for a, b, kept in zip(sample.token_ids, row, mask, strict=True) if kept)
        changed = sum(a != b for a, b in zip(sample.token_ids, row, strict=True))
        assert changed > 0.5 * sample.tokens


def test_fill_sees_both_sides(generator: Generator) -> None:
    """The same noise with another token after the gap gives another token in it, at some place."""
    length = 12
    frozen = [[i not in (4, 5, 6) for i in range(length)]]
    rows = [[[token if i == 8 else 30 + i for i in range(length)]] for token in (3, 200)]
    filled = [
        [generator.fill(row, frozen, steps=2, seed=s).samples[0].token_ids[4:7] for s in range(8)]
        for row in rows
    ]
    assert filled[0] != filled[1]


def test_fill_with_a_beginning_is_generate_with_a_prompt(
    generator: Generator, tokenizer: Tokenizer
) -> None:
    prompt = tokenizer.encode("the quick brown fox")
    row = prompt + [0] * (30 - len(prompt))
    frozen = [i < len(prompt) for i in range(30)]
    filled = generator.fill([row], [frozen], steps=4, seed=3)
    told = generator.generate(prompt="the quick brown fox", length=30, steps=4, seed=3)
    assert filled.samples[0].token_ids == told.samples[0].token_ids


@pytest.mark.parametrize("kind", [np.int32, np.uint8, np.int64, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", ["matrix", "rows", "values"])
def test_fill_takes_integers_of_any_kind(generator: Generator, kind: Any, shape: str) -> None:
    rows, frozen = [[3, 1, 4, 1], [5, 9, 2, 6]], [[True, False, True, True]] * 2
    make = np.asarray if kind.__module__ == "numpy" else torch.as_tensor
    ids, mask = make(rows, dtype=kind), make(frozen)
    if shape == "rows":
        ids, mask = [*ids], [*mask]
    elif shape == "values":
        ids, mask = [[*row] for row in ids], [[*row] for row in mask]
    expected = generator.fill(rows, frozen, steps=2)
    found = generator.fill(ids, mask, steps=2)
    assert [s.token_ids for s in found.samples] == [s.token_ids for s in expected.samples]


def test_fill_does_not_read_what_it_makes(generator: Generator) -> None:
    frozen = [[True, False, True]]
    found = [generator.fill([[3, gap, 4]], frozen, steps=2).texts for gap in (-1, 2**70, 7)]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("prompt", [b"the", ["the"], [1, 2], 7])
def test_a_prompt_that_is_no_text_is_refused(generator: Generator, prompt: Any) -> None:
    with pytest.raises(ConfigError, match=f"prompt must be a str, got {type(prompt).__name__}:"):
        generator.generate(prompt=prompt)


@pytest.mark.parametrize(
    ("token_ids", "frozen", "options", "says"),
    [
        ([[1, 2], [3]], [[True, False]] * 2, {}, "all rows as long"),
        ([[1, 2]], [[True, False]] * 2, {}, "of one shape"),
        ([], [], {}, "of one shape"),
        ([[1, 10_000]], [[True, True]], {}, "token ids from 0 to"),
        ([[1, -1]], [[True, True]], {}, "token ids from 0 to"),
        ([[1] * (CONTEXT + 1)], [[True] * (CONTEXT + 1)], {}, "context"),
        ([[1, 2]], [[True, False]], {"prompt": "a"}, "takes no prompt"),
        ([[1, None]], [[True, False]], {}, r"got token_ids\[0\]\[1\] = None; any will do"),
        ([[1, 2], [1.0, 2]], [[True] * 2] * 2, {}, r"got token_ids\[1\]\[0\] = 1.0"),
        ([[True, False]], [[1, 2]], {}, r"token_ids\[0\]\[0\] = True"),
        (np.ones((1, 2)), [[True, False]], {}, r"token_ids\[0\]\[0\] = 1.0"),
        ([[[1, 2]]], [[True]], {}, r"token_ids\[0\]\[0\] = \[1, 2\]"),
        ([[1, 2]], [[True, None]], {}, r"got frozen\[0\]\[1\] = None\.$"),
        ([[1, 2]], [[True, 2]], {}, "bools, or as 0 and 1"),
        ([1, 2], [True, False], {}, r"got token_ids\[0\] as int"),
        ([b"12"], [[True, False]], {}, r"got token_ids\[0\] as bytes"),
        ("12", [[True, False]], {}, "got token_ids as str"),
        (None, [[True, False]], {}, "got token_ids as NoneType"),
        ([[1, 2**70]], [[True, True]], {}, "token ids from 0 to"),
        ([[], []], [[], []], {}, "length must be a whole number >= 1, got 0"),
    ],
)
def test_fill_refuses_what_cannot_work(
    generator: Generator, token_ids: Any, frozen: Any, options: Any, says: str
) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        generator.fill(token_ids, frozen, **options)
    assert "\n" not in str(caught.value)
