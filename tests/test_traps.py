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
    "W33": "no forecasting head: there are no intervals",
    "W34": "no forecasting head: there are no intervals",
    "W40": "classes come from tables and folders; no list is chosen by a path",
    "W41": "no key keeps N images a class; percentage_labels keeps a share, stratified (test_train_head.py)",
}
"""Traps of parts that are not there, with the reason."""

KNOWN = (
    [f"T{number:02d}" for number in range(1, 40)]
    + [f"W{number:02d}" for number in range(1, 45)]
    + [f"M{number:02d}" for number in range(1, 31)]
    + [f"R{number:02d}" for number in range(1, 22)]
    + [f"C{number:02d}" for number in range(1, 25)]
)


def named() -> set[str]:
    text = " ".join(
        " ".join(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), flags=re.M))
        for path in TESTS.rglob("test_*.py")
    )
    return {word.upper() for word in re.findall(r"(?<![a-z0-9])[cmtrw]\d\d(?!\d)", text.replace("_", " "))}


@pytest.mark.parametrize("trap", KNOWN)
def test_every_trap_has_a_test_or_a_reason(trap: str) -> None:
    assert (trap in named()) != (trap in NOT_APPLICABLE), f"{trap}: no test names it, or a test and a reason do"
