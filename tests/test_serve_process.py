"""`fsdfm serve` as a process: what it is told to serve, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Run
from steering_fixtures import twin_network
from test_generator import WORDS

from fsdfm.cli.flags import Flags, parse
from fsdfm.cli.serve import KEY
from fsdfm.model.io.pretrained import save_pretrained
from fsdfm.serve.guard import OPEN
from fsdfm.serve.settings import ServeSettings
from fsdfm.text.tokenizer import train_bpe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served") / "tiny"
    tokenizer = train_bpe([WORDS * 20], 300)
    save_pretrained(directory, twin_network(tokenizer), tokenizer_json=tokenizer.to_json())
    return directory


def test_sigterm_finishes_what_was_taken_on(run: Run, model: Path) -> None:
    command = [sys.executable, "-m", "fsdfm", "serve", "--port", "0", "--model", str(model)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    url = next(line for line in process.stderr if "http://" in line).split(" at ")[1].strip()
    model = model.rename(model.with_name("elsewhere"))  # it was read
    found: dict[bool, str] = {}

    def ask(stream: bool) -> None:
        body = {"prompt": "the ", "length": 60, "steps": 60, "seed": 5, "echo": True}
        with httpx.stream(
            "POST", f"{url}/v1/completions", json=body | {"stream": stream}, timeout=60
        ) as answer:
            assert answer.status_code == 200
            found[stream] = "".join(answer.iter_text())

    other = httpx.get(f"{url}/health", headers={"Host": "evil.example"}, timeout=60)
    assert other.status_code == 403
    threads = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
    for thread in threads:
        thread.start()
    with httpx.Client(base_url=url, timeout=60) as http:
        while http.get("/health").json()["running"] < 2:
            time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    told = process.stderr.read()
    assert process.wait(timeout=60) == 0
    assert "Traceback" not in told
    argv = "--prompt", "the ", "--length", 60, "--steps", 60, "--seed", 5, "--json"
    _, out, _ = run("generate", "--model", model, *argv)
    text = json.loads(out)["text"]
    assert json.loads(found[False])["choices"][0]["text"] == text
    lines = [line[6:] for line in found[True].splitlines() if line.startswith("data: {")]
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines) == text
    assert found[True].endswith("data: [DONE]\n\n")
    model.rename(model.with_name("tiny"))


TEAM = """
import os, time, torch
from fsdfm.serve.models import loaded
threads = lambda: len(os.listdir("/proc/self/task"))
before, deadline = threads(), time.monotonic() + 60
loaded({"bundled": None})
while threads() > before and time.monotonic() < deadline:
    time.sleep(0.05)
print(threads() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_loading_leaves_no_threads_beside_the_batchers() -> None:
    # Loaded in the main thread, one is left that makes the batcher's products a third slower.
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", TEAM], env=env, check=True, capture_output=True, text=True
    )
    assert done.stdout == "0\n"


def test_the_example_for_kubernetes_fits_the_server() -> None:
    yaml = pytest.importorskip("yaml")
    text = (Path(__file__).parents[1] / "deploy/kubernetes.yaml").read_text()
    deployment, service = yaml.safe_load_all(text)
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    (given,) = parse("serve", "", container["args"], Flags(of=ServeSettings))
    assert pod["spec"]["terminationGracePeriodSeconds"] > ServeSettings(**given).drain
    assert container["ports"][0]["containerPort"] == ServeSettings().port
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    assert service["spec"]["selector"] == pod["metadata"]["labels"]
    probes = [container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("readiness", "liveness")]
    assert set(probes) <= set(OPEN), "no key is sent with them"
    assert container["env"][0]["name"] == KEY


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--port 70000", "--port must be a whole number from 0 to 65535"),
        ("--host 203.0.113.1", "Cannot listen on --host 203.0.113.1 with --port"),
        ("--api-key é", "--api-key must be ASCII"),
        ("--model none", "none"),
        ("--model MODEL --model MODEL", "--model has two of the name 'tiny'"),
    ],
)
def test_what_cannot_be_served_is_one_line(run: Run, model: Path, argv: str, says: str) -> None:
    words: list[Any] = [model if word == "MODEL" else word for word in argv.split()]
    if "--model" not in argv:
        words += ["--model", model]
    code, out, err = run("serve", *words)
    assert (code, out) == (2, "")
    assert says in err
    assert "Traceback" not in err
