"""Training, the bound and samples on a device without float64, and without waiting for it.

The cases are in other_device_cases.py. They run in a process of their own: a device that PyTorch
has been told of stays for good, and becomes the accelerator of everything else.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

CASES = Path(__file__).with_name("other_device_cases.py")


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch cannot be told of a device from Python",
)
def test_training_and_sampling_on_another_device() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", str(CASES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "38 passed" in done.stdout
