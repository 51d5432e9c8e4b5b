"""A prediction and its reference on one picture: the prediction as coloured areas, the reference as green outlines.

The colours of the classes are those of the viewer. Letters: H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from medssl_cli.core.protocols import IGNORE_LABEL
from medssl_cli.report.case_page import written
from medssl_cli.report.labels import Colour, label_colour, painted
from medssl_cli.report.overlay import contour, draw, fitted, montage, percentile_window, resized, window

REFERENCE: Colour = (0, 255, 100)
"""Outlines of the reference, whatever the class."""
_DIMMED = 0.45
_CAPTION, _LETTER = 26, 8.2  # height of the line, width of a letter on it, in pixels


def class_colours(n: int) -> list[Colour]:
    """Colours of ``n`` structures, that of class 1 first; a class has its colour however many there are."""
    return [label_colour(number) for number in range(n)]


def draw_masks(
    picture: np.ndarray,
    reference_HW: np.ndarray | None,
    prediction_HW: np.ndarray | None,
    *,
    colours: Mapping[int, Colour] | None = None,
    scale: int = 1,
) -> np.ndarray:
    """Lay label maps over a picture.

    Args:
        picture: (H, W, 3) or (H, W); uint8 is shown as it is, other numbers between their 1st and 99th percentile.
        reference_HW: Class of each pixel or a boolean mask, drawn as green outlines; pixels that count nowhere
            (``IGNORE_LABEL``) are dimmed. None draws none.
        prediction_HW: The same, drawn as areas with an outline in the colour of the class.
        colours: By class index; ``class_colours`` for those that are not named.
        scale: Enlarges everything by this whole number first, so that outlines stay thin.

    Returns:
        (scale * H, scale * W, 3) uint8.

    Raises:
        ValueError: A label map is not of the size of the picture.
    """
    shown = _enlarged(_as_colour(picture), scale, smooth=True)
    reference, prediction = (
        None if labels is None else _enlarged(_fitting(labels, picture), scale, smooth=False)
        for labels in (reference_HW, prediction_HW)
    )
    if reference is not None:
        ignored_HW = reference == IGNORE_LABEL
        shown[ignored_HW] = (shown[ignored_HW] * _DIMMED).astype(np.uint8)
    if prediction is not None:
        prediction = np.where(prediction == IGNORE_LABEL, 0, prediction)
        defaults = class_colours(int(prediction.max(initial=0)))
        shown = painted(
            shown, prediction, tuple((colours or {}).get(number, own) for number, own in enumerate(defaults, start=1))
        )
    if reference is not None:
        for number in np.unique(reference[(reference != 0) & ~ignored_HW]):
            shown = draw(shown, contour(reference == number), REFERENCE)
    return shown


def overlay_strip(
    panels: Sequence[np.ndarray], captions: Sequence[str] | None = None, *, columns: int | None = None
) -> np.ndarray:
    """Pictures side by side, each under its caption.

    Args:
        panels: (H, W, 3) uint8; of different sizes they are put into squares as wide as the largest.
        captions: One each, cut where it would not fit; None for none.
        columns: Pictures in a row; None: all of them.

    Raises:
        ValueError: No panel, or another number of captions.
    """
    if not panels:
        raise ValueError("a strip has at least one picture")
    if captions is not None and len(captions) != len(panels):
        raise ValueError(f"{len(captions)} captions for {len(panels)} pictures")
    if len({panel.shape for panel in panels}) > 1:
        side = max(max(panel.shape[:2]) for panel in panels)
        panels = [fitted(panel, side) for panel in panels]
    if captions is not None:
        panels = [_under(caption, panel) for caption, panel in zip(captions, panels, strict=True)]
    return montage(panels, columns, gap=4)


def _under(caption: str, panel: np.ndarray) -> np.ndarray:
    """The picture with its caption above it."""
    width = panel.shape[1]
    room = max(1, int((width - 8) / _LETTER))
    text = caption if len(caption) <= room else f"{caption[: room - 1]}…"
    return np.concatenate([written(width, _CAPTION, [(4, "la", text)]), panel])


def _as_colour(picture: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8, a copy."""
    if picture.ndim not in (2, 3) or (picture.ndim == 3 and picture.shape[2] != 3):
        raise ValueError(f"a picture is (H, W) or (H, W, 3), got {picture.shape}")
    if picture.dtype != np.uint8:
        low, high = percentile_window(picture)
        picture = window(picture, low, high) if picture.ndim == 2 else _windowed(picture, low, high)
    return np.repeat(picture[..., None], 3, axis=-1) if picture.ndim == 2 else picture.copy()


def _windowed(picture: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.stack([window(picture[..., channel], low, high)[..., 0] for channel in range(3)], axis=-1)


def _fitting(labels_HW: np.ndarray, picture: np.ndarray) -> np.ndarray:
    if labels_HW.shape != picture.shape[:2]:
        raise ValueError(f"labels {labels_HW.shape} lie on a picture of {picture.shape[:2]}")
    return np.asarray(labels_HW).astype(np.uint8)


def _enlarged(values: np.ndarray, scale: int, *, smooth: bool) -> np.ndarray:
    if scale == 1:
        return values
    return resized(values, scale * values.shape[0], scale * values.shape[1], smooth=smooth).copy()
