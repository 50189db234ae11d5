"""What the host draws and decides, on its way to the device that the network runs on.

Random numbers are drawn, and rows chosen, on the CPU: the same on every machine, in float64, which
some devices lack, and without a wait for the device to say how many rows there are.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """To the device; from pinned memory a CUDA stream takes it without being waited for."""
    device = torch.device(device)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def seeded(*entropy: int) -> torch.Generator:
    """Random numbers on the CPU that are a function of these whole numbers (>= 0) alone."""
    (word,) = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(word >> np.uint64(1)))
