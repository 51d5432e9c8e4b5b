"""Pictures of an evaluation of masks: box plots of cases, FROC curves, and slices with both outlines.

Colours of the slices: what both have, what the prediction has alone, what the reference has alone.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from medssl_cli.report import overlay

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BOTH, PREDICTION_ALONE, REFERENCE_ALONE = (0, 158, 115), (213, 94, 0), (86, 180, 233)
"""Okabe and Ito: bluish green, vermilion, sky blue."""
_POINT = "#0072B2"
_MOST_POINTS = 400
_OPACITY = 0.45
SIDE = 440
"""Pixels of a drawn slice."""


class Outlines(NamedTuple):
    """One plane of a case, as it lies in the file.

    Args:
        image_HW: Grey values, or None where no image is known; (H, W, 3) uint8 of a colour picture.
        prediction_HW, reference_HW: Class index of each pixel.
        spacing: Pixel size (y, x).
        flip: Whether rows and columns are turned around, to the way such planes are read.
    """

    image_HW: np.ndarray | None
    prediction_HW: np.ndarray
    reference_HW: np.ndarray
    spacing: tuple[float, float] = (1.0, 1.0)
    flip: tuple[bool, bool] = (False, False)


def draw_boxes(values: Mapping[str, np.ndarray], label: str, *, ends: tuple[float, float] | None = None) -> bytes:
    """Box plots: median, quartiles, whiskers to the last value within 1.5 interquartile ranges; a dot for each case.

    Args:
        values: Structure -> value of each case; NaN is left out.
        label: Of the axis.
        ends: Of the axis; None: as far as the values go.
    """
    known = {name: column[~np.isnan(column)] for name, column in values.items()}
    figure, axis = _figure(max(3.2, 1.3 * len(known) + 1.6), 3.6)
    rng = np.random.default_rng(0)  # sideways only, so that equal values stay apart
    for place, column in enumerate(known.values()):
        if not len(column):
            axis.text(place, 0.5, "undefined", ha="center", color="0.5", transform=axis.get_xaxis_transform(), size=8)
            continue
        axis.boxplot(
            [column], positions=[place], widths=0.5, showfliers=False, medianprops={"color": "black", "lw": 1.6}
        )
        shown = column if len(column) <= _MOST_POINTS else rng.choice(column, _MOST_POINTS, replace=False)
        sideways = place + rng.uniform(-0.14, 0.14, len(shown))
        axis.plot(sideways, shown, "o", ms=4, mec="white", mew=0.4, color=_POINT, alpha=0.7, zorder=3)
    axis.set_xticks(
        range(len(known)), [f"{name.replace('_', ' ')}\n{len(column)} cases" for name, column in known.items()]
    )
    axis.set(ylabel=label, xlim=(-0.6, len(known) - 0.4))
    if ends is not None:
        axis.set_ylim(ends[0] - 0.03 * (ends[1] - ends[0]), ends[1] + 0.03 * (ends[1] - ends[0]))
    axis.grid(axis="y", color="0.9", lw=0.8)
    axis.set_axisbelow(True)
    return _png(figure)


def draw_froc(curves: Mapping[str, Sequence[tuple[float, float]]]) -> bytes:
    """Sensitivity against false positives a case, on a logarithmic axis.

    Args:
        curves: Structure -> (false positives a case, sensitivity) from the highest threshold on.
    """
    figure, axis = _figure(4.8, 3.6)
    for name, points in curves.items():
        if points:
            rates, shares = (np.array(column, dtype=float) for column in zip(*points, strict=True))
            axis.step(np.maximum(rates, 0.05), shares, where="post", marker="o", ms=3, label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks([0.0625, 0.125, 0.25, 0.5, 1, 2, 4, 8], ["1/16", "1/8", "1/4", "1/2", "1", "2", "4", "8"])
    axis.set(xlim=(0.05, 10), ylim=(-0.02, 1.02), xlabel="false positives a case", ylabel="sensitivity")
    axis.grid(color="0.9", lw=0.8)
    if len(curves) > 1:
        axis.legend(frameon=False, fontsize=8)
    return _png(figure)


def draw_case(plane: Outlines) -> bytes:
    """The plane as it is, and the same with what agrees and what does not, side by side; JPEG."""
    grey = _grey(plane)
    prediction, reference = plane.prediction_HW > 0, plane.reference_HW > 0
    same = prediction & reference & (plane.prediction_HW == plane.reference_HW)
    coloured = grey
    for region, colour in (
        (same, BOTH),
        (prediction & ~same, PREDICTION_ALONE),
        (reference & ~prediction, REFERENCE_ALONE),
    ):
        coloured = np.where(region[..., None], _OPACITY * np.array(colour) + (1 - _OPACITY) * coloured, coloured)
    coloured = overlay.draw(np.rint(coloured).astype(np.uint8), overlay.contour(same), BOTH)
    coloured = overlay.draw(coloured, overlay.contour(prediction & ~same), PREDICTION_ALONE)
    coloured = overlay.draw(coloured, overlay.contour(reference & ~prediction), REFERENCE_ALONE)
    pictures = [coloured] if plane.image_HW is None else [grey, coloured]
    rows, columns = (slice(None, None, -1 if turned else 1) for turned in plane.flip)
    pictures = [picture[rows, columns] for picture in pictures]
    fitted = [overlay.fitted(np.ascontiguousarray(picture), SIDE, plane.spacing) for picture in pictures]
    return overlay.jpeg_bytes(overlay.montage(fitted), quality=85)


def _grey(plane: Outlines) -> np.ndarray:
    if plane.image_HW is None:
        return np.full((*plane.prediction_HW.shape, 3), 24, np.uint8)
    if plane.image_HW.ndim == 3:
        return np.asarray(plane.image_HW, dtype=np.uint8)
    return overlay.window(plane.image_HW, *overlay.percentile_window(plane.image_HW))


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png", facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
