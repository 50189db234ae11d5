"""What several test files use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fsdfm.cli import main as cli

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Two threads over small tensors wait for each other wherever the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # and so in the commands that tests start
        yield
    torch.set_num_threads(before)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command here; gives exit code, stdout and stderr."""

    def run(*argv: object) -> tuple[int, str, str]:
        try:
            code: Any = cli.main([str(word) for word in argv])
        except SystemExit as exit_:
            code = exit_.code
        out, err = capsys.readouterr()
        return code, out, err

    return run
