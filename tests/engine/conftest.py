"""Puts the stub objective on the path, for the tests and for the processes that they start."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script in a fresh interpreter that can import the stub."""

    def run(script: str, *words: object, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        command = [*prefix, sys.executable, "-c", f"import sys; sys.path.insert(0, {str(HERE)!r})\n{script}"]
        return subprocess.run([*command, *map(str, words)], capture_output=True, text=True, timeout=120, check=False)

    return run
