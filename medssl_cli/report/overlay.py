"""Numbers to pictures: windowing, contours and heat maps on slices, and the bytes of a PNG or JPEG.

Pictures are uint8 RGB, (H, W, 3). ``radiological`` turns a plane of a volume in RAS order to the way it is read.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

CONTOUR = (255, 200, 0)


def radiological(plane_YX: np.ndarray) -> np.ndarray:
    """An axial plane of an RAS volume as radiologists look at it: anterior up, the patient's right on the left."""
    return plane_YX[::-1, ::-1]


def percentile_window(image: np.ndarray, lower: float = 1.0, upper: float = 99.0) -> tuple[float, float]:
    """Grey values between which the finite voxels lie, percentiles; (0, 1) for an image without finite voxels."""
    finite = image[np.isfinite(image)]
    if not finite.size:
        return 0.0, 1.0
    low, high = np.percentile(finite, (lower, upper))
    return float(low), float(high)


def window(image_HW: np.ndarray, low: float, high: float) -> np.ndarray:
    """Grey picture (H, W, 3): ``low`` becomes black, ``high`` white; NaN and a window without width are black."""
    values = np.asarray(image_HW, dtype=np.float64)
    span = high - low
    scaled = (values - low) / span if span > 0 else np.zeros_like(values)
    grey = np.clip(np.nan_to_num(scaled, nan=0.0, posinf=1.0, neginf=0.0), 0, 1)
    return np.repeat(np.rint(grey * 255).astype(np.uint8)[..., None], 3, axis=-1)


def contour(mask_HW: np.ndarray) -> np.ndarray:
    """Inner outline of a mask: its pixels with a neighbour (of four) outside; the border of the picture is outside."""
    mask = np.asarray(mask_HW, dtype=bool)
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside


def draw(picture: np.ndarray, line_HW: np.ndarray, colour: tuple[int, int, int] = CONTOUR) -> np.ndarray:
    """A copy of ``picture`` with the pixels of ``line_HW`` in ``colour``."""
    drawn = picture.copy()
    drawn[line_HW] = colour
    return drawn


def blend(
    picture: np.ndarray, heat_HW: np.ndarray, alpha: float | np.ndarray = 0.5, colormap: str = "inferno"
) -> np.ndarray:
    """A heat map laid over a picture.

    Args:
        picture: (H, W, 3) uint8.
        heat_HW: Values from 0 to 1; NaN leaves the picture as it is.
        alpha: Opacity from 0 to 1, one number or one for each pixel.
        colormap: Name of a matplotlib colour map.
    """
    import matplotlib

    heat = np.asarray(heat_HW, dtype=np.float64)
    colours = matplotlib.colormaps[colormap](np.clip(np.nan_to_num(heat), 0, 1))[..., :3] * 255
    opacity = np.where(np.isnan(heat), 0.0, np.clip(alpha, 0, 1))[..., None]
    return np.rint(picture * (1 - opacity) + colours * opacity).astype(np.uint8)


def resized(picture: np.ndarray, height: int, width: int, *, smooth: bool = True) -> np.ndarray:
    """The picture at another size; ``smooth=False`` keeps the values, for masks."""
    method = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(picture).resize((width, height), method))


def fitted(
    picture: np.ndarray, side: int, spacing: tuple[float, float] = (1.0, 1.0), *, smooth: bool = True
) -> np.ndarray:
    """The picture in a black square of ``side`` pixels, in its true proportions.

    Args:
        picture: (H, W, 3) uint8.
        side: Pixels.
        spacing: Pixel size (y, x) in mm.
        smooth: False keeps the values, for masks.
    """
    height_mm, width_mm = picture.shape[0] * spacing[0], picture.shape[1] * spacing[1]
    scale = side / max(height_mm, width_mm)
    height, width = (max(1, min(side, round(mm * scale))) for mm in (height_mm, width_mm))
    square = np.zeros((side, side, 3), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = resized(picture, height, width, smooth=smooth)
    return square


def montage(pictures: Sequence[np.ndarray], columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Pictures of one size in rows of ``columns``, ``gap`` black pixels apart.

    Raises:
        ValueError: No picture, or different sizes.
    """
    shapes = {picture.shape for picture in pictures}
    if len(shapes) != 1:
        raise ValueError(f"a montage takes pictures of one size, got {sorted(shapes)}")
    height, width, _ = shapes.pop()
    columns = min(columns or len(pictures), len(pictures))
    rows = -(-len(pictures) // columns)
    canvas = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), np.uint8)
    for i, picture in enumerate(pictures):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = picture
    return canvas


def png_bytes(picture: np.ndarray) -> bytes:
    """PNG of (H, W, 3), (H, W, 4) or (H, W) uint8."""
    return _encoded(picture, "PNG", optimize=True)


def jpeg_bytes(picture: np.ndarray, quality: int = 80) -> bytes:
    """JPEG of (H, W, 3) or (H, W) uint8; a fifth of the PNG, for pages of hundreds of thumbnails."""
    return _encoded(picture, "JPEG", quality=quality)


def _encoded(picture: np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format=kind, **options)
    return buffer.getvalue()
