"""Where the network runs, in which number format, and what it leaves in memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fsdfm.core.errors import ConfigError

DEVICE_TYPES = ("cuda", "mps", "cpu")
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
"""Dense bfloat16 products with float32 sums, 10^12 a second, of GPUs whose name has the word; the
first that fits counts. From their makers' sheets, not measured."""

PLANS = 32
"""Plans of products that a process that serves keeps. A plan is for one number of rows."""


def keep_few_plans() -> None:
    """Bound what the CPU's library of products keeps, for processes that meet many shapes.

    It keeps a thousand plans as it comes, each for one number of rows: memory grows by every new
    one. To make a plan anew costs no time that could be measured. Call it before the first product;
    what the environment says already stays.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(PLANS))


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """The device asked for, or the best one that this machine has: cuda, else mps, else cpu.

    Raises:
        ConfigError: no such kind of device, or this machine has none.
    """
    if name is None:
        return torch.device(next(kind for kind in DEVICE_TYPES if _count(kind)))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in DEVICE_TYPES:
        raise ConfigError(f"device must be cpu, cuda, cuda:N or mps, got {str(name)!r}.", "device")
    if (device.index or 0) >= _count(device.type):
        raise ConfigError(f"This machine has no device {device}: leave it out, or choose cpu.")
    return device


def preferred_dtype(device: torch.device) -> torch.dtype:
    """The format to run the network's matrix products in.

    bfloat16 where the hardware multiplies it (CUDA from Ampere on, CPUs with AMX or AVX512-BF16),
    else float32: on a CPU with neither bfloat16 was measured to be six times slower.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and _multiplies_bf16()
    return torch.bfloat16 if fast else torch.float32


def has_tiles() -> bool:
    """Whether this CPU has AMX, whose bfloat16 is as fast as 8 bits elsewhere."""
    return bool(cpu_features().get("amx_bf16"))


def cpu_features() -> Mapping[str, Any]:
    """Instructions of this CPU that PyTorch knows of; none where it cannot tell."""
    try:
        return torch.cpu.get_capabilities()
    except (RuntimeError, AttributeError):  # an older PyTorch
        return {}


def hardware(device: torch.device) -> str:
    """What a figure was measured on: the name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    return name


def peak_tflops(device: torch.device) -> float | None:
    """Of a device in bfloat16, where it is known."""
    name = hardware(device) if device.type == "cuda" else ""
    return next((peak for word, peak in PEAK_TFLOPS.items() if word in name), None)


def give_back_memory() -> None:
    """What was freed, but malloc keeps, goes back to the system; does nothing without glibc."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _count(kind: str) -> int:
    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    return int(kind == "cpu" or torch.backends.mps.is_available())


def _multiplies_bf16() -> bool:
    """AMX tiles or AVX512-BF16, and a PyTorch that uses them."""
    used = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return used and (has_tiles() or bool(cpu_features().get("avx512_bf16")))
