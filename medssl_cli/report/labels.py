"""Structures of a label map as colours: the palette, transparent layers for the viewer, areas painted on pictures.

Letters: H W pixels of a slice.
"""

from __future__ import annotations

import colorsys
import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from medssl_cli.report.overlay import contour

Colour = tuple[int, int, int]

_PALETTE: tuple[Colour, ...] = (
    (213, 94, 0), (86, 180, 233), (240, 228, 66), (204, 121, 167), (230, 159, 0), (0, 114, 178),
)  # fmt: skip
"""Vermilion, sky blue, yellow, reddish purple, orange and blue of Okabe and Ito 2008, made for all kinds of colour
vision; without their green, in which references are drawn, and their black."""
_GOLDEN = 0.618034
FILL = 0.38
"""Opacity of the inside of a structure; its outline is opaque."""


@dataclass(frozen=True)
class Labels:
    """The label map of a case.

    Args:
        names: Of the structures, label 1 first.
        details: What is said of each, e.g. its volume.
        plane: Index of a slice to its labels, (H, W) whole numbers, 0 is background.
    """

    names: tuple[str, ...]
    details: tuple[str, ...]
    plane: Callable[[int], np.ndarray]

    @property
    def colours(self) -> tuple[Colour, ...]:
        """One for each structure."""
        return tuple(label_colour(number) for number in range(len(self.names)))


def label_colour(number: int) -> Colour:
    """Colour of the structure ``number``, counted from 0; beyond the palette around the circle of hues."""
    if number < len(_PALETTE):
        return _PALETTE[number]
    red, green, blue = colorsys.hsv_to_rgb((number * _GOLDEN) % 1, 0.55 + 0.3 * (number % 2), 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def label_layers(labels_HW: np.ndarray, colours: tuple[Colour, ...]) -> tuple[bytes | None, ...]:
    """A transparent PNG for each structure, its outline opaque; None where it has no pixel."""
    there = np.bincount(np.ravel(labels_HW), minlength=len(colours) + 1)
    return tuple(
        _layer(labels_HW == number, colour) if there[number] else None for number, colour in enumerate(colours, start=1)
    )


def _layer(mask_HW: np.ndarray, colour: Colour) -> bytes:
    """A PNG of three values: outside, inside, outline."""
    picture = Image.fromarray(mask_HW.astype(np.uint8) + contour(mask_HW), "P")
    picture.putpalette([0, 0, 0, *colour, *colour])
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", bits=2, transparency=bytes([0, round(255 * FILL), 255]))
    return buffer.getvalue()


def painted(picture: np.ndarray, labels_HW: np.ndarray, colours: tuple[Colour, ...]) -> np.ndarray:
    """(H, W, 3) uint8 with every structure laid over it, on pixels of the same size."""
    result = picture.astype(np.float32)
    for number, colour in enumerate(colours, start=1):
        mask = labels_HW == number
        if mask.any():
            result[mask] = (1 - FILL) * result[mask] + FILL * np.array(colour, np.float32)
            result[contour(mask)] = colour
    return np.rint(result).astype(np.uint8)
