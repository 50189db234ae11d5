"""What several test files use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fsdfm.app import cli

Run = Callable[..., tuple[int, str, str]]


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
