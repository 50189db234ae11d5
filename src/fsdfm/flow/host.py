"""What the host draws and decides, on its way to the device that the network runs on.

Random numbers are drawn, and rows chosen, on the CPU: the same on every machine, in float64, which
some devices lack, and without a wait for the device to say how many rows there are.
"""

from __future__ import annotations

from collections.abc import Callable

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


def _alone(*counts: int) -> list[int]:
    return list(counts)


class Draws:
    """The random numbers of some samples of a pass, each from the seed and its own number.

    A sample gets the same ones whichever process it falls to, and beside whatever others. What
    belongs to the whole pass (which stratum a sample is in) comes from the seed and the pass.

    Args:
        seed: of the run, at least 0.
        number: of the pass.
        rows: which samples of the pass these are.
        count: samples of the pass, over all processes.
        totals: whole numbers -> their sums over all processes; every process must ask.
    """

    def __init__(
        self,
        seed: int,
        number: int,
        rows: range,
        count: int,
        totals: Callable[..., list[int]] = _alone,
    ) -> None:
        self.generators = [seeded(seed, 1, number * count + row) for row in rows]
        self.rows, self.count, self.totals = rows, count, totals
        self._of_pass = seeded(seed, 2, number)

    def select(self, rows: Tensor) -> Draws:
        """Those of some of the samples, int64, (n,), on the CPU; they draw on where these stand."""
        some = object.__new__(Draws)
        some.generators = [self.generators[row] for row in rows.tolist()]
        some.rows, some.count, some.totals = self.rows, self.count, self.totals
        some._of_pass = self._of_pass
        return some

    def stratified(self) -> Tensor:
        """See `stratified`: over the whole pass, these samples' part of it."""
        return stratified(self.count, self._of_pass)[self.rows.start : self.rows.stop]


Randomness = torch.Generator | Draws
"""Where random numbers come from: one stream, or a stream for each sample."""


def uniform(
    random: Randomness, rows: int, *shape: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Uniform in [0, 1), shape (rows, *shape), on the CPU or the generator's device."""
    if isinstance(random, Draws):
        assert rows == len(random.generators)
        if not rows:
            return torch.zeros((0, *shape), dtype=dtype)
        each = [torch.rand(shape, dtype=dtype, generator=g) for g in random.generators]
        return torch.stack(each)
    return torch.rand((rows, *shape), dtype=dtype, generator=random, device=random.device)


def stratified(count: int, random: Randomness) -> Tensor:
    """One uniform number in each of `count` equal parts of [0, 1), in random order, float64."""
    if isinstance(random, Draws):
        return random.stratified()
    device = random.device
    order = torch.randperm(count, generator=random, device=device)
    jitter = torch.rand(count, dtype=torch.float64, generator=random, device=device)
    return (order + jitter) / count


def totals(random: Randomness, *counts: int) -> list[int]:
    """Sums over all processes that share a pass; of one stream there is one process."""
    return random.totals(*counts) if isinstance(random, Draws) else list(counts)
