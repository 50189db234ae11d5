"""What is compared: each side does the same job in its own way, in a process of its own.

A side is a task ("sample", "distill", "pretrain" or "joint") and a name. Weights are random, since
the speed of neither side depends on them, and are the same on all sides but the autoregressive one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fsdfm.bench import autoregressive, ctranslate
from fsdfm.bench.jobs import Side
from fsdfm.bench.samplers import (
    Autoregressive,
    JointSampler,
    OurSampler,
    PlainSampler,
    Translated,
)
from fsdfm.bench.trainers import (
    OurDistill,
    OurJoint,
    OurPretrain,
    PlainDistill,
    PlainJoint,
    PlainPretrain,
)
from fsdfm.core.device import preferred_dtype
from fsdfm.generate.precision import pick_dtype
from fsdfm.model.config import ModelConfig

Build = Callable[[ModelConfig, torch.device, torch.dtype], Side]

SIDES: dict[str, dict[str, tuple[Build, torch.dtype | None]]] = {
    "sample": {
        "reference-float32": (PlainSampler, torch.float32),
        "reference-bf16": (PlainSampler, torch.bfloat16),
        "engine": (OurSampler, None),
        "engine-float32": (OurSampler, torch.float32),
        "engine-bf16": (OurSampler, torch.bfloat16),
        "engine-int8": (OurSampler, torch.int8),
        "engine-joint": (JointSampler, None),
        "engine-joint-bf16": (JointSampler, torch.bfloat16),
        "engine-joint-int8": (JointSampler, torch.int8),
        "autoregressive-float32": (Autoregressive, torch.float32),
        "autoregressive-bf16": (Autoregressive, torch.bfloat16),
        "ctranslate2-float32": (Translated, torch.float32),
        "ctranslate2-bf16": (Translated, torch.bfloat16),
        "ctranslate2-int8": (Translated, torch.int8),
    },
    "distill": {
        "reference-float32": (PlainDistill, torch.float32),
        "reference-bf16": (PlainDistill, torch.bfloat16),
        "ours": (OurDistill, None),
    },
    "pretrain": {
        "plain": (PlainPretrain, None),
        "ours": (OurPretrain, None),
    },
    "joint": {
        "plain": (PlainJoint, None),
        "ours": (OurJoint, None),
    },
}
"""Task -> side -> how it is built and the format of its products; None: the one users get."""
OURS = ("engine", "ours")
"""How the names of our own sides begin."""
ON_REQUEST = ("engine-bf16", "engine-int8", "engine-joint-bf16", "engine-joint-int8")


MISSING = "Sides left out: {}. They need transformers and ctranslate2: pip install 'fsdfm[bench]'."
CPU = torch.device("cpu")


def sides_for(task: str, preferred: torch.dtype, device: torch.device = CPU) -> list[str]:
    """Sides of a task that can run on a device and are worth it where `preferred` is its format."""
    names = [name for name in SIDES[task] if name not in ON_REQUEST]
    if preferred == torch.float32:  # bf16 would be emulated, and engine may be engine-float32
        names = [name for name in names if not name.endswith("bf16") and name != "engine-float32"]
    return runnable(names, device)


def runnable(names: list[str], device: torch.device = CPU) -> list[str]:
    """Without the sides whose packages are missing, or that know no such products here."""

    def runs(name: str) -> bool:
        if name.startswith("ctranslate2"):
            return ctranslate.runs(device, dtype_of("sample", name, torch.float32))
        return autoregressive.available() or not name.startswith("autoregressive")

    return [name for name in names if runs(name)]


def missing() -> str | None:
    """What one should know of packages that are not installed."""
    lacking = [
        name
        for name, there in (
            ("autoregressive", autoregressive.available()),
            ("ctranslate2", ctranslate.available()),
        )
        if not there
    ]
    if not lacking:
        return None
    return MISSING.format(", ".join(lacking))


def users_dtype(task: str, device: torch.device, config: ModelConfig) -> torch.dtype:
    """Format of the products of a task as users get it."""
    return pick_dtype(None, device, config) if task == "sample" else preferred_dtype(device)


def dtype_of(task: str, name: str, preferred: torch.dtype) -> torch.dtype:
    """Format of a side's matrix products."""
    return SIDES[task][name][1] or preferred


def build_side(
    task: str, name: str, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Side:
    """The side, its weights loaded."""
    return SIDES[task][name][0](config, device, dtype)
