"""How threads of a product wait for each other on a CPU."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SPINS_NAME = "GOMP_SPINCOUNT"
SPINS = "1000"
"""Looks at its mate that a thread takes before it gives up its core; 300,000 as it comes."""


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let threads that wait give up their core soon; call it before torch is imported.

    Args:
        environment: of the process; what it says already stays.

    As it comes, a thread of GNU OpenMP spins for milliseconds. Where other processes want the cores
    it thereby keeps its own mate from running, at each of some thousand products of a text: beside
    three busy processes on two cores 256 tokens took more than 40 s instead of 2.4. On a quiet
    machine it costs a text 5 % (docs/speed.md).
    """
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault(SPINS_NAME, SPINS)
