"""The server, as its clients meet it: OpenAI's client, plain HTTP, and those who leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from steering_fixtures import make_generators
from test_generator import network
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from fsdfm.core.errors import ConfigError
from fsdfm.generate.generator import Generator
from fsdfm.generate.job import Job
from fsdfm.generate.request import Request
from fsdfm.serve.app import Service, create_app
from fsdfm.serve.logprobs import token_bytes
from fsdfm.serve.run import Server, own_names
from fsdfm.serve.settings import LOOPBACK, ServeSettings
from fsdfm.text.tokenizer import EOS, HALF, Tokenizer

PROMPT = "the quick brown fox"
KEY = "s3cret"


@pytest.fixture(scope="module")
def generators() -> dict[str, Generator]:
    found = make_generators()
    return {"twin": found["twin"], "uniform": found["uniform"]}


class Up:
    """A server that listens."""

    def __init__(self, port: int, service: Service) -> None:
        self.url, self.service = f"http://127.0.0.1:{port}", service
        self.http = httpx.Client(base_url=self.url, timeout=30)

    def post(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)


@contextlib.contextmanager
def serving(
    generators: dict[str, Generator], *, hosts: tuple[str, ...] | None = None, **settings: Any
) -> Iterator[Up]:
    """A server on a port of its own."""
    import uvicorn

    app = create_app(generators, ServeSettings(**settings), hosts=hosts)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        server = Server(uvicorn.Config(app, log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield Up(sock.getsockname()[1], app.state.service)
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def up(generators: dict[str, Generator]) -> Iterator[Up]:
    with serving(generators) as found:
        yield found


@pytest.fixture
def slow(generators: dict[str, Generator], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call takes a while."""
    for generator in generators.values():
        hidden = generator.engine.hidden

        def slowly(*args: Any, hidden: Any = hidden) -> Any:
            time.sleep(0.03)
            return hidden(*args)

        monkeypatch.setattr(generator.engine, "hidden", slowly)


def wait_for(truth: Any) -> None:
    """Until it is so."""
    deadline = time.monotonic() + 10
    while not truth():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alone(generator: Generator, **fields: Any) -> str:
    """What Python gives for a request."""
    (result,) = generator.answer([Request(**fields)], batch_size=1)
    return result.text


def test_a_completion_is_what_python_gives(up: Up, generators: dict[str, Generator]) -> None:
    given = len(generators["twin"].tokenizer.encode(PROMPT))
    text = alone(generators["twin"], prompt=PROMPT, length=given + 12, seed=7, steps=4)
    found = up.client().completions.create(
        model="twin", prompt=PROMPT, max_tokens=12, seed=7, extra_body={"steps": 4}
    )
    assert PROMPT + found.choices[0].text == text
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (given, 12)
    extra = found.model_extra or {}
    passes = extra["timings"]["body_passes"]  # in a pass that moves nothing there is none
    assert 1 <= passes <= 4 and extra["timings"]["head_passes_at_most"] == 3 * passes
    assert found.choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize("model", ["twin", "uniform"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_stream_adds_up_to_the_text(up: Up, model: str, seed: int) -> None:
    more: Any = {"prompt": ["über", PROMPT], "max_tokens": 12, "n": 2, "seed": seed}
    more["extra_body"] = {"steps": 4}
    whole = up.client().completions.create(model=model, **more)
    for diffusing in (False, True):
        texts, frames = {}, []
        stream = up.client().completions.create(
            model=model,
            stream=True,
            stream_options={"include_usage": True},
            **more | {"extra_body": {"steps": 4, "diffusing": diffusing}},
        )
        for chunk in stream:
            frames += [(chunk.model_extra or {}).get("type")]
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
        assert texts == {choice.index: choice.text for choice in whole.choices}
        assert chunk.usage == whole.usage
        assert ("diffusion_frame" in frames) == diffusing


@pytest.mark.parametrize("model", ["twin", "uniform"])
@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "the 🦊 ", "suffix": " — end.", "max_tokens": 14, "echo": True},
        {"prompt": "the ", "suffix": " — end.", "max_tokens": 14},
        {"template": "a [[4]] 🦊 [[2-5]], [[3]] c"},
        {"template": "a [[4]] b [[20]]", "stop": ["e", "o", "the"]},
        {"prompt": "the ", "max_tokens": 14, "ban": ["e"], "best_of": 2},
        {"prompt": "the ", "max_tokens": 30, "require": ["fox"]},
    ],
)
def test_a_stream_of_any_kind_adds_up_to_the_text(up: Up, model: str, body: Any) -> None:
    body = {"model": model, "steps": 12, "seed": 3, **body}
    (choice,) = up.post(**body).json()["choices"]
    lines = up.post(stream=True, **body).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]


def test_a_masked_text_settles_before_its_end(up: Up) -> None:
    body = {"prompt": PROMPT, "max_tokens": 40, "seed": 1, "steps": 40, "stream": True}
    with up.http.stream("POST", "/v1/completions", json=body | {"end": "never"}) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: {")]
    texts = [json.loads(line[6:])["choices"][0]["text"] for line in lines]
    assert sum(map(bool, texts)) > 1


def test_frames_tell_every_step_with_its_tokens(up: Up) -> None:
    body = {"template": "a [[5]] b [[3]] c", "steps": 4, "stream": True, "diffusing": "tokens"}
    with up.http.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line[6:] for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    frames = [chunk for chunk in chunks if "type" in chunk]
    assert [(f["step"], f["total"]) for f in frames] == [(1, 4), (2, 4), (3, 4)]
    assert all(f["text"].startswith("a ") and f["text"].endswith(" c") for f in frames)
    assert all(len(f["pieces"]) == len(f["frozen"]) for f in frames)
    last = chunks[-1]["choices"][0]
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    (a, b), (c, d) = last["spans"]
    assert (text[:a], text[b:c], text[d:]) == ("a ", " b ", " c")


def test_a_conversation_goes_on_and_can_be_streamed(up: Up) -> None:
    turns: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a fox?"}]},
    ]
    more: Any = {"model": "twin", "messages": turns, "max_tokens": 16, "seed": 3}
    whole = up.client().chat.completions.create(logprobs=True, **more)
    message = whole.choices[0].message
    assert message.role == "assistant"
    assert whole.choices[0].logprobs is not None
    parts = whole.choices[0].logprobs.content or []
    assert all(part.logprob <= 0 for part in parts) and parts
    text = ""
    for chunk in up.client().chat.completions.create(stream=True, **more):
        text += chunk.choices[0].delta.content or ""
    assert text == message.content
    assert text == text.lstrip()


def test_the_asynchronous_client_does_the_same(up: Up) -> None:
    async def ask() -> tuple[str, str]:
        client = openai.AsyncOpenAI(base_url=f"{up.url}/v1", api_key="none")
        more: Any = {"model": "twin", "prompt": PROMPT, "max_tokens": 9, "seed": 3}
        whole = await client.completions.create(**more)
        stream = await client.completions.create(stream=True, **more)
        return whole.choices[0].text, "".join([c.choices[0].text async for c in stream])

    whole, streamed = asyncio.run(ask())
    assert whole == streamed != ""


def test_suffix_stop_logprobs_and_echo(up: Up, generators: dict[str, Generator]) -> None:
    found = up.post(prompt="a ", suffix=" z", max_tokens=6, logprobs=1, seed=2).json()
    (choice,) = found["choices"]
    assert not choice["text"].startswith("a ")
    assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["token_logprobs"]) == 6
    assert "".join(choice["logprobs"]["tokens"]).strip() == choice["text"].strip()
    echo = up.post(prompt="a ", suffix=" z", max_tokens=6, seed=2, echo=True).json()
    assert echo["choices"][0]["text"] == f"a {choice['text']} z"
    long = up.post(prompt="a", max_tokens=40, seed=2, end="never").json()["choices"][0]
    stop = long["text"][10:12]
    short = up.post(prompt="a", max_tokens=40, seed=2, end="never", stop=[stop]).json()
    text, reason = (short["choices"][0][name] for name in ("text", "finish_reason"))
    assert (text, reason) == (long["text"][: long["text"].index(stop)], "stop")


@pytest.mark.parametrize("model", ["twin", "uniform"])
@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "über ", "max_tokens": 40, "echo": True, "end": "never"},
        {"prompt": "über ", "suffix": "€", "max_tokens": 40},
        {"template": "🦊 [[9]] über [[9]][[12]]"},
        {"initial": "the — 🦊 jumps over the dog", "strength": 0.6},
        {"max_tokens": 60, "end": "keep", "rest": ["a", "Ã", "©", "â", "Ĥ", "¬", EOS]},
        {"max_tokens": 40, "end": "keep", "prompt": "a", "rest": ["a", "â", EOS], "echo": True},
    ],
)
def test_tokens_begin_where_the_text_says_it(
    up: Up, generators: dict[str, Generator], model: str, body: dict[str, Any]
) -> None:
    vocabulary = generators[model].tokenizer.vocabulary()
    body = {"model": model, "logprobs": 1, "seed": 2, "steps": 8, "temperature": 2.0, **body}
    if rest := body.pop("rest", None):
        body["ban_ids"] = [i for spelling, i in vocabulary.items() if spelling not in rest]
    (choice,) = up.post(**body).json()["choices"]
    text, found = choice["text"], choice["logprobs"]
    places = list(zip(found["tokens"], found["text_offset"], strict=True))
    assert places[0][1] == (
        len(body["prompt"]) if body.get("echo") else choice.get("spans", [[0]])[0][0]
    )
    assert found["text_offset"] == sorted(found["text_offset"])
    assert any(HALF in token for token, _ in places), "the seed shows nothing"
    for token, at in places:
        if HALF not in token and token != "\n\n":
            assert text[at : at + len(token)] == token
        assert 0 <= at <= len(text)


def test_the_bytes_of_tokens_make_the_text(up: Up, generators: dict[str, Generator]) -> None:
    text, twin = "über € 🦊", generators["twin"]
    ids = twin.tokenizer.encode(text)
    assert b"".join(token_bytes(twin, i) for i in ids) == text.encode()
    turns = [{"role": "user", "content": "a fox?"}]
    body: Any = {"messages": turns, "max_tokens": 40, "seed": 3, "end": "never", "logprobs": True}
    (choice,) = up.post("/v1/chat/completions", **body).json()["choices"]
    parts = choice["logprobs"]["content"]
    assert any(HALF in part["token"] for part in parts), "the seed shows nothing"
    whole = b"".join(bytes(part["bytes"]) for part in parts)
    assert whole.decode(errors="replace").lstrip() == choice["message"]["content"]


def test_tokens_of_whole_words_begin_at_the_blank_before_them() -> None:
    words = ("[UNK]", EOS, "the", "fox", "jumps")
    backend = Backend(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(backend, name="words")
    generator = Generator(network(tokenizer, source="mask"), tokenizer, device="cpu")
    with serving({"words": generator}) as up:
        body: Any = {"prompt": "the", "max_tokens": 5, "end": "never", "seed": 1, "logprobs": 1}
        (choice,) = up.post(echo=True, **body).json()["choices"]
    found = choice["logprobs"]
    for token, at in zip(found["tokens"], found["text_offset"], strict=True):
        assert choice["text"][at:].startswith(f" {token}")
    assert token_bytes(generator, 3) == b"fox"


def test_an_edit_keeps_the_rest(up: Up, generators: dict[str, Generator]) -> None:
    text = "the quick — 🦊 jumps"
    found = up.post("/v1/edit/completions", text=text, span=[4, 9], seed=5).json()
    edited = found["choices"][0]["text"]
    assert edited == alone(generators["twin"], text=text, span=(4, 9), seed=5)
    assert edited.startswith(text[:4]) and edited.endswith(text[9:])
    draft = up.post(initial=text, strength=0.3, seed=5).json()["choices"][0]["text"]
    assert draft == alone(generators["twin"], text=text, strength=0.3, seed=5)


@pytest.mark.parametrize(
    "more", [{}, {"grid": "even"}, {"grid": "late"}, {"temperature": 0.3}, {"top_p": 0.5}]
)
def test_how_a_text_is_drawn_is_what_python_gives(
    up: Up, generators: dict[str, Generator], more: dict[str, Any]
) -> None:
    how = {"prompt": PROMPT, "length": 40, "seed": 3, "steps": 6, "grid": "even"}
    text = alone(generators["twin"], **how | more)
    assert (text == alone(generators["twin"], **how)) == (how == how | more), "it says nothing"
    assert up.post(**how | more, echo=True).json()["choices"][0]["text"] == text


@pytest.mark.parametrize(
    "name", ["steps", "num_denoising_steps", "max_denoising_steps", "num_inference_steps"]
)
def test_steps_have_many_names(up: Up, name: str) -> None:
    found = up.post(prompt=PROMPT, max_tokens=40, **{name: 3}).json()
    assert found["timings"]["body_passes"] == 3


def test_what_shares_calls_with_others_is_what_it_is_alone(
    generators: dict[str, Generator],
) -> None:
    asked = [
        {"prompt": PROMPT[: 3 + k], "max_tokens": 8 + k % 3, "seed": k, "temperature": 0.5 + k / 20}
        | {"steps": 2 + k % 4, "model": ("twin", "uniform")[k % 2]}
        for k in range(16)
    ] + [{"template": "the [[3]] and [[?]].", "seed": k} for k in range(4)]
    with serving(generators, batch_size=1) as one:
        wanted = [one.post(**body).json()["choices"] for body in asked]
    with serving(generators) as many:
        found: dict[int, Any] = {}

        def ask(number: int) -> None:
            with httpx.Client(base_url=many.url, timeout=30) as http:
                answer = http.post("/v1/completions", json=asked[number])
                found[number] = answer.json()["choices"]

        threads = [threading.Thread(target=ask, args=(k,)) for k in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        page = many.http.get("/metrics").text
    assert [found[k] for k in range(len(asked))] == wanted
    calls = float(page.split("fsdfm_call_texts_count ")[1].split()[0])
    texts = float(page.split("fsdfm_call_texts_sum ")[1].split()[0])
    assert texts > calls, "none were shared"


def test_the_models_health_and_metrics_are_told(up: Up) -> None:
    assert [model.id for model in up.client().models.list()] == ["twin", "uniform"]
    assert up.client().models.retrieve("uniform").id == "uniform"
    assert up.http.get("/health").json()["status"] == "ok"
    assert up.post(prompt=PROMPT, max_tokens=4).status_code == 200
    assert "fsdfm_generated_tokens_total" in up.http.get("/metrics").text


def test_the_description_has_every_field_of_a_request(up: Up) -> None:
    described = up.http.get("/openapi.json").json()
    post = described["paths"]["/v1/completions"]["post"]
    fields = post["requestBody"]["content"]["application/json"]["schema"]["properties"]
    named = {*Request.__dataclass_fields__} - {"text", "span", "id"}
    assert named <= fields.keys()
    assert fields["top_p"]["maximum"] == 1
    assert "late" in fields["grid"]["enum"]


def test_null_leaves_a_field_out_as_the_description_says(up: Up) -> None:
    paths = up.http.get("/openapi.json").json()["paths"]
    given = {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "text": "a fox"}
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/edit/completions"):
        schema = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        for name, field in schema["properties"].items():
            needed = {} if name == "input" else given  # which is another name of text
            rest = {k: v for k, v in needed.items() if k in schema["properties"]}
            answer = up.post(path, **{**rest, "seed": 1, name: None})
            says = [field.get("type"), field.get("anyOf"), field.get("enum")]
            null = '"null"' in json.dumps(says) or None in field.get("enum", [])
            null = null or field.keys() == {"description"}  # it is anything
            assert answer.status_code == (200 if null else 400), (path, name)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"prompt": 3}, 400, "prompt must be a text"),
        ({"prompt": [1, 2]}, 400, "prompt must be a text"),
        ({"prompt": "a", "temprature": 1}, 400, "did you mean temperature?"),
        ({"prompt": "a", "temperature": -1}, 400, "temperature must be"),
        ({"prompt": "a", "temperature": "1"}, 400, "temperature must be a number"),
        ({"prompt": "a", "steps": 9999}, 400, "steps=9999 is more than 1024"),
        ({"prompt": "a", "steps": "many"}, 400, "steps must be"),
        ({"prompt": "a", "n": 65}, 400, "65 texts are more than 64"),
        ({"prompt": "a", "n": 9, "best_of": 9}, 400, "81 texts are more than 64"),
        ({"prompt": "a", "max_tokens": 9999}, 400, "more than 8192"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens must be"),
        ({"prompt": "a", "stream": 1}, 400, "stream must be true or false"),
        ({"prompt": "a", "diffusing": 0.0}, 400, "diffusing must be true, false or tokens"),
        ({"prompt": "a", "seed": -1}, 400, "seed must be"),
        ({"prompt": "a", "logprobs": 5}, 400, "logprobs must be"),
        ({"prompt": "a", "stop": [""]}, 400, "stop must be"),
        ({"prompt": "a", "presence_penalty": 1}, 400, "presence_penalty is not done here"),
        ({"prompt": "a", "logit_bias": {"5": 3}}, 400, "logit_bias must be"),
        ({"prompt": "a", "logit_bias": {"99999": -100}}, 400, "ban_ids must be below"),
        ({"prompt": "a", "template": "[[3]]"}, 400, "template and prompt exclude"),
        ({"template": "a[[3"}, 400, "that no ]] closes"),
        ({"template": "[[3]]", "stream": True, "end": "otto"}, 400, "end must be one of"),
        ({"template": "a[[999]]", "stream": True}, 400, "this model's context is 64"),
        ({"prompt": "\ud800"}, 400, "surrogate pair"),
        ({"prompt": "a", "\ud800": 1}, 400, "There is no"),
        ({"prompt": "a", "steps": 4, "num_inference_steps": 4}, 400, "said twice"),
        ({"prompt": "a", "model": "gpt-4"}, 404, "There is no model 'gpt-4'"),
        ([], 400, "must be an object"),
    ],
)
def test_what_cannot_be_done_is_told_in_openais_shape(
    up: Up, body: Any, status: int, says: str
) -> None:
    headers = {"content-type": "application/json"}
    answer = up.http.post("/v1/completions", content=json.dumps(body), headers=headers)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert says in error["message"]
    assert {"message", "type", "param", "code"} == error.keys()
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"[" * 100_000, 400),
        (b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", 400),
        (b'{"prompt": "a", "temperature": NaN}', 400),
        (b"\xff", 400),
        (b"", 400),
        (b" " * (1 << 20) + b"{}", 413),
    ],
)
def test_a_body_that_is_none_is_told(up: Up, content: bytes, status: int) -> None:
    headers = {"content-type": "application/json"}
    for sent in (content, iter([content[:5], content[5:]])):
        answer = up.http.post("/v1/completions", content=sent, headers=headers)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]
    assert up.http.post("/v1/completions", content=b"{}").status_code == 415
    assert up.http.get("/v1/completions").json()["error"]
    assert up.http.get("/v1/nothing").status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("completions", {"prompt": "a", "max_tokens": 40}, "The text has"),
        ("completions", {"template": "[[40]]"}, "template may have 40 tokens, more than 8"),
        ("completions", {"template": "a [[?]]"}, "template may have 34 tokens, more than 8"),
        ("completions", {"template": f"{PROMPT * 2} [[1]]"}, "template may have"),
        ("completions", {"initial": PROMPT * 2, "strength": 0.5}, "initial may have"),
        ("edit/completions", {"text": PROMPT * 2, "span": [4, 5]}, "text may have"),
    ],
)
def test_every_kind_of_text_is_bounded(
    generators: dict[str, Generator], path: str, body: Any, says: str
) -> None:
    with serving(generators, max_length=8) as up:
        answer = up.post(f"/v1/{path}", **body)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert says in error["message"]
        assert error["param"] in {*body, "max_tokens"}
        assert up.post(template="a [[3-5]]").status_code == 200
        assert up.post("/v1/edit/completions", text="a fox").status_code == 200


def test_openais_client_knows_the_errors(up: Up) -> None:
    with pytest.raises(openai.BadRequestError, match="top_p"):
        up.client().completions.create(model="twin", prompt="a", top_p=7)
    with pytest.raises(openai.NotFoundError):
        up.client().completions.create(model="none", prompt="a")


def test_a_key_is_asked_for(generators: dict[str, Generator]) -> None:
    with serving(generators, api_key=KEY) as up:
        for key in ("none", KEY + "x", KEY[:-1]):
            with pytest.raises(openai.AuthenticationError):
                up.client(key).models.list()
        assert len(up.client(KEY).models.list().data) == 2
        assert up.http.get("/metrics").status_code == 401
        assert up.http.get("/health").status_code == 200


def test_other_sites_are_let_in_only_when_named(generators: dict[str, Generator], up: Up) -> None:
    headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    allow = "access-control-allow-origin"
    assert allow not in up.http.options("/v1/completions", headers=headers).headers
    with serving(generators, cors_origin=("https://a.example",), api_key=KEY) as open_:
        answer = open_.http.options("/v1/completions", headers=headers)
        assert answer.headers[allow] == "https://a.example"
        answer = open_.http.get("/v1/models", headers=headers)
        assert (answer.status_code, answer.headers[allow]) == (401, "https://a.example")


def test_a_server_on_loopback_answers_to_its_own_names_alone(
    generators: dict[str, Generator],
) -> None:
    def status(up: Up, host: str) -> int:
        return up.http.post(
            "/v1/completions", json={"prompt": "a"}, headers={"Host": host}
        ).status_code

    names = own_names(ServeSettings(host="Box"), "127.0.1.1")
    with serving(generators, hosts=names) as up:
        for host in ("localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]", "[::1]:9", "box:8"):
            assert status(up, host) == 200, host
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "::1", ""):
            assert status(up, host) == 403, host
        answer = up.http.get("/", headers={"Host": "evil.example"})
        assert "The header Host is not localhost" in answer.json()["error"]["message"]
    assert own_names(ServeSettings(), "::1") == (*LOOPBACK, "127.0.0.1")
    assert own_names(ServeSettings(host="0.0.0.0"), "0.0.0.0") is None
    assert own_names(ServeSettings(api_key=KEY), "127.0.0.1") is None, "a proxy may be before it"
    with serving(generators) as up:
        assert status(up, "evil.example") == 200


def test_the_queue_counts_every_text_and_all_of_its_tokens(
    generators: dict[str, Generator],
) -> None:
    with serving(generators, queue=4) as up:
        assert up.post(prompt="a", max_tokens=4, best_of=5).status_code == 429
        assert up.post(prompt="a", max_tokens=4, best_of=4).status_code == 200

        def cost(**fields: Any) -> float:
            return up.service.batcher._cost("twin", Request(steps=8, **fields))

    assert cost(template="[[40]]") == cost(length=40) == 8 * 40
    assert cost(template="[[20]] aaaaaa [[3-18]]") == cost(length=20 + 18 + 3)
    assert cost(template="[[1-9999]]") == cost(length=64), "the context"
    assert cost(text="a" * 39, best_of=2) == 2 * cost(length=10)


def test_a_full_queue_sends_away_and_loses_nothing(
    generators: dict[str, Generator], slow: None
) -> None:
    with serving(generators, queue=4) as up:
        answers: list[httpx.Response] = []

        def ask() -> None:
            with httpx.Client(base_url=up.url, timeout=30) as http:
                answers.append(http.post("/v1/completions", json={"prompt": "a", "n": 2}))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        codes = sorted(answer.status_code for answer in answers)
        assert codes.count(200) >= 2 and codes.count(200) + codes.count(429) == 8
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused and all(int(each.headers["retry-after"]) >= 1 for each in refused)
        with pytest.raises(openai.RateLimitError):
            up.client().completions.create(model="twin", prompt="a", n=5)
        assert up.post(prompt="a").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_is_written_for_no_more(
    generators: dict[str, Generator], slow: None, stream: bool
) -> None:
    with serving(generators) as up:
        body = {"prompt": "a", "steps": 1000, "stream": stream, "diffusing": True}
        with contextlib.suppress(httpx.ReadTimeout):
            timeout = httpx.Timeout(5, read=0.5)
            with httpx.stream(
                "POST", f"{up.url}/v1/completions", json=body, timeout=timeout
            ) as answer:
                for line in answer.iter_lines():
                    if "diffusion_frame" in line:
                        break
        wait_for(lambda: up.service.batcher.running + up.service.batcher.waiting == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_ends_a_request(
    generators: dict[str, Generator], slow: None, stream: bool
) -> None:
    with serving(generators) as up:
        answer = up.post(prompt="a", steps=1000, timeout=0.3, stream=stream)
        assert "deadline" in answer.text
        assert answer.status_code == (200 if stream else 504)
        wait_for(lambda: up.service.batcher.running == 0)


def test_a_short_text_passes_a_long_one(generators: dict[str, Generator], slow: None) -> None:
    with serving(generators, batch_size=1) as up:
        done: list[str] = []

        def ask(name: str, steps: int, n: int) -> None:
            with httpx.Client(base_url=up.url, timeout=60) as http:
                http.post("/v1/completions", json={"prompt": "a", "steps": steps, "n": n})
            done.append(name)

        long = threading.Thread(target=ask, args=("long", 15, 2))
        long.start()
        wait_for(lambda: up.service.batcher.running)
        short = threading.Thread(target=ask, args=("short", 2, 1))
        short.start()
        short.join()
        long.join()
        assert done == ["short", "long"]


def test_a_request_that_fails_takes_no_other_with_it(
    generators: dict[str, Generator], monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = generators["twin"]
    hidden, poison = twin.engine.hidden, twin.tokenizer.encode("zzz")[0]

    def poisoned(x: Any, *rest: Any) -> Any:
        time.sleep(0.02)
        if bool((x[:, 0] == poison).any()):
            raise RuntimeError("a kernel failed")
        return hidden(x, *rest)

    wanted = alone(twin, prompt="the", length=12, seed=4)
    monkeypatch.setattr(twin.engine, "hidden", poisoned)
    with serving(generators) as up:
        answers: dict[str, httpx.Response] = {}

        def ask(prompt: str) -> None:
            with httpx.Client(base_url=up.url, timeout=30) as http:
                body = {"prompt": prompt, "length": 12, "seed": 4, "echo": True}
                answers[prompt] = http.post("/v1/completions", json=body)

        threads = [threading.Thread(target=ask, args=(p,)) for p in ("the", "zzz", "a")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {p: a.status_code for p, a in answers.items()} == {"the": 200, "a": 200, "zzz": 500}
        assert answers["the"].json()["choices"][0]["text"] == wanted
        assert "kernel" not in answers["zzz"].text


def test_a_mistake_that_shows_late_is_its_clients_and_memory_is_ours(
    generators: dict[str, Generator], slow: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(job: Job, *_: Any) -> Any:
        if job.request.prompt == "zzz":
            raise ConfigError("ban leaves no token to write.", "ban")
        return iter(())

    monkeypatch.setattr(Job, "_repair", late)
    with serving(generators) as up:
        answers: dict[str, httpx.Response] = {}

        def ask(prompt: str) -> None:
            with httpx.Client(base_url=up.url, timeout=30) as http:
                body = {"prompt": prompt, "length": 12, "seed": 4}
                answers[prompt] = http.post("/v1/completions", json=body)

        threads = [threading.Thread(target=ask, args=(p,)) for p in ("the", "zzz")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {p: a.status_code for p, a in answers.items()} == {"the": 200, "zzz": 400}
        assert answers["zzz"].json()["error"]["param"] == "ban"

        def full(*_: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        monkeypatch.setattr(generators["twin"].engine, "hidden", full)
        answer = up.post(prompt="a", max_tokens=4)
        assert (answer.status_code, "has not enough memory" in answer.text) == (503, True)


def test_who_leaves_within_the_body_is_no_bug(
    generators: dict[str, Generator], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    with serving(generators) as up:
        address = up.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1]))) as client:
            client.sendall(head + b'{"prompt": ')
            time.sleep(0.1)
        wait_for(lambda: 'status="499"' in up.http.get("/metrics").text)
        assert 'status="500"' not in up.http.get("/metrics").text
    assert "failed" not in caplog.text


def test_the_pages_bring_everything_with_them(up: Up) -> None:
    for path in ("/", "/docs"):
        answer = up.http.get(path)
        assert answer.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        for outside in ("http://", "https://", "src=", "@import", "url("):
            assert outside not in answer.text


def test_prompts_are_logged_only_when_asked(
    generators: dict[str, Generator], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for wanted in (False, True):
        caplog.clear()
        with serving(generators, log_prompts=wanted) as up:
            up.post(prompt="a secret fox", max_tokens=4)
            up.post(prompt="a secret fox", max_tokens=-4)
        assert ("secret" in caplog.text) == wanted
        assert "completions 200" in caplog.text
