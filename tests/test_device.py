"""Where the network runs, and what it leaves in memory."""

from __future__ import annotations

import subprocess
import sys

GROWTH = """
from fsdfm.core.device import keep_few_plans
keep_few_plans()
import torch
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
weight = torch.randn(512, 512, dtype=torch.bfloat16)
def products(rows):
    for n in rows:
        torch.nn.functional.linear(torch.zeros(n, 512, dtype=torch.bfloat16), weight)
products(range(1, 100))
before = resident()
products(range(100, 500))
print(resident() - before)
"""


def test_memory_does_not_grow_with_every_number_of_rows() -> None:
    said = subprocess.run(
        [sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True
    )
    assert int(said.stdout) < 50e6  # 335e6 with as many plans as there are numbers
