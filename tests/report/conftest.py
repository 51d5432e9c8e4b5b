from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --virtual-time-budget=5000 --enable-logging=stderr --hide-scrollbars "
    "--window-size=1100,1500"
)


@pytest.fixture(scope="session")
def chromium() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Open a page in a browser that finds no network."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium here: the page was not opened in a browser")

    def opened(page: Path, *more: str) -> subprocess.CompletedProcess[str]:
        profile = page.parent / f"profile-{page.stem}"
        words = [browser, *FLAGS.split(), "--host-resolver-rules=MAP * ~NOTFOUND", *more, f"--user-data-dir={profile}"]
        return subprocess.run([*words, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)

    return opened


@pytest.fixture
def in_chromium(
    chromium: Callable[..., subprocess.CompletedProcess[str]],
) -> Callable[[Path], tuple[str, list[str]]]:
    """(the document after its scripts ran, console lines) of a page."""

    def opened(page: Path) -> tuple[str, list[str]]:
        answer = chromium(page, "--dump-dom")
        return answer.stdout, [line for line in answer.stderr.splitlines() if "CONSOLE" in line]

    return opened


@pytest.fixture
def photographed(
    chromium: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> Callable[[str, str], np.ndarray]:
    """Pixels (H, W, 3) of a page, given as text with a name."""

    def taken(text: str, name: str) -> np.ndarray:
        page, picture = tmp_path / f"{name}.html", tmp_path / f"{name}.png"
        page.write_text(text, encoding="utf-8")
        chromium(page, f"--screenshot={picture}")
        with Image.open(picture) as opened:
            return np.asarray(opened.convert("RGB")).astype(int)

    return taken
