"""Grey values inside a page: exact levels, windows, and slices small enough for it."""

from __future__ import annotations

import base64
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medssl_cli.report.grey_values import (
    BUDGET,
    CT_WINDOWS,
    Greys,
    Window,
    fitting_side,
    levels,
    measured,
    packed,
    reduced,
)


def unpacked(text: str, height: int, width: int) -> np.ndarray:
    """Pixel by pixel, as the median edge detector of LOCO-I is defined."""
    high, middle, low = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(3, height, width)
    level = np.zeros((height, width), int)
    for y in range(height):
        for x in range(width):
            a, b = level[y, x - 1] if x else 0, level[y - 1, x] if y else 0
            c = level[y - 1, x - 1] if x and y else 0
            guess = int(np.median([a, b, a + b - c])) if x and y else a + b
            folded = (int(high[y, x]) << 16) | (int(middle[y, x]) << 8) | int(low[y, x])
            level[y, x] = guess + (folded // 2 if folded % 2 == 0 else -(folded + 1) // 2)
    return level


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.uint16, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 65535)))
def test_levels_come_back_exactly(level: np.ndarray) -> None:
    np.testing.assert_array_equal(unpacked(packed(level), *level.shape), level)


def test_whole_numbers_are_kept_and_hu_brings_its_windows() -> None:
    plane = np.array([[-3000, -1024, 0], [40, 3071, 20000]], np.int16)
    greys = measured([plane], "HU", ())
    assert (greys.offset, greys.step, greys.last) == (-1024.0, 1.0, 4095)
    assert greys.windows[:-1] == CT_WINDOWS
    assert [(w.name, w.centre, w.width) for w in CT_WINDOWS] == [
        ("brain", 40, 80), ("subdural", 80, 200), ("soft tissue", 50, 400), ("bone", 600, 2800)
    ]  # fmt: skip
    values = greys.offset + greys.step * levels(plane, greys)
    np.testing.assert_array_equal(values, [[-1024, -1024, 0], [40, 3071, 3071]])


def test_fractions_are_kept_to_one_in_4095() -> None:
    plane = np.random.default_rng(0).normal(size=(40, 50))
    greys = measured([plane], "", ())
    assert greys.last == 4095
    assert np.abs(greys.offset + greys.step * levels(plane, greys) - plane).max() <= greys.step / 2 + 1e-12
    low, high = greys.windows[0].ends
    assert (low, high) == pytest.approx(tuple(np.percentile(plane[plane > plane.min()], (1, 99))))


@pytest.mark.parametrize("plane", [np.full((3, 4), 7.0), np.full((3, 4), np.nan)])
def test_a_slice_of_one_value_or_none_does_no_harm(plane: np.ndarray) -> None:
    greys = measured([plane], "", ())
    assert greys.step > 0
    assert all(window.width > 0 for window in greys.windows)
    assert not levels(plane, greys).any()


def test_given_windows_come_first() -> None:
    greys = measured([np.arange(6.0).reshape(2, 3)], "HU", (Window("stroke", 40, 40),))
    assert [window.name for window in greys.windows] == ["stroke", "full range"]
    assert greys.windows[0].ends == (20, 60)


def test_reduced_slices_keep_their_mean() -> None:
    plane = np.random.default_rng(0).random((768, 512)).astype(np.float32)
    small = reduced(plane, 384)
    assert small.shape == (384, 256)
    np.testing.assert_allclose(small, plane.reshape(384, 2, 256, 2).mean((1, 3)), atol=1e-6)
    assert reduced(plane, 1000) is plane


@pytest.mark.slow
def test_many_noisy_slices_become_smaller_and_then_none() -> None:
    """Noise of 16 bits: 2 bytes a pixel and a third more as base64."""
    noise = np.random.default_rng(0).integers(0, 65536, (1, 384, 384), np.uint16)
    greys = (Greys(0.0, 1.0, 65535, "", (Window("full range", 0, 1),)),)
    sides = [fitting_side(lambda z: noise, range(n), greys) for n in (4, 64, 400)]
    assert sides == [384, 192, None]
    assert 64 * len(packed(reduced(noise[0], 192).astype(np.uint16))) < BUDGET


def test_measuring_keeps_no_slice() -> None:
    planes = (np.full((256, 256), number, np.int16) for number in range(40))
    tracemalloc.start()
    try:
        measured(planes, "HU", ())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 * 256 * 256 * 8  # some float64 slices at a time, not forty
