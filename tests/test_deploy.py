"""Launch examples: they are shell that parses, and name no place of their own."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[1] / "deploy"


@pytest.mark.parametrize("name", ["train.sh", "train.slurm"])
def test_a_launcher_parses_and_asks_for_its_places(name: str) -> None:
    script = DEPLOY / name
    subprocess.run(["bash", "-n", str(script)], check=True)
    code = [line for line in script.read_text().splitlines() if not line.startswith("#")]
    assert not re.search(r"(?<![\w$}\"])/(?:home|root|mnt|data|scratch)", "\n".join(code))
    done = subprocess.run(
        ["bash", str(script), "pretrain"], capture_output=True, text=True, check=False, env={}
    )
    assert done.returncode != 0 and "set DATA" in done.stderr
