"""Requests: what they refuse, and that a result depends on its request and seed alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from steering_fixtures import SOURCES, make_generators

from fsdfm.core.errors import ConfigError
from fsdfm.core.options import options
from fsdfm.flow.grid import GRIDS
from fsdfm.flow.path import make_source
from fsdfm.flow.sampler import Drawing, Noise, sample
from fsdfm.flow.schedule import Polynomial
from fsdfm.flow.step import MOVERS, STEP_RULES
from fsdfm.generate.generator import Generator
from fsdfm.generate.options import SamplingOptions
from fsdfm.generate.request import Request
from fsdfm.generate.running import Running
from fsdfm.generate.words import offenders

TEXT = "the quick brown fox jumps over the lazy dog"
MIXED = [
    Request(template="The [[6]] was [[2-4]] of [[3]].", seed=1),
    Request(prompt="the quick ", length=20, seed=2, steps=3, temperature=0.7),
    Request(prompt="the quick ", suffix=" again", length=20, seed=3, steps=3, top_k=4),
    Request(text=TEXT, span=(4, 15), seed=4, steps=5, min_p=0.05),
    Request(text=TEXT, strength=0.5, seed=5, repetition_penalty=1.5),
    Request(length=20, seed=6, steps=3, best_of=2, require=("fox",), ban=("dog",)),
    Request(length=20, seed=6, steps=3, temperature=0.0),
    Request(length=20, seed=7, steps="auto"),
]


@pytest.fixture(scope="module")
def generators() -> dict[str, Generator]:
    return make_generators()


def facts(result: Any) -> tuple[Any, ...]:
    found = [round(x, 4) if x is not None else None for x in result.logprobs]
    return result.text, result.spans, result.token_ids, found, result.finish, result.calls


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_result_is_the_same_alone_and_among_mixed_requests(
    generators: dict[str, Generator], source: str, batch_size: int
) -> None:
    generator = generators[source]
    together = generator.answer(MIXED, batch_size=batch_size)
    alone = [generator.answer([request])[0] for request in MIXED]
    assert [facts(r) for r in together] == [facts(r) for r in alone]
    backwards = generator.answer(MIXED[::-1], batch_size=batch_size)[::-1]
    assert [facts(r) for r in backwards] == [facts(r) for r in alone]
    assert len({r.text for r in alone}) == len(MIXED)


@pytest.mark.parametrize("source", SOURCES)
def test_a_seed_fixes_a_result_and_another_changes_it(
    generators: dict[str, Generator], source: str
) -> None:
    for request in MIXED:
        if request.temperature == 0.0:
            continue  # the likeliest tokens of any noise may be the same
        first, again, other = generators[source].answer(
            [request, request, replace(request, seed=99)]
        )
        assert facts(first) == facts(again)
        assert first.token_ids != other.token_ids


@pytest.mark.parametrize("source", SOURCES)
def test_a_prompt_gives_what_generate_gives(generators: dict[str, Generator], source: str) -> None:
    options: dict[str, Any] = dict(length=40, steps=5, seed=3, temperature=0.9, top_p=0.8)
    for more in (
        {},
        {"prompt": "the quick "},
        {"step": "published", "draws": 1, "movers": "systematic"},
    ):
        (sample,) = generators[source].generate(**options, **more).samples
        (result,) = generators[source].answer([Request(end="keep", **options, **more)])
        assert result.token_ids == sample.token_ids
        assert result.text == sample.text
        assert (result.calls, result.tokens) == (sample.nfe, sample.tokens)


def test_requests_of_all_times_and_lengths_share_calls(
    generators: dict[str, Generator], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, shapes = generators["mask"], []
    hidden = generator.engine.hidden
    monkeypatch.setattr(
        generator.engine,
        "hidden",
        lambda x, *rest: shapes.append(tuple(x.shape)) or hidden(x, *rest),
    )
    same = [Request(length=12, steps=2, seed=i, temperature=0.5 + i / 10) for i in range(3)]
    generator.answer([*same, Request(length=30, steps=3)])
    assert shapes == [(4, 30), (4, 30), (1, 30)]


def test_requests_are_admitted_and_given_up_between_calls(
    generators: dict[str, Generator],
) -> None:
    generator = generators["mask"]
    long, short = Request(length=30, steps=6, seed=1), Request(length=8, steps=2, seed=2)
    running = Running(generator)
    first = running.admit(long)
    assert [event.step for event in running.step()] == [1]
    second, third = running.admit(short), running.admit(long)
    draft = running.draft(third)
    assert draft == ""
    running.step()
    cancelled = running.cancel(third)
    assert (cancelled.finish, len(running)) == ("cancelled", 2)
    results = {}
    while len(running):
        for event in running.step():
            assert event.step <= event.total
            if event.result is not None:
                results[event.ticket] = event.result
    alone = [generator.answer([request])[0] for request in (long, short)]
    assert [facts(results[t]) for t in (first, second)] == [facts(r) for r in alone]
    with pytest.raises(KeyError):
        running.cancel(first)


def test_answer_shows_drafts_and_leaves_what_is_given_up(
    generators: dict[str, Generator],
) -> None:
    seen: list[tuple[int, int, list[str]]] = []
    requests = [Request(length=12, steps=4, seed=i) for i in range(2)]
    kept, left = generators["mask"].answer(
        requests,
        on_step=lambda *news: seen.append(news),
        cancelled=lambda number: number == 1 and len(seen) == 2,
    )
    assert (kept.finish, left.finish) == ("length", "cancelled")
    assert [news[:2] for news in seen][:2] == [(2, 8), (4, 8)]
    assert seen[-1][2][0] == kept.text
    assert len({news[2][0] for news in seen}) > 1


def test_a_request_survives_json() -> None:
    for request in MIXED:
        assert Request.from_dict(request.to_dict()) == request
    assert Request().to_dict() == {}
    assert Request.from_dict({"prompt": None}) == Request()


def test_the_options_of_sampling_are_written_once() -> None:
    for name, option in options(SamplingOptions).items():
        said = options(Request)[name]
        assert (said.item, said.rule.within, said.choices) == (
            option.item,
            option.rule.within,
            option.choices,
        )
        assert said.help == option.help


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"promt": "x"}, "A request has no 'promt': did you mean prompt?"),
        ({"prompt": 4}, "prompt must be text, got 4."),
        ({"stop": "x"}, "stop must be several values, got x."),
        ({"stop": [""]}, "stop has an empty text: leave it out."),
        ({"temperature": float("nan")}, "temperature must be in [0, 1000], got nan."),
        ({"steps": "many"}, "steps must be a whole number from 1 to 1000000, or auto, got 'many'."),
        ({"steps": 0}, "steps must be a whole number from 1 to 1000000, or auto, got 0."),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, got 0."),
        ({"min_p": 2}, "min_p must be in [0, 1], got 2."),
        ({"seed": -1}, "seed must be a whole number from 0 to 4294967295, got -1."),
        ({"template": "[[3]]", "prompt": "x"}, "template and prompt exclude each other: give one."),
        ({"text": "abc", "template": "[[3]]"}, "template and text exclude each other: give one."),
        ({"template": "[[3]]", "length": 4}, "length says nothing about a template: leave it out."),
        ({"span": [0, 1]}, "span is of a text to write anew: give text too."),
        ({"text": ""}, "text is empty: there is nothing to write anew."),
        (
            {"text": "abc", "span": [1, 4]},
            "span must be two numbers A < B within the text's 3 characters, got 1:4.",
        ),
        (
            {"text": "abc", "span": [2, 2]},
            "span must be two numbers A < B within the text's 3 characters, got 2:2.",
        ),
        ({"strength": 0.5}, "strength is of a text to write anew: give text too."),
    ],
)
def test_a_request_says_what_is_wrong_with_it(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Request.from_dict(values)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("request_", "part"),
    [
        (Request(template="[[65]]"), "template has 65 tokens, but this model's context is 64"),
        (Request(template=TEXT * 9 + "[[1]]"), "this model's context is 64: shorten it."),
        (Request(prompt="the fox", length=2), "The prompt has"),
        (Request(suffix=TEXT * 9), "The suffix has"),
        (Request(prompt="a", suffix="b", length=2), "The prompt and suffix have 2 tokens"),
        (Request(ban_ids=(5000,)), "ban_ids must be below"),
        (Request(ban_ids=tuple(range(300))), "ban and ban_ids leave no token to write"),
        (Request(require=(TEXT,), length=3), "which do not fit into the gaps"),
        (Request(require=("fox",), ban=("ox",)), "require has 'fox', which ban excludes"),
        (Request(suffix="x", stop=("y",)), "stop needs a text that ends in a gap"),
        (Request(draws=2), "This model has no joint head"),
    ],
)
def test_what_a_model_cannot_do_is_refused_before_anything_is_begun(
    generators: dict[str, Generator], request_: Request, part: str
) -> None:
    with pytest.raises(ConfigError, match=r"^Request 2: ") as error:
        generators["mask"].answer([Request(), request_])
    assert part in str(error.value)


@pytest.mark.parametrize("name", ["prompt", "id", "stop"])
def test_text_that_is_no_unicode_is_refused(name: str) -> None:
    text = "a\ud800"
    with pytest.raises(
        ConfigError, match=f"{name} has half of a surrogate pair as its character 1"
    ):
        Request.from_dict({name: [text] if name == "stop" else text})


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 1e39},
        {"repetition_penalty": 1e39},
        {"top_k": 10**400},
        {"steps": 10**13},
        {"length": 10**10},
        {"best_of": 10**10},
        {"draws": 10**30},
    ],
)
def test_numbers_that_no_machine_can_take_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(values))} must be"):
        Request.from_dict(values)


def test_the_least_top_p_keeps_the_likeliest_token(generators: dict[str, Generator]) -> None:
    for generator in generators.values():
        least, greedy = generator.answer(
            [Request(length=12, steps=2, seed=1, **how) for how in ({"top_p": 1e-50}, {"top_k": 1})]
        )
        assert least.token_ids == greedy.token_ids


class Biased:
    """A head that finds one token likelier than the model does."""

    def __init__(self, generator: Generator, token: int, bias: float) -> None:
        self.head, self.token, self.bias = generator.engine.head, token, bias

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.head(hidden).clone()
        logits[:, self.token] += self.bias
        return logits


def ends_soon(source: str, monkeypatch: pytest.MonkeyPatch, bias: float) -> Generator:
    """A generator that likes to end its documents."""
    generator = make_generators()[source]
    head = Biased(generator, generator.tokenizer.eos_id, bias)
    monkeypatch.setattr(generator.engine, "head", head)
    return generator


def test_a_text_that_ends_at_once_is_not_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = ends_soon("mask", monkeypatch, 11.0)
    how: dict[str, Any] = {"prompt": "the ", "length": 14, "steps": 2}
    each = [generator.answer([Request(seed=seed, **how)])[0] for seed in range(8)]
    written = [result for result in each if result.written]
    assert 0 < len(written) < len(each)
    (best,) = generator.answer([Request(best_of=8, **how)])
    assert best.text == max(written, key=lambda result: result.score).text


@pytest.mark.parametrize("given", [{"end": "never"}, {"suffix": " dog"}])
def test_no_document_ends_behind_a_required_word_where_none_may_end(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = ends_soon("mask", monkeypatch, 8.0)
    requests = [
        Request(prompt="the ", length=20, steps=2, seed=seed, require=("fox",), **given)
        for seed in range(20)
    ]
    for result in generator.answer(requests):
        assert " fox" in result.text
        assert generator.tokenizer.eos_id not in result.token_ids


def test_a_gap_of_a_free_length_has_room_for_what_is_required(
    generators: dict[str, Generator],
) -> None:
    phrase = "lazy dog quick brown fox over"
    size = len(generators["mask"].tokenizer.encode(" " + phrase))
    for generator in generators.values():
        for template in (f"the [[1-{size + 1}]] fox jumps over", f"[[1-2]] dog [[1-{size}]]."):
            request = Request(template=template, require=(phrase,), steps=2)
            for result in generator.answer([replace(request, seed=seed) for seed in range(3)]):
                assert phrase in result.text
        with pytest.raises(ConfigError, match="which do not fit into the gaps"):
            generator.answer([Request(template=f"the [[1-{size - 1}]] fox", require=(phrase,))])


def test_what_stands_in_the_markup_of_a_gap_is_not_given(generators: dict[str, Generator]) -> None:
    for word, template in (
        ("12", "the [[12]] fox"),
        ("?", "the [[?]] fox"),
        ("a[b", "a\\[b [[9]]"),
    ):
        (result,) = generators["mask"].answer(
            [Request(template=template, require=(word,), steps=2)]
        )
        assert word in result.text
        given = word == "a[b"
        assert result.text.count(word) == 1 or not given


def test_several_free_gaps_stay_within_the_context(generators: dict[str, Generator]) -> None:
    templates = ("the [[1-60]] fox [[1-60]] dog", "the [[1-32]] fox [[1-64]]", "[[1-999]]" * 20)
    for generator in generators.values():
        lengths = []
        for template in templates:
            running = Running(generator)
            ticket = running.admit(Request(template=template, steps=2, end="never"))
            while len(running):
                for task in running.job(ticket).waiting:
                    lengths.append(task.x.shape[-1])
                running.step()
        assert max(lengths) <= 64


def test_all_requests_may_be_given_up_at_once(generators: dict[str, Generator]) -> None:
    (result,) = generators["mask"].answer(
        [Request(length=8)], on_step=lambda *_: None, cancelled=lambda _: True
    )
    assert result.finish == "cancelled"


def test_a_word_that_cannot_be_mended_hides_no_other(generators: dict[str, Generator]) -> None:
    generator = generators["mask"]
    banned = ("qx", "inin", "in]", "]in")
    requests = [
        Request(text="xqxq " + TEXT * 2, strength=0.4, ban=banned, seed=seed, steps=2)
        for seed in range(30)
    ]
    kept = written = 0
    for result in generator.answer(requests):
        for first, last in offenders(result.text, result.spans, banned):
            drawn = [p is not None for p in result.logprobs]
            ends = [len(generator.decode(result.token_ids[: n + 1])) for n in range(len(drawn))]
            starts = [0, *ends[:-1]]
            here = [
                d for d, a, b in zip(drawn, starts, ends, strict=True) if a < last and b > first
            ]
            kept, written = kept + (not any(here)), written + any(here)
    assert kept > 0 and written == 0


def test_the_score_is_the_mean_log_probability(generators: dict[str, Generator]) -> None:
    (result,) = generators["mask"].answer([Request(prompt="the ", length=10, steps=1)])
    drawn = [x for x in result.logprobs if x is not None]
    given = len(result.token_ids) - len(drawn)
    assert result.logprobs[:given] == [None] * given
    assert result.score == pytest.approx(sum(drawn) / len(drawn))
    # One call from the masks: the log-probabilities are the rows' own.
    x = torch.tensor([result.token_ids[:given] + [generators["mask"].config.vocab_size] * 8])
    hidden = generators["mask"].engine.hidden(x[:, :10], 0.0, 1.0, torch.arange(given, 10))
    logits = generators["mask"].engine.head(hidden)[:, : generators["mask"].config.vocab_size]
    rows = logits.float().log_softmax(-1)
    expected = [float(rows[k, token]) for k, token in enumerate(result.token_ids[given:])]
    assert drawn == pytest.approx(expected, abs=1e-4)


def test_the_best_of_several_is_the_likeliest(generators: dict[str, Generator]) -> None:
    one = Request(length=12, steps=2, seed=5)
    alone = generators["mask"].answer([replace(one, seed=5 + k) for k in range(4)])
    (best,) = generators["mask"].answer([replace(one, best_of=4)])
    likeliest = max(alone, key=lambda result: result.score)
    assert (best.text, best.seed) == (likeliest.text, likeliest.seed)
    assert best.calls == sum(result.calls for result in alone)


def test_a_banned_word_is_mended_behind_the_end_of_a_document(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator, banned = ends_soon("mask", monkeypatch, 9.0), ("]in", "in]")
    requests = [
        Request(prompt="the ", length=9, end="keep", ban=banned, seed=seed, steps=1)
        for seed in range(60)
    ]
    texts = [result.text for result in generator.answer(requests)]
    assert not [text for text in texts if any(word in text for word in banned)]


def test_a_stop_string_within_another_takes_nothing_back(generators: dict[str, Generator]) -> None:
    generator = generators["mask"]
    one = Request(prompt="the ", length=40, steps=12, end="never")
    seen = 0
    for seed in range(12):
        text = generator.answer([replace(one, seed=seed)])[0].text
        stop = text[8:14], text[10:12]
        running = Running(generator)
        ticket, texts = running.admit(replace(one, seed=seed, stop=stop)), []
        while running:
            texts.append(running.settled(ticket))
            for event in running.step():
                if event.result is not None:
                    assert all(event.result.text.startswith(each) for each in texts)
                    seen += len(event.result.text) == 8
    assert seen > 3


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "wanted",
    [
        {"prompt": "the miller", "suffix": " at the end.", "length": 150},
        {"prompt": "the miller", "suffix": " at the end.", "length": 40},
        {"template": "the [[5]] saw [[6]] and"},
        {"length": 150, "end": "never"},
    ],
    ids=["long, with a suffix", "a suffix", "gaps", "long"],
)
def test_what_has_settled_begins_the_text_that_comes(
    generators: dict[str, Generator], source: str, wanted: dict[str, Any]
) -> None:
    running = Running(generators[source])
    ticket = running.admit(Request(seed=3, steps=4, **wanted))
    before, texts = "", []
    while running:
        settled = running.settled(ticket)
        assert settled.startswith(before)
        before = settled
        texts += [settled]
        for event in running.step():
            if event.result is not None:
                assert all(event.result.text.startswith(text) for text in texts)
                return
    raise AssertionError("no result came")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"step": "published", "draws": 1},
        {"step": "euler", "movers": "systematic", "temperature": 0.7},
        {"temperature": 0.0, "grid": "late"},
        {"temperature": 1.3, "draws": 1},
    ],
    ids=repr,
)
def test_texts_are_those_of_the_sampler(
    generators: dict[str, Generator], source: str, how: dict[str, Any]
) -> None:
    """Tracks, which know every control, against the plain loop of `flow/sampler.py`."""
    generator, seeds = generators[source], [4, 5, 6]
    config, sampling = generator.config, SamplingOptions(**{**generator.defaults, **how})
    noise, origin = (
        Noise(seeds),
        make_source(config.source, config.vocab_size),
    )
    x_0, frozen = noise.start(origin, 24), torch.zeros((3, 24), dtype=torch.bool)
    given = torch.tensor([[7, 3, 9]]).expand(3, 3)
    x_0[:, :3], frozen[:, :3] = given, True
    drawing = Drawing(
        STEP_RULES[sampling.step],
        MOVERS[sampling.movers],
        generator.posterior(sampling),
        sampling.temperature,
    )
    grid = GRIDS[sampling.grid](5)
    schedule = Polynomial(config.schedule_power)
    *_, last = sample(
        generator.engine,
        x_0,
        grid,
        noise,
        origin,
        schedule=schedule,
        drawing=drawing,
        frozen=frozen,
    )
    found = generator.fill(x_0.tolist(), frozen.tolist(), steps=5, seed=4, batch_size=3, **how)
    assert [s.token_ids for s in found.samples] == last.x.tolist()
    assert {s.nfe for s in found.samples} == {last.calls}
