"""What the machine can do at most: products a second in each format, and bytes copied."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from fsdfm.bench.jobs import synchronise
from fsdfm.core.device import preferred_dtype
from fsdfm.model.int8 import beside_int8, has_int8, qlinear

WIDTH = 768
"""Of the products, that of GPT-2."""
COPIED_BYTES = 2**28
"""More than caches hold."""
TRIALS = 5


def matmul_rate(width: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of [N, D] x [D, 4 D], best of five; N = 1,024, or 16,384 on a GPU."""
    rows, calls = (16_384, 20) if device.type == "cuda" else (1024, 1)
    a = torch.randn(rows, width, device=device, dtype=dtype)
    b = torch.randn(width, 4 * width, device=device, dtype=dtype)
    out = a @ b

    def products() -> None:
        for _ in range(calls):
            torch.matmul(a, b, out=out)

    return calls * 2 * rows * width * 4 * width / _least_seconds(products, device)


def limits(device: torch.device) -> dict[str, float]:
    """Rates of bare products (a multiply-add counts 2) and of a copy, by what they are called.

    Each is the best of a few, so a busy machine hides little of it; threads are torch's.
    """
    formats = dict.fromkeys((torch.float32, preferred_dtype(device)))
    found = {
        f"{str(dtype).removeprefix('torch.')} GFLOP/s": matmul_rate(WIDTH, device, dtype) / 1e9
        for dtype in formats
    }
    if device.type == "cpu" and has_int8():
        found["int8 GOP/s"] = int8_rate(WIDTH) / 1e9
    found["copy GB/s"] = copy_rate(device) / 1e9
    return found


def int8_rate(width: int) -> float:
    """As `matmul_rate` on a CPU, of products of 8-bit numbers that are rounded already."""
    rows = 1024
    x = torch.randint(255, (rows, width), dtype=torch.uint8)
    product = qlinear(torch.randn(4 * width, width), None, beside_int8())
    seconds = _least_seconds(lambda: product(x, 1.0, 127), torch.device("cpu"))
    return 2 * rows * width * 4 * width / seconds


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy of COPIED_BYTES."""
    source: Tensor = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = source.clone()
    return 2 * COPIED_BYTES / _least_seconds(lambda: target.copy_(source), device)


def _least_seconds(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(TRIALS):
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - started)
    return min(times)
