"""Every known trap of the systems in reach is named by a test, or stands here with the reason why it cannot occur."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent

NOT_APPLICABLE = {
    "W05": "no landmark head: nothing resizes points",
    "W06": "no landmark head: there is no landmark loss",
    "W07": "no landmark head: flips carry no labels",
    "W08": "no label images are read: volumes have masks of a region of interest, which are 0 or more",
    "W09": "no label images are read: a mask is found by its own name, never by replacing a part of a path",
    "W23": "features are not extracted by several processes; the first one scores, and samples are dealt out without "
    "padding (test_datasets.py)",
}
"""Traps of parts that are not there, with the reason."""

KNOWN = (
    [f"T{number:02d}" for number in range(1, 40)]
    + [f"W{number:02d}" for number in range(1, 25)]
    + [f"R{number:02d}" for number in range(1, 22)]
)


def named() -> set[str]:
    text = " ".join(
        " ".join(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), flags=re.M))
        for path in TESTS.rglob("test_*.py")
    )
    return {word.upper() for word in re.findall(r"(?<![a-z0-9])[trw]\d\d(?!\d)", text.replace("_", " "))}


@pytest.mark.parametrize("trap", KNOWN)
def test_every_trap_has_a_test_or_a_reason(trap: str) -> None:
    assert (trap in named()) != (trap in NOT_APPLICABLE), f"{trap}: no test names it, or a test and a reason do"
