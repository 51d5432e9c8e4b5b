"""One grid for all sequences and back again, against SimpleITK, nibabel, numpy and values worked out by hand."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.processing import resample_from_to
from PIL import Image

from medssl_cli.core.case import Case, Sequence
from medssl_cli.core.errors import DataError
from medssl_cli.core.volume import Volume
from medssl_cli.data.checks import check_geometry
from medssl_cli.data.images import read_volume, write_volume
from medssl_cli.data.preprocess import (
    PreprocessConfig,
    prepare_case,
    prepare_picture,
    prepared_grid,
    scale_to_unit,
    sequence_limits,
    slice_limits,
)
from medssl_cli.data.resample import Grid, resample_to

RNG = np.random.default_rng(0)


def affine(spacing_xyz: tuple[float, float, float], origin: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    matrix = np.diag([*spacing_xyz, 1.0])
    matrix[:3, 3] = origin
    return matrix


def oblique(spacing_xyz: tuple[float, float, float], origin: tuple[float, float, float]) -> np.ndarray:
    a, b = np.deg2rad(12), np.deg2rad(-7)
    turn_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    matrix = np.eye(4)
    matrix[:3, :3] = turn_z @ turn_x @ np.diag(spacing_xyz)
    matrix[:3, 3] = origin
    return matrix


def smooth(shape: tuple[int, int, int], matrix: np.ndarray) -> Volume:
    """A function of the place in mm, so that its value on any grid is known."""
    z, y, x = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    world = np.einsum("ij,j...->i...", matrix, np.stack([x, y, z, np.ones_like(x)]).astype(float))[:3]
    return Volume((100 + 2.0 * world[0] - 1.5 * world[1] + 0.75 * world[2]).astype(np.float32), matrix)


def cube(shape: tuple[int, int, int], matrix: np.ndarray, centre_mm: tuple[float, float, float]) -> Volume:
    """500 in a cube of 12 mm around a place, 20 outside, with a little noise."""
    z, y, x = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    world = np.einsum("ij,j...->i...", matrix, np.stack([x, y, z, np.ones_like(x)]).astype(float))[:3]
    inside = (np.abs(world - np.array(centre_mm).reshape(3, 1, 1, 1)) <= 6).all(axis=0)
    noise = np.random.default_rng(1).integers(0, 5, shape)
    return Volume((20 + 480 * inside + noise).astype(np.int16), matrix)


def case_of(folder: Path, roi: Volume | None = None, **volumes: Volume) -> Case:
    sequences = {}
    for name, volume in volumes.items():
        write_volume(folder / f"{name}.nii.gz", volume)
        sequences[name] = Sequence(name, folder / f"{name}.nii.gz")
    if roi is not None:
        write_volume(folder / "roi.nii.gz", roi)
    return Case("P1", "P1", sequences, roi=None if roi is None else folder / "roi.nii.gz")


def centre_mm(mask: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    z, y, x = (places.mean() for places in np.nonzero(mask))
    return (matrix @ [x, y, z, 1])[:3]


def test_t17_a_cube_on_two_grids_meets_at_one_place(tmp_path: Path) -> None:
    place = (5.0, -8.0, 12.0)
    t2 = cube((24, 90, 80), oblique((0.8, 0.8, 3), (-35, -38, -20)), place)
    adc = cube((40, 44, 48), affine((-1.9, -1.9, 2), (45, 38, -30)), place)
    prepared = prepare_case(case_of(tmp_path, t2=t2, adc=adc), ("t2", "adc"), PreprocessConfig())
    assert prepared.images_SZYX.shape == (2, 24, 90, 80)
    assert prepared.images_SZYX.dtype == np.int16
    assert prepared.resampled_S.tolist() == [False, True]
    for image in prepared.images_SZYX:
        np.testing.assert_allclose(centre_mm(image > 260, prepared.affine), place, atol=0.9)
    both = (prepared.images_SZYX > 260).sum(axis=(1, 2, 3))
    overlap = (prepared.images_SZYX > 260).all(axis=0).sum()
    assert 2 * overlap / both.sum() > 0.85


def test_linear_resampling_equals_nibabel() -> None:
    volume = smooth((12, 30, 26), oblique((1.1, 0.9, 2.5), (-12, -14, -13)))
    target = Grid((10, 22, 20), affine((0.7, 0.8, 1.5), (-6, -7, -6)))
    ours = resample_to(volume, target)
    theirs = resample_from_to(
        nib.Nifti1Image(volume.array.T.astype(np.float64), volume.affine), (target.shape[::-1], target.affine), order=1
    )
    reference = np.asarray(theirs.dataobj).T
    inside = reference != 0  # nibabel is zero beyond the last voxel centre
    assert inside.mean() > 0.9
    np.testing.assert_allclose(ours.array[inside], reference[inside], atol=2e-3)


def test_linear_resampling_of_a_plane_in_space_is_exact() -> None:
    volume = smooth((20, 30, 30), oblique((1, 1, 2), (-15, -15, -20)))
    target = Grid((8, 9, 10), affine((1.5, 1.5, 1.5), (-6, -6, -6)))
    np.testing.assert_allclose(resample_to(volume, target).array, smooth(target.shape, target.affine).array, atol=1e-3)


def test_same_grid_keeps_every_bit() -> None:
    volume = Volume(RNG.standard_normal((5, 6, 7)).astype(np.float32), oblique((1, 1, 3), (0, 0, 0)))
    nearly = Grid(volume.shape, volume.affine + 1e-5)
    moved = resample_to(volume, nearly)
    assert moved.array is volume.array


def test_orientation_of_the_file_changes_nothing_but_order(tmp_path: Path, ball: Volume) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    las = prepare_case(case_of(tmp_path / "a", t2=ball), ("t2",), PreprocessConfig())
    turned = prepare_case(case_of(tmp_path / "b", t2=ball.reoriented("PSR")), ("t2",), PreprocessConfig())
    np.testing.assert_array_equal(las.images_SZYX, turned.images_SZYX)
    canonical = nib.as_closest_canonical(nib.Nifti1Image(ball.array.T, ball.affine))
    np.testing.assert_array_equal(las.images_SZYX[0], np.asarray(canonical.dataobj).T)
    np.testing.assert_allclose(las.affine, canonical.affine)


def test_a_flipped_copy_of_one_grid_is_not_interpolated(tmp_path: Path, ball: Volume) -> None:
    prepared = prepare_case(case_of(tmp_path, t2=ball, adc=ball.reoriented("LPI")), ("t2", "adc"), PreprocessConfig())
    assert not prepared.resampled_S.any()
    np.testing.assert_array_equal(prepared.images_SZYX[0], prepared.images_SZYX[1])


@pytest.mark.parametrize("orientation", ["LAS", "RAS", "PIR", "SLA"])
def test_restore_of_prepare_is_the_label_on_the_input_grid(tmp_path: Path, ball: Volume, orientation: str) -> None:
    source = ball.reoriented(orientation)
    label = Volume((source.array > 300).astype(np.uint8) * 3, source.affine)
    prepared = prepare_case(case_of(tmp_path, t2=source, label=label), ("t2", "label"), PreprocessConfig())
    back = prepared.restore.restore(prepared.images_SZYX[1])
    written = nib.load(tmp_path / "t2.nii.gz")
    assert back.shape == written.shape[::-1]
    np.testing.assert_array_equal(back.affine, written.affine)
    np.testing.assert_array_equal(back.array, label.array)
    assert back.array.dtype == prepared.images_SZYX.dtype


def test_restore_after_resampling_keeps_shape_affine_and_nearly_every_voxel(tmp_path: Path, ball: Volume) -> None:
    label = Volume((ball.array > 300).astype(np.uint8), ball.affine)
    config = PreprocessConfig(resample_mm=(1.0, 0.6, 0.6))
    prepared = prepare_case(case_of(tmp_path, t2=ball, roi=label), ("t2",), config)
    np.testing.assert_allclose(Volume(prepared.images_SZYX[0], prepared.affine).spacing, (1.0, 0.6, 0.6))
    assert prepared.roi_ZYX is not None
    back = prepared.restore.restore(prepared.roi_ZYX)
    assert back.shape == ball.shape
    assert back.array.dtype == np.bool_
    np.testing.assert_array_equal(back.affine, nib.load(tmp_path / "t2.nii.gz").affine)
    dice = 2 * (back.array & label.array.astype(bool)).sum() / (back.array.sum() + label.array.sum())
    assert dice > 0.97
    heat = prepared.restore.restore(prepared.images_SZYX[0].astype(np.float32))
    assert np.corrcoef(heat.array.ravel(), ball.array.ravel())[0, 1] > 0.97


def test_restore_refuses_another_grid(tmp_path: Path, ball: Volume) -> None:
    prepared = prepare_case(case_of(tmp_path, t2=ball), ("t2",), PreprocessConfig())
    with pytest.raises(ValueError, match="the map is"):
        prepared.restore.restore(np.zeros((2, 2, 2)))


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*[st.integers(2, 9)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 4)] * 3),
    wanted=st.tuples(*[st.floats(0.4, 3)] * 3),
)
def test_resampled_grid_keeps_centre_and_extent(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], wanted: tuple[float, float, float]
) -> None:
    source = Grid(shape, oblique(spacing, (3, 4, 5)))
    grid = prepared_grid(source, PreprocessConfig(resample_mm=wanted))

    def middle(g: Grid) -> np.ndarray:
        return (g.affine @ [*((np.array(g.shape[::-1]) - 1) / 2), 1])[:3]

    np.testing.assert_allclose(middle(grid), middle(source), atol=1e-6)
    for n, mm, m, target in zip(source.shape, spacing[::-1], grid.shape, wanted, strict=True):
        assert abs(n * mm - m * target) <= target / 2 + 1e-6 or m == 1


def test_missing_sequences_are_zero_and_marked(tmp_path: Path, ball: Volume) -> None:
    prepared = prepare_case(case_of(tmp_path, adc=ball), ("t2", "adc", "dwi"), PreprocessConfig())
    assert prepared.available_S.tolist() == [False, True, False]
    assert not prepared.images_SZYX[[0, 2]].any()
    assert prepared.images_SZYX[1].any()


def test_a_case_without_any_sequence_is_refused(tmp_path: Path, ball: Volume) -> None:
    with pytest.raises(DataError, match="none of the sequences") as caught:
        prepare_case(case_of(tmp_path, ct=ball), ("t2", "adc"), PreprocessConfig())
    assert "case P1" in caught.value.where
    assert "there are: ct" in caught.value.where


def test_reference_can_be_chosen_and_falls_back(tmp_path: Path, ball: Volume) -> None:
    small = Volume(ball.array[::2, ::2, ::2], ball.affine @ np.diag([2, 2, 2, 1.0]))
    case = case_of(tmp_path, t2=ball, adc=small)
    assert prepare_case(case, ("t2", "adc"), PreprocessConfig(reference="adc")).images_SZYX.shape[1:] == small.shape
    assert prepare_case(case, ("t2", "adc"), PreprocessConfig(reference="ax_x")).images_SZYX.shape[1:] == ball.shape


def test_grids_that_do_not_overlap_are_refused_with_both(tmp_path: Path, ball: Volume) -> None:
    away = Volume(ball.array, ball.affine + np.array([[0] * 3 + [500.0], [0] * 4, [0] * 4, [0] * 4]))
    with pytest.raises(DataError, match="does not overlap") as caught:
        prepare_case(case_of(tmp_path, t2=ball, adc=away), ("t2", "adc"), PreprocessConfig())
    assert "case P1" in caught.value.where
    assert "adc.nii.gz" in caught.value.where
    assert "x 475..530" in caught.value.where
    assert caught.value.code == "grids_apart"


def test_a_sequence_that_covers_little_is_warned_of(
    tmp_path: Path, ball: Volume, caplog: pytest.LogCaptureFixture
) -> None:
    aside = Volume(ball.array, ball.affine + np.array([[0] * 3 + [40.0], [0] * 4, [0] * 4, [0] * 4]))
    prepare_case(case_of(tmp_path, t2=ball, adc=aside), ("t2", "adc"), PreprocessConfig())
    assert "adc.nii.gz covers only 28 %" in caplog.text


@pytest.mark.parametrize("turned", ["RAS", "LPS", "PIR"])
@pytest.mark.parametrize("kind", ["whole", "small", "float"])
def test_t17_an_aligned_file_is_prepared_to_the_same_bits_as_the_original(
    tmp_path: Path, ball: Volume, turned: str, kind: str
) -> None:
    """It covers a part of the grid only, and its smallest value is not 0."""
    matrix = oblique((1.6, 1.6, 3.0), (-20, -24, -21))
    array = RNG.integers(40, {"small": 90}.get(kind, 2000), (12, 22, 20)).astype(np.int16)
    adc = Volume(array.astype(np.float32) / 7 if kind == "float" else array, matrix).reoriented(turned)
    roi = Volume((adc.array > np.median(adc.array)).astype(np.uint8) * 2, adc.affine)
    (tmp_path / "raw").mkdir(), (tmp_path / "aligned").mkdir()
    t2 = ball.reoriented("LPS")
    raw = prepare_case(case_of(tmp_path / "raw", t2=t2, adc=adc, roi=roi), ("t2", "adc"), PreprocessConfig())
    reference, original, mask = (read_volume(tmp_path / f"raw/{name}.nii.gz") for name in ("t2", "adc", "roi"))
    case = case_of(
        tmp_path / "aligned",
        t2=reference,
        adc=resample_to(original, reference),
        roi=resample_to(mask, reference, nearest=True),
    )
    aligned = prepare_case(case, ("t2", "adc"), PreprocessConfig())
    assert raw.resampled_S.tolist() == [False, True]
    assert aligned.resampled_S.tolist() == [False, False]
    assert raw.images_SZYX.dtype == aligned.images_SZYX.dtype
    np.testing.assert_array_equal(raw.images_SZYX, aligned.images_SZYX)
    np.testing.assert_array_equal(raw.roi_ZYX, aligned.roi_ZYX)
    assert (raw.images_SZYX[1] == adc.array.min()).mean() > 0.05  # what lies outside is its smallest value
    assert raw.images_SZYX[1].min() == adc.array.min()


@pytest.mark.parametrize(("shift", "interpolated"), [(0.08, False), (0.12, True)])
def test_one_tolerance_says_what_is_one_grid(tmp_path: Path, ball: Volume, shift: float, interpolated: bool) -> None:
    """What check-data calls one grid is not interpolated."""
    moved = ball.affine.copy()
    moved[1, 3] += shift
    case = case_of(tmp_path, t2=ball, adc=Volume(ball.array, moved))
    prepared = prepare_case(case, ("t2", "adc"), PreprocessConfig())
    assert prepared.resampled_S.tolist() == [False, interpolated]
    assert np.array_equal(prepared.images_SZYX[0], prepared.images_SZYX[1]) is not interpolated
    codes = {finding.code for finding in check_geometry(case)}
    assert ("grid_position" in codes) is interpolated


@pytest.mark.parametrize(
    ("array", "code"),
    [
        (np.full((4, 5, 6), 7, np.int16), "volume_constant"),
        (np.where(np.arange(120).reshape(4, 5, 6) == 17, np.nan, 1.5).astype(np.float32), "voxels_nonfinite"),
        (RNG.integers(0, 9, (1, 5, 6)).astype(np.int16), "volume_flat"),
        (RNG.integers(0, 9, (3, 4, 5, 6)).astype(np.int16), "volume_4d"),
        (np.linspace(0, 1e300, 120).reshape(4, 5, 6), "values_huge"),
    ],
)
def test_r09_bad_voxels_are_named(tmp_path: Path, array: np.ndarray, code: str) -> None:
    with pytest.raises(DataError) as caught:
        prepare_case(case_of(tmp_path, t2=Volume(array, np.eye(4))), ("t2",), PreprocessConfig())
    assert caught.value.code == code
    assert "case P1" in caught.value.where
    assert code == "values_huge" or "t2.nii.gz" in caught.value.where
    assert caught.value.fix


def test_one_volume_of_a_4d_file_is_taken(tmp_path: Path) -> None:
    array = RNG.integers(0, 900, (3, 4, 5, 6)).astype(np.int16)
    write_volume(tmp_path / "dwi.nii.gz", Volume(array, np.eye(4)))
    case = Case("P1", "P1", {"dwi": Sequence("dwi", tmp_path / "dwi.nii.gz", volume_index=2)})
    np.testing.assert_array_equal(prepare_case(case, ("dwi",), PreprocessConfig()).images_SZYX[0], array[2])
    beyond = Case("P1", "P1", {"dwi": Sequence("dwi", tmp_path / "dwi.nii.gz", volume_index=3)})
    with pytest.raises(DataError, match="4-D") as caught:
        prepare_case(beyond, ("dwi",), PreprocessConfig())
    assert "3 volumes, number 3 is asked for" in caught.value.where


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ([np.array([0, 255], np.int16)], np.uint8),
        ([np.array([-5, 3000], np.int16)], np.int16),
        ([np.array([0, 60000], np.uint16)], np.uint16),
        ([np.array([0, 60000], np.uint16), np.array([-1, 5], np.int16)], np.int32),
        ([np.array([0.0, 1200.0], np.float64)], np.int16),  # whole numbers, however the file writes them
        ([np.array([0, 255], np.uint8), np.array([0.5, 2.0], np.float32)], np.float32),
    ],
)
def test_storage_type_loses_nothing(tmp_path: Path, arrays: list[np.ndarray], expected: type) -> None:
    volumes = {f"s{i}": Volume(np.resize(a, (2, 3, 4)), np.eye(4)) for i, a in enumerate(arrays)}
    prepared = prepare_case(case_of(tmp_path, **volumes), tuple(volumes), PreprocessConfig())
    assert prepared.images_SZYX.dtype == expected
    for image, volume in zip(prepared.images_SZYX, volumes.values(), strict=True):
        np.testing.assert_array_equal(image, volume.array)


def test_small_integers_are_not_rounded_after_interpolation(tmp_path: Path) -> None:
    coarse = Volume(RNG.integers(0, 4, (4, 6, 6)).astype(np.int16), np.diag([2.0, 2, 2, 1]))
    fine = Volume(RNG.integers(0, 900, (8, 12, 12)).astype(np.int16), np.eye(4))
    prepared = prepare_case(case_of(tmp_path, t2=fine, adc=coarse), ("t2", "adc"), PreprocessConfig())
    assert prepared.images_SZYX.dtype == np.float32
    assert (prepared.images_SZYX[1] % 1 != 0).any()


def test_roi_of_another_grid_is_moved_by_nearest(tmp_path: Path, ball: Volume) -> None:
    fine = Grid((40, 90, 90), affine((0.7, 0.8, 1.5), (-32, -38, -30)))
    mask = Volume((resample_to(ball, fine).array > 300).astype(np.uint8), fine.affine)
    prepared = prepare_case(case_of(tmp_path, t2=ball, roi=mask), ("t2",), PreprocessConfig())
    assert prepared.roi_ZYX is not None
    canonical = ball.reoriented("RAS").array > 300
    assert 2 * (prepared.roi_ZYX & canonical).sum() / (prepared.roi_ZYX.sum() + canonical.sum()) > 0.9


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("kind", [np.int16, np.uint8, np.float32])
def test_slice_limits_are_numpy_percentiles(axis: int, kind: type) -> None:
    volume = (RNG.gamma(2, 30, (6, 17, 23))).astype(kind)
    low, high = slice_limits(volume, axis, (1, 99))
    others = tuple(n for n in range(3) if n != axis)
    np.testing.assert_allclose(low, np.percentile(volume.astype(np.float64), 1, axis=others), rtol=1e-6)
    np.testing.assert_allclose(high, np.percentile(volume.astype(np.float64), 99, axis=others), rtol=1e-6)


def test_slice_limits_of_a_nearly_empty_slice_are_its_extremes() -> None:
    volume = np.zeros((2, 40, 40), np.int16)
    volume[1, 3, 4] = 70
    low, high = slice_limits(volume, 0, (1, 99))
    assert low.tolist() == [0, 0]
    assert high.tolist() == [0, 70]


def test_t20_fixed_adc_keeps_the_ratio_between_slices() -> None:
    volume = np.zeros((2, 20, 20), np.int16)
    volume[0], volume[1] = 600, 1200
    volume[:, 0, 0] = 0
    config = PreprocessConfig(adc_scale="fixed")
    low, high = sequence_limits("ax_adc", volume, 0, config)
    scaled = [scale_to_unit(volume[z][None], low[z : z + 1], high[z : z + 1])[0, 5, 5] for z in range(2)]
    np.testing.assert_allclose(scaled, [0.2, 0.4], rtol=1e-6)
    low, high = sequence_limits("ax_adc", volume, 0, PreprocessConfig())
    scaled = [scale_to_unit(volume[z][None], low[z : z + 1], high[z : z + 1])[0, 5, 5] for z in range(2)]
    assert scaled == [1.0, 1.0]  # by slice, the units are gone: what the trap is about
    np.testing.assert_array_equal(sequence_limits("ax_t2wi", volume, 0, config)[1], [600, 1200])


def test_t34_background_is_exactly_zero_and_absent_planes_stay_zero() -> None:
    image = np.array([[[0, 0, 50], [100, 200, 200]], [[0, 0, 0], [0, 0, 0]]], np.int16)
    scaled = scale_to_unit(image, np.array([0, 0]), np.array([200, 0]))
    np.testing.assert_allclose(scaled[0], [[0, 0, 0.25], [0.5, 1, 1]])
    assert not scaled[1].any()
    assert scaled.dtype == np.float32


def test_real_t2_and_adc_meet_on_one_grid(real_data: Path) -> None:
    folder = real_data / "prostatex_mpmri" / "ProstateX-0000" / "nifti"
    t2, adc = folder / "4_t2_tse_tra.nii.gz", folder / "7_ep2d_diff_tra_DYNDIST_ADC.nii.gz"
    case = Case("X", "X", {"ax_t2wi": Sequence("ax_t2wi", t2), "ax_adc": Sequence("ax_adc", adc)})
    prepared = prepare_case(case, ("ax_t2wi", "ax_adc"), PreprocessConfig())
    assert prepared.images_SZYX.dtype == np.int16
    reference, moving = sitk.ReadImage(str(t2)), sitk.ReadImage(str(adc), sitk.sitkFloat32)
    theirs = sitk.Resample(moving, reference, sitk.Transform(), sitk.sitkLinear, 0.0)
    back = prepared.restore.restore(prepared.images_SZYX[1])
    assert np.abs(back.array - sitk.GetArrayFromImage(theirs)).max() < 0.55  # rounded; ITK reads the qform
    np.testing.assert_array_equal(prepared.restore.restore(prepared.images_SZYX[0]).array, read_volume(t2).array)


def picture_case(path: Path) -> Case:
    return Case(path.stem, path.stem, {"image": Sequence("image", path)})


def test_8_bit_pictures_are_scaled_by_their_type(tmp_path: Path) -> None:
    colours = RNG.integers(10, 90, (12, 17, 3)).astype(np.uint8)
    Image.fromarray(colours).save(tmp_path / "a.png")
    picture = prepare_picture(picture_case(tmp_path / "a.png"), PreprocessConfig())
    np.testing.assert_array_equal(picture.image_CHW, colours.transpose(2, 0, 1))
    assert (picture.low, picture.high) == (0.0, 255.0)


def test_16_bit_pictures_keep_their_depth_and_are_scaled_by_percentiles(tmp_path: Path) -> None:
    grey = RNG.integers(300, 5000, (40, 50)).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    picture = prepare_picture(picture_case(tmp_path / "a.png"), PreprocessConfig())
    np.testing.assert_array_equal(picture.image_CHW, grey[None])
    np.testing.assert_allclose([picture.low, picture.high], np.percentile(grey, [1, 99]))


def test_large_pictures_are_reduced_without_aliasing(tmp_path: Path) -> None:
    stripes = np.zeros((120, 200), np.uint8)
    stripes[:, ::2] = 200  # finer than the reduced grid can show: must become an even grey
    Image.fromarray(stripes).save(tmp_path / "a.png")
    picture = prepare_picture(picture_case(tmp_path / "a.png"), PreprocessConfig(picture_side=30))
    assert picture.image_CHW.shape == (1, 30, 50)
    assert picture.image_CHW.dtype == np.uint8
    assert np.abs(picture.image_CHW[0, :, 3:-3].astype(int) - 100).max() <= 8
    whole = prepare_picture(picture_case(tmp_path / "a.png"), PreprocessConfig(picture_side=None))
    assert whole.image_CHW.shape == (1, 120, 200)


def test_constant_and_damaged_pictures_are_named(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 9, np.uint8)).save(tmp_path / "flat.png")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    for name, code in (("flat", "volume_constant"), ("bad", "image_unreadable"), ("gone", "file_missing")):
        with pytest.raises(DataError) as caught:
            prepare_picture(picture_case(tmp_path / f"{name}.png"), PreprocessConfig())
        assert caught.value.code == code
        assert f"case {name}" in caught.value.where
        assert f"{name}.png" in caught.value.where


@pytest.mark.parametrize(
    "values",
    [{"percentiles": (99, 1)}, {"adc_range": (5, 5)}, {"resample_mm": (0, 1, 1)}, {"orientation": "SRA"}],
)
def test_senseless_settings_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        PreprocessConfig.model_validate(values)


# --- windows in HU ---------------------------------------------------------------------------------------------------


def test_a_window_in_hu_is_the_same_for_every_slice_and_clips_padding() -> None:
    volume = np.random.default_rng(0).integers(-900, 900, (4, 6, 5)).astype(np.int16)
    volume[0, 0], volume[1, 0], volume[2, 0] = -1024, -2000, -3024
    low, high = sequence_limits("ct", volume, 0, PreprocessConfig(window_hu=(-1000, 1000)))
    np.testing.assert_array_equal(low, [-1000] * 4)
    np.testing.assert_array_equal(high, [1000] * 4)
    scaled = scale_to_unit(volume, low, high)  # slices stand for sequences here
    assert (scaled[:3, 0] == 0).all()
    np.testing.assert_allclose(scaled[3], (volume[3].astype(float) + 1000) / 2000, atol=1e-6)


def test_slices_without_content_have_no_range() -> None:
    volume = np.random.default_rng(0).integers(-900, 900, (3, 6, 5)).astype(np.int16)
    volume[0] = 0  # padding in the middle of the window
    volume[1] = np.random.default_rng(1).integers(-3024, -1000, (6, 5))  # air alone
    low, high = sequence_limits("ct", volume, 0, PreprocessConfig(window_hu=(-1000, 1000)))
    assert (high > low).tolist() == [False, False, True]
    for axis in (1, 2):
        low, high = sequence_limits("ct", volume, axis, PreprocessConfig(window_hu=(-1000, 1000)))
        assert len(low) == volume.shape[axis]
        assert (high > low).all()


def test_a_window_counts_for_the_sequences_that_are_named() -> None:
    volume = np.random.default_rng(0).integers(0, 900, (3, 6, 5)).astype(np.int16)

    def top(name: str, **values: object) -> float:
        config = PreprocessConfig.model_validate({"window_hu": [-100, 200], **values})
        return float(sequence_limits(name, volume, 0, config)[1][0])

    percentile = float(np.percentile(volume[0], 99))
    assert top("ct") == top("pet") == top("ax_adc") == 200
    assert top("ct", window_sequences=["ct"]) == 200
    assert top("pet", window_sequences=["ct"]) == pytest.approx(percentile)
    assert top("ax_adc", adc_scale="fixed") == 3000
    assert top("ax_adc", adc_scale="fixed", window_sequences=["ax_adc"]) == 200
    assert top("ct", window_sequences=[]) == pytest.approx(percentile)
    with pytest.raises(ValueError, match="below the upper"):
        PreprocessConfig(window_hu=(100, 100))


def test_a_file_of_four_axes_is_read_once_for_all_its_sequences(
    tmp_path: Path, ball: Volume, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medssl_cli.data import preprocess

    write_volume(tmp_path / "a.nii.gz", Volume(np.stack([ball.array, ball.array + 5]), ball.affine))
    read: list[Path] = []

    def counting(path: Path) -> Volume:
        read.append(path)
        return read_volume(path)

    monkeypatch.setattr(preprocess, "read_volume", counting)
    sequences = {name: Sequence(name, tmp_path / "a.nii.gz", volume_index=i) for i, name in enumerate("ab")}
    prepared = prepare_case(Case("x", "x", sequences), ("a", "b"), PreprocessConfig())
    assert len(read) == 1
    np.testing.assert_array_equal(prepared.images_SZYX[1], prepared.images_SZYX[0] + 5)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_reading_takes_little_more_than_two_volumes(tmp_path: Path, dtype: type) -> None:
    voxels = (np.arange(64 * 320 * 320) % 1500 - 500).reshape(64, 320, 320).astype(dtype)
    path = tmp_path / "ct.nii"
    write_volume(path, Volume(voxels, np.diag([-0.8, -0.8, 1.5, 1.0])))
    case = Case("a", "a", sequences={"ct": Sequence("ct", path)})
    tracemalloc.start()
    try:
        prepared = prepare_case(case, ("ct",), PreprocessConfig())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(prepared.images_SZYX[0], voxels[:, ::-1, ::-1])  # RAS, in the smallest type
    assert prepared.images_SZYX.dtype == np.int16
    assert peak < 2.15 * voxels.nbytes + 6e6  # the file with its voxels, or these and the turned ones; samples of grids
