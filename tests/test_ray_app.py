"""The server behind Ray Serve, on a Ray of this machine: pip install 'fsdfm[ray]'."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from steering_fixtures import make_generators, twin_network
from test_generator import WORDS

from fsdfm.core.errors import ConfigError
from fsdfm.generate.request import Request
from fsdfm.model.io.pretrained import save_pretrained
from fsdfm.text.tokenizer import train_bpe

# A busy machine takes long to start Ray's processes, and they are nobody else's.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")
os.environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S", "120")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")
KEY = "s3cret"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two replicas of a tiny model."""
    from fsdfm.serve.ray_app import build

    directory = tmp_path_factory.mktemp("ray") / "tiny"
    tokenizer = train_bpe([WORDS * 20], 300)
    save_pretrained(directory, twin_network(tokenizer), tokenizer_json=tokenizer.to_json())
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    args = {"model": str(directory), "min_replicas": "2", "max_replicas": 2, "cpus": "0.5"}
    serve.run(build({**args, "api_key": KEY, "max_steps": 64}), name="fsdfm", route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=url, timeout=60, headers={"Authorization": f"Bearer {KEY}"}
    ) as client:
        yield client


def test_a_text_is_what_python_gives_whichever_replica_writes_it(http: httpx.Client) -> None:
    generator = make_generators()["twin"]
    asked = {"prompt": "the quick", "length": 24, "steps": 4, "seed": 5, "draws": 3}
    wanted = generator.answer([Request(**asked)])[0].text
    texts = [http.post("/v1/completions", json=asked | {"echo": True}).json() for _ in range(6)]
    assert {each["choices"][0]["text"] for each in texts} == {wanted}
    assert http.get("/v1/models").json()["data"][0]["id"] == "tiny"


def test_a_stream_with_drafts_adds_up_to_the_text(http: httpx.Client) -> None:
    body: dict[str, Any] = {"prompt": "the quick", "max_tokens": 20, "steps": 6, "seed": 2}
    whole = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    asked = body | {"stream": True, "diffusing": True}
    with http.stream("POST", "/v1/completions", json=asked) as answer:
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    chunks = [json.loads(line) for line in lines[:-1]]
    assert lines[-1] == "[DONE]" and any("type" in chunk for chunk in chunks)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole


def test_keys_limits_and_pages_are_those_of_one_server(http: httpx.Client, url: str) -> None:
    assert httpx.get(f"{url}/v1/models").status_code == 401
    answer = http.post("/v1/completions", json={"prompt": "a", "steps": 65})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "steps")
    assert "default-src 'none'" in http.get("/").headers["content-security-policy"]


def test_who_leaves_is_written_for_no_more(http: httpx.Client) -> None:
    body = {"prompt": "a", "steps": 64, "n": 64, "stream": True, "diffusing": True}
    for _ in range(4):
        with (
            contextlib.suppress(httpx.ReadTimeout),
            http.stream("POST", "/v1/completions", json=body) as answer,
        ):
            next(answer.iter_lines())
    for _ in range(200):
        found = [http.get("/health").json() for _ in range(6)]
        if not any(each["running"] or each["waiting"] for each in found):
            return
    raise AssertionError(found)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"modle": "x"}, "There is no 'modle': choose"),
        ({"port": 8000}, "There is no 'port': choose"),
        ({"max_replicas": "many"}, "max_replicas must be a number"),
        ({"min_replicas": 3}, "max_replicas=1 is less than min_replicas=3"),
        ({"queue": "0"}, "queue must be a whole number >= 1"),
    ],
)
def test_what_cannot_be_deployed_is_told(args: dict[str, Any], says: str) -> None:
    from fsdfm.serve.ray_app import build

    with pytest.raises(ConfigError, match=says):
        build(args)


def test_the_example_is_one_that_can_be_built() -> None:
    yaml = pytest.importorskip("yaml")
    from fsdfm.serve.ray_app import build

    example = yaml.safe_load((Path(__file__).parents[1] / "deploy/ray.yaml").read_text())
    (application,) = example["applications"]
    assert application["import_path"] == "fsdfm.serve.ray_app:build"
    assert build(application["args"]) is not None
