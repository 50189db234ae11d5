"""The learning-rate schedule."""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, peak: float, warmup_steps: int, steps: int, final_fraction: float
) -> float:
    """Linear warm-up, then a cosine down to a fraction of the peak.

    Args:
        step: updates done so far.
        peak: learning rate after the warm-up.
        warmup_steps: length of the warm-up.
        steps: updates of the whole run.
        final_fraction: of the peak, at the end.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (final_fraction + (1.0 - final_fraction) * 0.5 * (1.0 + math.cos(math.pi * done)))


def cooled(step: int, *, steps: int, cooldown_steps: int) -> float:
    """What a linear fall over the last updates leaves of the rate.

        min(1, (steps - step) / (cooldown_steps + 1))

    Args:
        step: updates done so far.
        steps: updates of the whole run.
        cooldown_steps: length of the fall.

    Source: MiniCPM, arXiv 2404.06395, for a fall that may begin at any time.
    """
    return min(1.0, (steps - step) / (cooldown_steps + 1))
