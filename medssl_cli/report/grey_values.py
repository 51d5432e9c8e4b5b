"""Grey values of slices as text within a page, so that a script can window what was measured, not an 8-bit picture.

A slice is levels of 16 bits: value = offset + step · level. Levels are predicted from their neighbours as in LOCO-I
(Weinberger et al. 2000), the differences deflated and put down as base64: a quarter smaller than a PNG of high and low
bytes, and read without a canvas, which some browsers blur on purpose.

Letters: Z slices, S sequences, H W pixels of a slice.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

BUDGET = 9_000_000
"""Characters of grey values in a page at most."""
SIDES = (384, 256, 192)
"""Longer side of a slice in pixels; the first one that stays within the budget."""
HU_RANGE = (-1024.0, 3071.0)
"""Twelve bits of a CT; metal beyond is cut."""
_FINE = 4095
"""Levels of values that are no whole numbers."""
_LAST = 65535
_SAMPLES = 3
_SAMPLED = 4096


@dataclass(frozen=True)
class Window:
    """Values that are told apart: ``centre`` ± half of ``width``, both in the unit of the values."""

    name: str
    centre: float
    width: float

    @property
    def ends(self) -> tuple[float, float]:
        """Black and white."""
        return self.centre - self.width / 2, self.centre + self.width / 2


CT_WINDOWS = (
    Window("brain", 40, 80),
    Window("subdural", 80, 200),
    Window("soft tissue", 50, 400),
    Window("bone", 600, 2800),
)
"""In HU."""


@dataclass(frozen=True)
class Greys:
    """What the levels of one sequence mean.

    Args:
        offset, step: Value = offset + step · level.
        last: Highest level.
        unit: Of the values; empty if it is not known.
        windows: Presets; the first one is shown at the start.
    """

    offset: float
    step: float
    last: int
    unit: str
    windows: tuple[Window, ...]


def measured(planes: Iterable[np.ndarray], unit: str, windows: Sequence[Window]) -> Greys:
    """Range, step and presets of one sequence.

    Args:
        planes: Slices (H, W) of it.
        unit: ``HU`` brings its own presets and range.
        windows: Presets; without any, the 1st to 99th percentile is the first one.
    """
    low, high, is_whole, samples = math.inf, -math.inf, True, [np.zeros(0)]
    for plane in planes:
        finite = plane[np.isfinite(plane)]
        finite = np.clip(finite, *HU_RANGE) if unit == "HU" else finite
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
            is_whole = is_whole and bool(np.all(finite == np.rint(finite)))
            samples.append(finite[:: max(1, finite.size // _SAMPLED)].copy())  # a view would keep the whole slice
    low, high = (low, high) if low <= high else (0.0, 0.0)
    span = high - low
    step = 1.0 if is_whole and span <= _LAST else span / _FINE
    presets = tuple(windows) or (CT_WINDOWS if unit == "HU" else (_usual(np.concatenate(samples), low),))
    whole = Window("full range", (low + high) / 2, max(span, step))
    return Greys(low, step, round(span / step), unit, (*presets, whole))


def _usual(samples: np.ndarray, lowest: float) -> Window:
    """From the 1st to the 99th percentile of what is brighter than the background."""
    bright = samples[samples > lowest]
    if not bright.size:
        return Window("auto", lowest, 1.0)
    low, high = np.percentile(bright, (1, 99))
    return Window("auto", float(low + high) / 2, float(high - low) or 1.0)


def levels(values_HW: np.ndarray, greys: Greys) -> np.ndarray:
    """(H, W) uint16; NaN becomes the lowest level."""
    scaled = np.rint((np.nan_to_num(values_HW, nan=greys.offset) - greys.offset) / greys.step)
    return np.clip(scaled, 0, greys.last).astype(np.uint16)


def packed(levels_HW: np.ndarray) -> str:
    """The levels of a slice as text; what the viewer's ``unpack`` undoes."""
    level = levels_HW.astype(np.int32)
    padded = np.pad(level, ((1, 0), (1, 0)))
    left, above, corner = padded[1:, :-1], padded[:-1, 1:], padded[:-1, :-1]
    low, high = np.minimum(left, above), np.maximum(left, above)
    guess = np.where(corner >= high, low, np.where(corner <= low, high, left + above - corner))
    guess[0], guess[:, 0] = left[0], above[:, 0]
    difference = level - guess
    folded = np.where(difference >= 0, 2 * difference, -2 * difference - 1).astype(np.uint32)
    parts = [((folded >> shift) & 255).astype(np.uint8).tobytes() for shift in (16, 8, 0)]
    return base64.b64encode(zlib.compress(b"".join(parts), 6)).decode("ascii")


def reduced(values_HW: np.ndarray, side: int) -> np.ndarray:
    """The slice with its longer side ``side`` at most, averaged."""
    scale = side / max(values_HW.shape)
    if scale >= 1:
        return values_HW
    height, width = (max(1, round(n * scale)) for n in values_HW.shape)
    picture = Image.fromarray(np.nan_to_num(values_HW).astype(np.float32))
    return np.asarray(picture.resize((width, height), Image.Resampling.BOX))


def fitting_side(plane: Callable[[int], np.ndarray], chosen: Sequence[int], greys: Sequence[Greys]) -> int | None:
    """The largest of ``SIDES`` at which the slices stay within the budget, by a few of them; None: at none of them.

    Args:
        plane: Index of a slice to (S, H, W).
        chosen: Slices of the page.
        greys: One a sequence.
    """
    places = np.unique(np.linspace(0, len(chosen) - 1, min(_SAMPLES, len(chosen))).round().astype(int))
    samples = [plane(chosen[place]) for place in places]
    for side in SIDES:
        sizes = [
            len(packed(levels(reduced(channel, side), grey)))
            for sample in samples
            for channel, grey in zip(sample, greys, strict=True)
        ]
        if 1.1 * sum(sizes) / len(samples) * len(chosen) <= BUDGET:
            return side
    return None
