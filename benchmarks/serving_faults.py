"""What `fsdfm serve` does when things go wrong: clients that vanish, nonsense, bursts, SIGTERM, and
a model directory that disappears once the server runs.

    python benchmarks/serving_faults.py --model DIR --out faults.json

A small model does: it is the server that is tried. Every text that is answered is compared with
what the same request gave before; what a count says that must not be, is an error of this script.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

URL = "/v1/completions"
LIMITS = httpx.Limits(max_connections=None)
NONSENSE: list[Any] = [
    None, True, -1, 0, 1e308, "", "x", "\ud800", [], [[]], {}, {"a": 1}, ["\0"], 2**70, [1, 2],
]  # fmt: skip


def body(number: int, **more: Any) -> dict[str, Any]:
    """A request of some kind."""
    steps, tokens = 2 + number % 7, 8 + number % 5
    return {"prompt": "the", "max_tokens": tokens, "steps": steps, "seed": number % 50, **more}


def memory(process: subprocess.Popen[str]) -> int:
    """Resident, KiB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


async def text(http: httpx.AsyncClient, number: int) -> tuple[int, str | None]:
    """Status and text of a request."""
    answer = await http.post(URL, json=body(number))
    done = answer.status_code == 200
    return answer.status_code, answer.json()["choices"][0]["text"] if done else None


async def vanish(http: httpx.AsyncClient, number: int) -> None:
    """Leave in the middle of a stream."""
    asked = body(number, steps=200, stream=True, diffusing=True)
    async with http.stream("POST", URL, json=asked) as answer:
        async for _ in answer.aiter_lines():
            return


async def malformed(http: httpx.AsyncClient, names: list[str], draw: random.Random) -> int:
    """Status of a body with nonsense in it."""
    asked = {name: draw.choice(NONSENSE) for name in draw.sample(names, draw.randint(1, 4))}
    data = json.dumps(body(1) | asked).encode()
    if draw.random() < 0.3:
        data = data[: draw.randrange(len(data))] + draw.randbytes(draw.randint(0, 4))
    headers = {"content-type": "application/json"}
    answer = await http.post(URL, content=data, headers=headers)
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
    return answer.status_code


async def idle(http: httpx.AsyncClient) -> None:
    """Until nothing is written."""
    while True:
        found = (await http.get("/health")).json()
        if found["running"] == found["waiting"] == 0:
            return
        await asyncio.sleep(0.05)


async def play(url: str, process: subprocess.Popen[str], args: argparse.Namespace) -> Any:
    """All of it."""
    rows: dict[str, Any] = {}
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=LIMITS) as http:
        wanted = [(await text(http, k))[1] for k in range(350)]
        described = (await http.get("/openapi.json")).json()["paths"][URL]["post"]
        schema = described["requestBody"]["content"]["application/json"]["schema"]
        names = sorted(schema["properties"])
        draw = random.Random(0)
        # Products keep a plan for each shape that they meet, and the allocator what it had at most:
        # a first burst fills both, and what grows after it is a leak.
        await asyncio.gather(*(text(http, k) for k in range(args.burst)))
        await asyncio.gather(*(vanish(http, k) for k in range(20)))
        await idle(http)
        rows["memory_before_kib"] = memory(process)
        await asyncio.gather(*(vanish(http, k) for k in range(args.vanish)))
        await idle(http)
        codes = [await malformed(http, names, draw) for _ in range(args.malformed)]
        rows["malformed"] = collections.Counter(codes)
        burst = await asyncio.gather(*(text(http, k) for k in range(args.burst)))
        rows["burst"] = collections.Counter(code for code, _ in burst)
        rows["wrong"] = sum(
            t is not None and t != wanted[k % 350] for k, (_, t) in enumerate(burst)
        )
        await idle(http)
        rows["memory_after_kib"] = memory(process)
        last = [asyncio.create_task(text(http, k)) for k in range(40)]
        while (await http.get("/health")).json()["running"] == 0:
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        answers = await asyncio.gather(*last, return_exceptions=True)
    taken = [each for each in answers if isinstance(each, tuple)]
    rows["sigterm"] = collections.Counter(code for code, _ in taken)
    rows["sigterm_not_connected"] = len(answers) - len(taken)
    rows["wrong_at_sigterm"] = sum(
        isinstance(each, tuple) and each[1] not in (None, wanted[k])
        for k, each in enumerate(answers)
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--vanish", type=int, default=200)
    parser.add_argument("--malformed", type=int, default=1000)
    parser.add_argument("--burst", type=int, default=500)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    place = Path(tempfile.mkdtemp()) / "model"
    shutil.copytree(args.model, place)
    command = [sys.executable, "-m", "fsdfm", "serve", "--port", "0", "--model", str(place)]
    log = open("/dev/null", "w") if args.out is None else open(f"{args.out}.log", "w")  # noqa: SIM115
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = next(line for line in process.stderr if " at http://" in line)
    shutil.rmtree(place.parent)
    tail = subprocess.Popen(["cat"], stdin=process.stderr, stdout=log)
    began = time.monotonic()
    rows = asyncio.run(play(line.split(" at ")[1].strip(), process, args))
    rows["exit_code"] = process.wait()
    rows["seconds"] = time.monotonic() - began
    tail.wait()
    print(json.dumps(rows, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    server_errors = [code for code in rows["malformed"] if code >= 500]
    assert not (rows["wrong"] or rows["wrong_at_sigterm"] or rows["exit_code"] or server_errors)


if __name__ == "__main__":
    main()
