import io

import matplotlib
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from medssl_cli.core.volume import AXIAL, Volume
from medssl_cli.report.overlay import (
    blend,
    contour,
    draw,
    fitted,
    jpeg_bytes,
    montage,
    percentile_window,
    png_bytes,
    radiological,
    window,
)


def test_patient_right_is_on_the_left_and_anterior_up() -> None:
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])  # stored LPS: x runs to the left, y to the back
    affine[:2, 3] = 20
    array = np.zeros((3, 21, 21), np.int16)
    world = np.array([15.0, 12.0, 2.0, 1.0])  # 15 mm to the right, 12 mm to the front
    x, y, z = np.rint(np.linalg.inv(affine) @ world)[:3].astype(int)
    array[z, y, x] = 1
    volume = Volume(array, affine).reoriented("RAS")
    row, column = np.argwhere(radiological(np.take(volume.array, 1, axis=AXIAL)))[0]
    assert row < 10
    assert column < 10


def test_window_by_hand() -> None:
    image = np.array([[-5.0, 0.0, 50.0], [100.0, 900.0, np.nan]])
    np.testing.assert_array_equal(window(image, 0, 100)[..., 1], [[0, 0, 128], [255, 255, 0]])
    assert not window(image, 3, 3).any()
    assert percentile_window(np.arange(101.0)) == (1.0, 99.0)
    assert percentile_window(np.array([np.nan])) == (0.0, 1.0)


def test_contour_equals_mask_without_its_erosion() -> None:
    mask = ndimage.binary_dilation(np.random.default_rng(0).random((40, 50)) > 0.97, iterations=4)
    np.testing.assert_array_equal(contour(mask), mask & ~ndimage.binary_erosion(mask))
    assert contour(np.ones((4, 5), bool)).sum() == 14
    picture = draw(np.zeros((4, 5, 3), np.uint8), contour(np.ones((4, 5), bool)), (1, 2, 3))
    assert (picture == (1, 2, 3)).all(-1).sum() == 14


def test_blend_uses_the_colours_of_matplotlib() -> None:
    picture = np.full((2, 2, 3), 100, np.uint8)
    heat = np.array([[0.0, 1.0], [0.5, np.nan]])
    full = blend(picture, heat, 1.0, "viridis")
    expected = np.rint(np.array(matplotlib.colormaps["viridis"](0.5)[:3]) * 255)
    np.testing.assert_array_equal(full[1, 0], expected)
    np.testing.assert_array_equal(full[1, 1], picture[1, 1])
    np.testing.assert_array_equal(blend(picture, heat, 0.0), picture)


def test_fitted_keeps_proportions_in_mm() -> None:
    picture = np.full((10, 40, 3), 255, np.uint8)  # 30 x 40 mm
    square = fitted(picture, 80, (3.0, 1.0))
    assert square.shape == (80, 80, 3)
    rows, columns = np.nonzero(square[..., 0])
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (60, 80)
    assert fitted(np.zeros((1, 5000, 3), np.uint8), 16).shape == (16, 16, 3)


def test_montage_places_row_by_row() -> None:
    tiles = [np.full((2, 3, 3), i + 1, np.uint8) for i in range(3)]
    canvas = montage(tiles, columns=2, gap=1)
    assert canvas.shape == (5, 7, 3)
    assert (canvas[0, 0, 0], canvas[0, 4, 0], canvas[3, 0, 0], canvas[3, 4, 0]) == (1, 2, 3, 0)
    with pytest.raises(ValueError, match="one size"):
        montage([tiles[0], tiles[0][:1]])
    with pytest.raises(ValueError, match="one size"):
        montage([])


def test_bytes_are_read_by_pillow() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png_bytes(picture)))), picture)
    assert Image.open(io.BytesIO(jpeg_bytes(picture))).size == (30, 20)
