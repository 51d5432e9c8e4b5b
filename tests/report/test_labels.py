"""Colours of structures: told apart by every kind of colour vision, and from the green of references."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from medssl_cli.report.labels import Colour, label_colour
from medssl_cli.report.mask_overlay import REFERENCE

PALETTE = [label_colour(number) for number in range(6)]
SEEN = {
    "all": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no long": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "no middle": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "no short": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}
"""Linear RGB as seen without one kind of cones: Machado, Oliveira and Fernandes 2009, severity 1."""


def lab(colour: Colour, seen: str) -> np.ndarray:
    """CIELAB (D65) of a colour of sRGB, as somebody sees it."""
    part = np.array(colour) / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(SEEN[seen]) @ linear, 0, 1)
    to_xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175],
                       [0.0193339, 0.119192, 0.9503041]])  # fmt: skip
    x, y, z = np.cbrt(to_xyz @ linear / (0.95047, 1, 1.08883))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def distance(one: Colour, other: Colour, seen: str) -> float:
    return float(np.linalg.norm(lab(one, seen) - lab(other, seen)))


@pytest.mark.parametrize("seen", SEEN)
def test_structures_are_told_apart_by_every_kind_of_colour_vision(seen: str) -> None:
    assert min(distance(*pair, seen) for pair in combinations(PALETTE, 2)) > 15  # 2.3 is just noticeable
    assert min(distance(PALETTE[0], other, seen) for other in PALETTE[1:3]) > 30


@pytest.mark.parametrize("seen", SEEN)
def test_the_first_structure_is_told_apart_from_the_green_of_references(seen: str) -> None:
    assert distance(PALETTE[0], REFERENCE, seen) > 25


def test_the_measure_knows_red_and_green_that_are_confused() -> None:
    assert distance((200, 80, 60), (110, 125, 60), "all") > 45
    assert distance((200, 80, 60), (110, 125, 60), "no middle") < 15


def test_more_structures_than_the_palette_holds_have_colours_too() -> None:
    every = [label_colour(number) for number in range(40)]
    assert len(set(every)) == 40
    assert all(0 <= part <= 255 for colour in every for part in colour)
