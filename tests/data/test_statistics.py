"""Means and deviations equal numpy's over all pixels at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medssl_cli.core.case import Case, Sequence
from medssl_cli.core.volume import Volume
from medssl_cli.data.images import read_image, write_volume
from medssl_cli.data.preprocess import PreprocessConfig
from medssl_cli.data.statistics import Moments, picture_moments, volume_moments

CONFIG = PreprocessConfig()


def test_sums_of_parts_equal_numpy_over_all() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.random((3, n)).astype(np.float32) for n in (1, 50, 1000)]
    joined = np.concatenate(parts, axis=1).astype(np.float64)
    moments = sum((Moments.of(part) for part in parts[1:]), Moments.of(parts[0]))
    assert moments.count == 1051
    np.testing.assert_allclose(moments.mean_C, joined.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(moments.std_C, joined.std(axis=1), rtol=1e-10)


def test_a_constant_channel_has_no_deviation() -> None:
    moments = Moments.of(np.full((1, 1000), 0.1, np.float32))
    assert moments.std_C[0] == pytest.approx(0, abs=1e-8)
    np.testing.assert_array_equal(moments.repeated(3).mean_C, np.repeat(moments.mean_C, 3))


def test_a_grey_picture_of_sixteen_bits_is_scaled_by_its_percentiles() -> None:
    image = np.random.default_rng(1).integers(0, 60_000, (1, 40, 30)).astype(np.uint16)
    low, high = np.percentile(image, [1, 99])
    scaled = np.clip((image - low) / (high - low), 0, 1)
    moments = picture_moments(image, CONFIG)
    assert moments.mean_C[0] == pytest.approx(scaled.mean(), abs=1e-6)
    assert moments.std_C[0] == pytest.approx(scaled.std(), abs=1e-6)


def test_real_fundus_pictures_equal_numpy(real_data: Path) -> None:
    paths = sorted((real_data / "fundus_dr_grading/images").glob("*.jpg"))[:3]
    images = [read_image(path) for path in paths]
    joined = np.concatenate([image.reshape(3, -1) for image in images], axis=1) / 255.0
    moments = sum((picture_moments(image, CONFIG) for image in images[1:]), picture_moments(images[0], CONFIG))
    np.testing.assert_allclose(moments.mean_C, joined.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(moments.std_C, joined.std(axis=1), rtol=1e-6)


@pytest.fixture
def ct(tmp_path: Path) -> Case:
    """Four slices of noise and one of padding alone."""
    array = np.random.default_rng(2).integers(-1000, 1500, (5, 20, 22)).astype(np.int16)
    array[4] = -2000
    write_volume(tmp_path / "ct.nii.gz", Volume(array, np.eye(4)))
    return Case("P", "P", {"ct": Sequence("ct", tmp_path / "ct.nii.gz")})


def test_volumes_by_sequence_over_the_slices_with_content(ct: Case) -> None:
    array = np.random.default_rng(2).integers(-1000, 1500, (5, 20, 22))[:4].astype(float)
    by_slice = []
    for plane in array:
        low, high = np.percentile(plane, [1, 99])
        by_slice.append(np.clip((plane - low) / (high - low), 0, 1))
    found = volume_moments(ct, ("ct", "pet"), CONFIG)
    assert list(found) == ["ct"]
    assert found["ct"].count == 4 * 20 * 22
    assert found["ct"].mean_C[0] == pytest.approx(np.mean(by_slice), abs=1e-6)
    assert found["ct"].std_C[0] == pytest.approx(np.std(by_slice), abs=1e-6)


def test_volumes_by_window(ct: Case) -> None:
    array = np.random.default_rng(2).integers(-1000, 1500, (5, 20, 22))[:4].astype(float)
    windows = [(0.0, 80.0), (-800.0, 2000.0)]
    found = volume_moments(ct, ("ct",), CONFIG, windows)
    for number, (low, high) in enumerate(windows):
        scaled = np.clip((array - low) / (high - low), 0, 1)
        assert found[str(number)].mean_C[0] == pytest.approx(scaled.mean(), abs=1e-6)
        assert found[str(number)].std_C[0] == pytest.approx(scaled.std(), abs=1e-6)
    one = volume_moments(ct, ("ct",), PreprocessConfig(window_hu=(-800, 2000)))["ct"]
    assert one.mean_C[0] == pytest.approx(found["1"].mean_C[0], abs=1e-9)
