"""The server among clients who mean it harm, or do not know better."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steering_fixtures import make_generators
from test_serve import Up, serving

from fsdfm.generate.generator import Generator
from fsdfm.serve import app as app_module
from fsdfm.serve.app import ENDPOINTS
from fsdfm.serve.bodies import ALIASES, IGNORED, NEUTRAL, body_options


@pytest.fixture(scope="module")
def generators() -> dict[str, Generator]:
    found = make_generators()
    return {"twin": found["twin"], "uniform": found["uniform"]}


@pytest.fixture(scope="module")
def up(generators: dict[str, Generator]) -> Iterator[Up]:
    with serving(generators, max_length=64, max_steps=6, max_texts=3, deadline=10.0) as found:
        yield found


def sent(up: Up, body: Any, path: str = "/v1/completions") -> httpx.Response:
    """The answer to a body: JSON of any kind, or bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return up.http.post(path, content=data, headers={"content-type": "application/json"})


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"prompt": "a", "temperature": ' + b"9" * 400 + b"}", "temperature must be a number"),
        ({"template": f"[[{'9' * 5000}]]"}, "a gap is a number of tokens"),
        ({"template": "\\" * 400_000}, "template has no gap"),
        ({"prompt": "a", "ban": [f"w{k}" for k in range(65)]}, "ban has 65 strings, more than 64"),
        ({"prompt": "a", "stop": ["w"] * 65}, "stop has 65 strings"),
        ({"prompt": "a", "require": ["w"] * 65}, "require has 65 strings"),
        ({"prompt": "a", "logit_bias": {str(k): -100 for k in range(40_000)}}, "must be below"),
        ({"prompt": "a", "stream_options": {"include_usage": "x"}}, "stream_options must be"),
        ({"prompt": "a", "logit_bias": {"3": -100}, "ban_ids": 3}, "ban_ids must be a list"),
        ({"prompt": "a", "max_tokens": 10**30}, "more than 64: ask for fewer"),
        ({"prompt": "a", "n": 10**30}, "texts are more than 3"),
        ({"prompt": "a b " * 100_000}, "more than 64: ask for fewer"),
    ],
)
def test_what_would_take_for_ever_is_refused_at_once(up: Up, body: Any, says: str) -> None:
    began = time.monotonic()
    answer = sent(up, body)
    assert time.monotonic() - began < 5
    assert (answer.status_code, says in answer.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize("more", [{"draws": 2**31 - 1}, {"top_k": 2**31 - 1}, {"timeout": 1e308}])
def test_what_is_more_than_there_is_means_all_of_it(up: Up, more: Any) -> None:
    body = {"prompt": "the quick", "max_tokens": 12, "seed": 4}
    most = {"draws": 64} if "draws" in more else {}
    found, wanted = (sent(up, body | m).json()["choices"][0]["text"] for m in (more, most))
    assert found == wanted


WORDS = st.text(st.characters(codec="utf-8"), max_size=6)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
LIKELY = st.sampled_from([0, 1, 2, 0.5, "auto", "the", ["a"], [0, 1], "[[2]] a", True, "late"])


def bodies(path: str) -> st.SearchStrategy[dict[str, Any]]:
    names = [*body_options(ENDPOINTS[path][1]), *ALIASES, *IGNORED, *NEUTRAL]
    return st.dictionaries(st.sampled_from(names) | WORDS, LIKELY | ANYTHING, max_size=5)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.sampled_from(sorted(ENDPOINTS)).flatmap(lambda p: st.tuples(st.just(p), bodies(p))))
def test_no_body_makes_a_bug(up: Up, asked: tuple[str, dict[str, Any]]) -> None:
    path, body = asked
    answer = sent(up, body, path)
    assert answer.status_code < 500 or answer.json()["error"]["code"] == "deadline", answer.text
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"] and "\n" not in error["message"]


def test_a_stop_at_the_front_of_a_long_text_is_found_in_few_looks(
    generators: dict[str, Generator], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, looks = generators["uniform"], []
    decode = generator.decode
    with serving(generators) as up:
        long = {"model": "uniform", "max_tokens": 400, "seed": 1, "steps": 1, "end": "never"}
        text = sent(up, long).json()["choices"][0]["text"]
        monkeypatch.setattr(generator, "decode", lambda ids: looks.append(ids) or decode(ids))
        short = sent(up, long | {"stop": text[2:4], "logprobs": 1}).json()["choices"][0]
    assert short["text"] == text[: text.index(text[2:4])]
    tokens = short["logprobs"]["tokens"]
    assert len("".join(tokens[:-1])) < len(short["text"]) <= len("".join(tokens))
    assert len(looks) < 100


def test_who_reads_too_slowly_gets_fewer_drafts_and_the_whole_text(
    up: Up, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"prompt": "the", "max_tokens": 20, "steps": 6, "seed": 2}
    whole = sent(up, body).json()["choices"][0]["text"]
    for behind, drafts in ((64, True), (0, False)):
        monkeypatch.setattr(app_module, "BEHIND", behind)
        lines = sent(up, body | {"stream": True, "diffusing": True}).text.splitlines()
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole
        assert any("type" in chunk for chunk in chunks) == drafts
        assert "data: [DONE]" in lines


def test_a_bug_is_logged_with_its_place_and_without_what_was_asked(
    up: Up, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = "a secret " + "fox"

    def stumble(*_: Any) -> Any:
        raise ValueError("no room for: " + asked)

    caplog.set_level("INFO")
    for place, name in ((app_module, "understood"), (app_module.Answer, "whole")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, stumble)
            answer = sent(up, {"prompt": asked, "max_tokens": 4})
        assert (answer.status_code, asked in answer.text) == (500, False)
    assert asked not in caplog.text
    assert caplog.text.count("ValueError at") == 2 and "in stumble" in caplog.text
