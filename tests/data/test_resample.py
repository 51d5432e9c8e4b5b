"""Resampling and registration in world coordinates."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from medssl_cli.core.errors import DataError
from medssl_cli.core.volume import Volume
from medssl_cli.data.resample import holds_classes, is_label, register_affine, resample_to, transform_matrix


def grid(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], centre: tuple[float, float, float]
) -> np.ndarray:
    """LAS affine of a grid with spacing (z, y, x) whose middle lies at ``centre`` (x, y, z) mm."""
    affine = np.diag([-spacing[2], spacing[1], spacing[0], 1.0])
    affine[:3, 3] = np.array(centre) - affine[:3, :3] @ ((np.array(shape[::-1]) - 1) / 2)
    return affine


def world(shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    """(3, Z, Y, X) coordinates in mm."""
    z, y, x = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    return np.einsum("ij,j...->i...", affine, np.stack([x, y, z, np.ones_like(x)]))[:3]


def cube(shape: tuple[int, int, int], affine: np.ndarray, corner: tuple[float, ...], side: float) -> Volume:
    inside = np.ones(shape, bool)
    for w, c in zip(world(shape, affine), corner, strict=True):
        inside &= (w >= c) & (w <= c + side)
    return Volume((inside * 1000).astype(np.int16), affine)


def centre_of(volume: Volume) -> np.ndarray:
    weights = volume.array.astype(float)
    return (world(volume.shape, volume.affine) * weights).sum(axis=(1, 2, 3)) / weights.sum()


def test_t17_cube_stays_where_it_is_on_another_grid() -> None:
    fine = cube((24, 60, 64), grid((24, 60, 64), (3, 0.5, 0.5), (2, -3, 10)), (-4, -8, 1), 12)
    coarse_affine = grid((20, 30, 26), (4, 2, 2), (4, 1, 12))
    rotated = coarse_affine.copy()
    c, s = np.cos(0.3), np.sin(0.3)
    rotated[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ coarse_affine[:3, :3]
    coarse = cube((20, 30, 26), rotated, (-4, -8, 1), 12)
    moved = resample_to(coarse, fine)
    assert (moved.shape, moved.array.dtype) == (fine.shape, np.int16)
    np.testing.assert_array_equal(moved.affine, fine.affine)
    assert (np.abs(centre_of(moved) - (2, -2, 7)) < (1, 1, 2)).all()  # half a coarse voxel
    both = (moved.array > 500) & (fine.array > 500)
    assert 2 * both.sum() / ((moved.array > 500).sum() + (fine.array > 500).sum()) > 0.8


def test_linear_values_equal_scipy() -> None:
    rng = np.random.default_rng(0)
    source = Volume(rng.normal(size=(9, 10, 11)).astype(np.float32), grid((9, 10, 11), (2, 1.5, 1.2), (0, 0, 0)))
    target = Volume(np.zeros((7, 8, 6), np.float32), grid((7, 8, 6), (1.7, 1.1, 1.3), (0.4, -0.3, 0.2)))
    moved = resample_to(source, target)
    index = np.linalg.inv(source.affine) @ np.vstack(
        [world(target.shape, target.affine).reshape(3, -1), np.ones(7 * 8 * 6)]
    )
    expected = ndimage.map_coordinates(source.array.astype(float), index[2::-1], order=1).reshape(7, 8, 6)
    np.testing.assert_allclose(moved.array, expected, atol=1e-5)


def test_labels_keep_their_values_and_outside_is_background() -> None:
    rng = np.random.default_rng(0)
    labels = Volume(rng.choice([0, 3, 7], (8, 8, 8)).astype(np.uint8), grid((8, 8, 8), (2, 2, 2), (0, 0, 0)))
    target = Volume(np.zeros((30, 30, 30), np.int16), grid((30, 30, 30), (0.9, 0.9, 0.9), (0, 0, 0)))
    moved = resample_to(labels, target, nearest=True)
    assert set(np.unique(moved.array)) == {0, 3, 7}
    assert moved.array[0, 0, 0] == 0
    assert moved.array.dtype == np.uint8


def test_outside_of_ct_is_air() -> None:
    ct = Volume(np.full((4, 4, 4), -1024, np.int16), grid((4, 4, 4), (1, 1, 1), (0, 0, 0)))
    target = Volume(np.zeros((9, 9, 9), np.int16), grid((9, 9, 9), (1, 1, 1), (0, 0, 0)))
    assert (resample_to(ct, target).array == -1024).all()


def test_outside_of_an_image_stands_its_smallest_value_and_no_new_one() -> None:
    rng = np.random.default_rng(0)
    image = Volume(rng.integers(300, 900, (5, 5, 5)).astype(np.uint16), grid((5, 5, 5), (2, 2, 2), (0, 0, 0)))
    target = Volume(np.zeros((12, 12, 12), np.int16), grid((12, 12, 12), (1.3, 1.3, 1.3), (1, 0, 0)))
    moved = resample_to(image, target).array
    assert moved.dtype == np.uint16
    assert (moved.min(), moved[0, 0, 0]) == (image.array.min(), image.array.min())
    assert resample_to(image, target, outside=0).array[0, 0, 0] == 0


def test_the_order_of_the_axes_changes_no_bit_and_is_no_reason_to_interpolate() -> None:
    rng = np.random.default_rng(0)
    image = Volume(rng.normal(size=(7, 8, 9)), grid((7, 8, 9), (2, 1.5, 1.2), (1, 2, 3)))
    target = Volume(np.zeros((6, 7, 5), np.float32), grid((6, 7, 5), (1.7, 1.1, 1.3), (1.4, 1.7, 3.2)))
    plain = resample_to(image, target)
    other = resample_to(image.reoriented("PSR"), target.reoriented("AIL"))
    assert other.orientation == "AIL"
    np.testing.assert_array_equal(other.reoriented("LAS").array, plain.array)
    np.testing.assert_array_equal(resample_to(image.reoriented("PSR"), image).array, image.array)


def test_a_thin_volume_between_the_samples_of_a_fine_grid_is_not_apart() -> None:
    image = Volume(np.arange(2 * 4 * 4, dtype=np.float32).reshape(2, 4, 4), grid((2, 4, 4), (1, 1, 1), (0.5, 0.5, 3)))
    target = Volume(np.zeros((400, 4, 4), np.uint8), grid((400, 4, 4), (1, 1, 1), (0.5, 0.5, 0)))
    assert (resample_to(image, target).array != 0).any()


def test_same_grid_is_returned_untouched_and_4d_is_resampled_volume_by_volume() -> None:
    rng = np.random.default_rng(0)
    affine = grid((6, 6, 6), (2, 1, 1), (0, 0, 0))
    four = Volume(rng.integers(0, 9, (2, 6, 6, 6)).astype(np.int16), affine)
    assert resample_to(four, Volume(four.array[0], affine)).array is four.array
    target = Volume(np.zeros((5, 5, 5), np.int16), grid((5, 5, 5), (2, 1.2, 1.2), (0, 0, 0)))
    moved = resample_to(four, target)
    assert moved.array.shape == (2, 5, 5, 5)
    one = resample_to(Volume(four.array[1], affine), target)
    np.testing.assert_array_equal(moved.array[1], one.array)


def test_places_apart_are_refused() -> None:
    a = Volume(np.zeros((4, 4, 4), np.int16), grid((4, 4, 4), (1, 1, 1), (0, 0, 0)))
    b = Volume(np.zeros((4, 4, 4), np.int16), grid((4, 4, 4), (1, 1, 1), (0, 0, 300)))
    with pytest.raises(DataError, match="does not overlap") as caught:
        resample_to(a, b)
    assert "z 298..302" in caught.value.where


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("roi_Prostate", True),
        ("lesion-mask", True),
        ("lesion", True),
        ("zone.PZ", True),
        ("ax_t2wi", False),
        ("segment", False),
        ("glandular", False),
    ],
)
def test_label_maps_are_known_by_name(stem: str, expected: bool) -> None:
    assert is_label(stem) is expected


def test_a_name_of_a_region_makes_a_label_map_only_of_few_whole_numbers() -> None:
    classes, soft = np.array([[[0, 1, 5]]], np.float32), np.array([[[0, 0.3, 1]]], np.float32)
    intensities = np.arange(300, dtype=np.int16).reshape(3, 10, 10)
    assert [holds_classes("lesion", a) for a in (classes, soft, np.zeros((2, 2, 2), np.uint8))] == [True, False, True]
    assert not holds_classes("7_t2_tra_prostate", intensities)
    assert holds_classes("roi", intensities)
    assert not holds_classes("ax_t2wi", classes)


def blobs(
    shape: tuple[int, int, int], affine: np.ndarray, shift: tuple[float, float, float], *, inverted: bool
) -> Volume:
    """Twelve balls with edges of 2 mm; ``inverted`` is another contrast of the same thing."""
    rng = np.random.default_rng(4)
    image = np.zeros(shape)
    for _ in range(12):
        centre = rng.uniform(-24, 24, 3) + np.array(shift)
        distance = np.sqrt(sum((w - c) ** 2 for w, c in zip(world(shape, affine), centre, strict=True)))
        image += rng.uniform(100, 500) * (1 + np.tanh((rng.uniform(6, 14) - distance) / 2))
    return Volume((1200 - 0.7 * image if inverted else image).astype(np.float32), affine)


def test_p41_known_shift_is_found_and_the_search_is_repeatable() -> None:
    shape = (20, 64, 64)
    affine = grid(shape, (3, 1.2, 1.2), (0, 0, 0))
    fixed = blobs(shape, affine, (0, 0, 0), inverted=False)
    moving = blobs(shape, affine, (4.0, -3.0, 2.0), inverted=True)
    transform, metric = register_affine(moving, fixed)
    matrix = transform_matrix(transform)
    point = np.array([0.0, 0.0, 0.0, 1.0])
    np.testing.assert_allclose((matrix @ point)[:3], (4.0, -3.0, 2.0), atol=0.5)
    again, metric_again = register_affine(moving, fixed)
    np.testing.assert_array_equal(transform_matrix(again), matrix)
    assert metric_again == metric
    moved = resample_to(moving, fixed, transform=transform)
    aligned = blobs(shape, affine, (0, 0, 0), inverted=True)
    middle = (slice(3, -3), slice(8, -8), slice(8, -8))
    before = np.abs(moving.array - aligned.array)[middle].mean()
    assert np.abs(moved.array - aligned.array)[middle].mean() < 0.25 * before


def test_p41_images_that_agree_stay_where_they_are() -> None:
    shape = (20, 64, 64)
    affine = grid(shape, (3, 1.2, 1.2), (0, 0, 0))
    fixed = blobs(shape, affine, (0, 0, 0), inverted=False)
    transform, _ = register_affine(blobs(shape, affine, (0, 0, 0), inverted=True), fixed)
    corners = np.array([[x, y, z, 1.0] for x in (-15, 15) for y in (-15, 15) for z in (-15, 15)]).T
    assert np.abs(transform_matrix(transform) @ corners - corners).max() < 1.5  # half a slice
