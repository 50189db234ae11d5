"""Latency and throughput of `fsdfm serve` at several numbers of clients, beside offline generation.

    python benchmarks/serving.py --clients 1 4 16 64 --out serving.json

The server is a process of its own and the load comes from this one, over loopback. Each client
sends its requests one after another, streaming with drafts: at least --each of them, and at least
--requests of all clients together. Offline is `Generator.answer` with the
server's batch size, in a process of its own, before and after each number of clients: on a shared
machine these differ, and by how much says what the figures are worth. Seconds of the processor, of
the server's process and of the offline one, depend less on what else runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

PROMPT = "Once upon a time there was a little girl who lived in a house by the sea."
OFFLINE = """
import json, sys, time
import fsdfm
from fsdfm.generate.request import Request
model, count, batch, prompt, tokens, steps = json.loads(sys.argv[1])
g = fsdfm.load(model)
length = tokens + len(g.tokenizer.encode(prompt))
asked = [Request(prompt=prompt, length=length, steps=steps, seed=k, end="never")
         for k in range(count)]
g.answer(asked[:1])
began = time.perf_counter(), time.process_time()
g.answer(asked, batch_size=batch)
print(time.perf_counter() - began[0], time.process_time() - began[1])
"""


@contextmanager
def server(model: str | None, batch: int) -> Iterator[tuple[str, int]]:
    """A server on a free port: its address and process."""
    command = [sys.executable, "-m", "fsdfm", "serve", "--port", "0", "--batch-size", str(batch)]
    command += ["--model", model] if model else []
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if " at http://" in line:
                break
        url = line.split(" at ")[1].strip()
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield url, process.pid
    finally:
        process.terminate()
        process.wait()


def ask(http: httpx.Client, seed: int, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds to the first draft, and to the end, of one text."""
    body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": args.tokens, "steps": args.steps}
    body |= {"seed": seed, "stream": True, "diffusing": True, "end": "never"}
    began, first = time.perf_counter(), None
    with http.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if first is None and "diffusion_frame" in line:
                first = time.perf_counter() - began
    total = time.perf_counter() - began
    return total if first is None else first, total


def spent(url: str, pid: int) -> tuple[float, float, float, float]:
    """Seconds of the processor so far, calls, texts in calls, and seconds in calls."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    page = httpx.get(f"{url}/metrics").text
    names = ("call_texts_count", "call_texts_sum", "call_seconds_sum")
    calls, texts, inside = (float(page.split(f"fsdfm_{n} ")[1].split()[0]) for n in names)
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"), calls, texts, inside


def load(url: str, pid: int, clients: int, args: argparse.Namespace) -> dict[str, float]:
    """Some clients at once."""
    found: list[tuple[float, float]] = []
    each = max(args.each, math.ceil(args.requests / clients))

    def client(number: int) -> None:
        with httpx.Client(base_url=url, timeout=600) as http:
            for k in range(each):
                found.append(ask(http, number * each + k, args))

    threads = [threading.Thread(target=client, args=(k,)) for k in range(clients)]
    before, mine, began = spent(url, pid), time.process_time(), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    mine = time.process_time() - mine
    cpu, calls, texts, inside = (b - a for a, b in zip(before, spent(url, pid), strict=True))
    ends = sorted(total for _, total in found)
    assert len(ends) == clients * each, "a request was lost"
    return {
        "clients": clients,
        "requests": len(ends),
        "requests_per_second": len(ends) / seconds,
        "tokens_per_second": len(ends) * args.tokens / seconds,
        "tokens_per_cpu_second": len(ends) * args.tokens / cpu,
        "texts_a_call": texts / calls,
        "seconds": seconds,
        "seconds_in_calls": inside,
        "cpu_seconds_of_the_load": mine,
        "p50_seconds": statistics.median(ends),
        "p99_seconds": ends[min(len(ends) - 1, int(0.99 * len(ends)))],
        "first_draft_p50_seconds": statistics.median(first for first, _ in found),
    }


def offline(count: int, batch: int, args: argparse.Namespace) -> dict[str, float]:
    """Texts from Python."""
    told = json.dumps([args.model, count, batch, PROMPT, args.tokens, args.steps])
    command = [sys.executable, "-c", OFFLINE, told]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, cpu = map(float, done.stdout.split())
    found = {"batch_size": batch, "texts": count, "seconds": seconds}
    found |= {"tokens_per_second": count * args.tokens / seconds}
    return found | {"tokens_per_cpu_second": count * args.tokens / cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--each", type=int, default=2, help="requests of each client, at least")
    parser.add_argument("--requests", type=int, default=48, help="of all clients, at least")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--texts", type=int, default=16, help="made offline")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows: dict[str, Any] = {"load_average": os.getloadavg(), "tokens": args.tokens}
    rows["offline"] = [
        offline(args.texts // 4, 1, args),
        offline(args.texts, args.batch_size, args),
    ]
    with server(args.model, args.batch_size) as (url, pid):
        with httpx.Client(base_url=url, timeout=600) as http:
            ask(http, 0, args)
        rows["served"] = []
        for clients in args.clients:
            row = load(url, pid, clients, args)
            rows["offline"].append(offline(args.texts, args.batch_size, args))
            beside = statistics.mean(each["tokens_per_second"] for each in rows["offline"][-2:])
            row["of_offline_beside_it"] = row["tokens_per_second"] / beside
            rows["served"].append(row)
    text = json.dumps(rows, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
