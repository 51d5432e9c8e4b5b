"""Grouping and reading of DICOM files, and every gate before and after the converter."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from medssl_cli.core.errors import DataError
from medssl_cli.core.volume import Volume
from medssl_cli.data import diffusion
from medssl_cli.data.dicom import SeriesFacts, read_series, scan
from medssl_cli.data.dicom_engines import ENGINES, convert_files
from medssl_cli.data.dicom_gates import SeriesGeometry, check_converted, check_series

Writer = Callable[..., Volume]

_TURN = np.radians(20)
_TIP = np.radians(-23)
OBLIQUE = tuple(
    round(float(v), 9)
    for v in (
        np.cos(_TURN),
        np.sin(_TURN),
        0,
        -np.sin(_TURN) * np.cos(_TIP),
        np.cos(_TURN) * np.cos(_TIP),
        np.sin(_TIP),
    )
)
"""Axes of an axial stack turned by 20 degrees and tipped by 23."""


def facts_of(folder: Path) -> SeriesFacts:
    found = scan(folder)
    assert len(found.series) == 1, found
    return read_series(folder, found.series[0])


def refusal(folder: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        check_series(facts_of(folder))
    return caught.value


def expected_grid(geometry: SeriesGeometry) -> tuple[tuple[int, ...], np.ndarray]:
    volume = Volume(np.zeros(geometry.shape, np.uint8), geometry.affine).reoriented("RAS")
    return volume.shape, volume.affine


# --- scan ------------------------------------------------------------------------------------------------------------


def test_files_without_suffix_are_found_and_others_are_counted(tmp_path: Path, write_dicom: Writer) -> None:
    write_dicom(tmp_path / "deep" / "er")
    for path in sorted((tmp_path / "deep" / "er").iterdir()):
        path.rename(path.with_suffix(""))
    (tmp_path / "deep" / "notes.txt").write_text("not an image, but long enough to hold a preamble" * 10)
    (tmp_path / "deep" / "er" / "Thumbs.db").write_bytes(bytes(range(256)) * 3)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.dcm").write_bytes(b"")
    found = scan(tmp_path)
    assert (found.n_files, found.n_other, found.damaged) == (8, 2, [])
    assert [len(s.paths) for s in found.series] == [6]
    assert found.series[0].description == "t2_tse_tra"


def test_r10_two_series_with_one_number_stay_apart(tmp_path: Path, write_dicom: Writer) -> None:
    write_dicom(tmp_path, name="a", SeriesInstanceUID="1.2.9")
    write_dicom(tmp_path, name="b", SeriesInstanceUID="1.2.10", seed=1)
    found = scan(tmp_path)
    assert sorted(s.series_uid for s in found.series) == ["1.2.10", "1.2.9"]
    assert {s.number for s in found.series} == {"5"}


def test_reports_and_directories_are_no_images(tmp_path: Path, write_dicom: Writer) -> None:
    write_dicom(tmp_path / "s")
    write_dicom(
        tmp_path / "r",
        n_slices=1,
        SOPClassUID="1.2.840.10008.5.1.4.1.1.88.22",
        PixelData=None,
        Rows=None,
        SeriesInstanceUID="1.2.7",
    )
    found = scan(tmp_path)
    assert (found.n_other, len(found.series)) == (1, 1)


def test_links_in_a_circle_end(tmp_path: Path, write_dicom: Writer) -> None:
    write_dicom(tmp_path / "s")
    (tmp_path / "s" / "again").symlink_to(tmp_path)
    assert scan(tmp_path).n_files == 6


def test_file_without_preamble_is_read(tmp_path: Path, write_dicom: Writer) -> None:
    volume = write_dicom(tmp_path / "s")
    for path in (tmp_path / "s").iterdir():
        image = pydicom.dcmread(path)
        bare = Dataset()
        bare.update({e.tag: e for e in image})
        bare.save_as(path, implicit_vr=True, little_endian=True)
        assert path.read_bytes()[:2] == b"\x08\0"
    geometry = check_series(facts_of(tmp_path))
    assert geometry.shape == volume.shape


# --- a good series ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("orientation", "plane"),
    [
        ((1, 0, 0, 0, 1, 0), "axial"),
        ((1, 0, 0, 0, 0, -1), "coronal"),
        ((0, 1, 0, 0, 0, -1), "sagittal"),
        (OBLIQUE, "axial"),
    ],
)
def test_geometry_is_that_of_the_tags(tmp_path: Path, write_dicom: Writer, orientation: Any, plane: str) -> None:
    volume = write_dicom(tmp_path, orientation=orientation, per_slice=lambda k: {"InstanceNumber": 20 - k})
    facts = facts_of(tmp_path)
    geometry = check_series(facts)
    assert facts.plane == plane
    shape, affine = expected_grid(geometry)
    reference = volume.reoriented("RAS")
    assert shape == reference.shape
    np.testing.assert_allclose(affine, reference.affine, atol=1e-4)
    assert geometry.spacing == pytest.approx((3.0, 0.8, 0.7), abs=1e-4)


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 1, 0), OBLIQUE])
def test_engines_agree_with_the_tags_voxel_by_voxel(
    tmp_path: Path, write_dicom: Writer, engine: str, orientation: Any
) -> None:
    written = write_dicom(tmp_path / "s", orientation=orientation, RescaleSlope=2, RescaleIntercept=-100)
    facts = facts_of(tmp_path / "s")
    geometry = check_series(facts)
    files = [facts.files[i].path for i in geometry.volumes[0].files]
    result = convert_files(engine, files, tmp_path / "work")
    check_converted(result.volume, geometry, engine)
    given, expected = result.volume.reoriented("RAS"), written.reoriented("RAS")
    np.testing.assert_array_equal(given.array, expected.array.astype(float) * 2 - 100)
    np.testing.assert_allclose(given.affine, expected.affine, atol=1e-3)


def test_after_gate_refuses_another_grid(tmp_path: Path, write_dicom: Writer) -> None:
    written = write_dicom(tmp_path / "s")
    geometry = check_series(facts_of(tmp_path / "s"))
    check_converted(written, geometry, "ours")
    shifted = written.affine.copy()
    shifted[2, 3] += 3.0
    squeezed = written.affine.copy()
    squeezed[2, 2] *= 6 / 5
    flipped = written.affine @ np.diag([-1.0, 1, 1, 1])
    for array, affine, word in (
        (written.array, shifted, "position"),
        (written.array, squeezed, "spacing"),
        (written.array[1:], written.affine, "shape"),
        (written.array, flipped, "position"),
    ):
        with pytest.raises(DataError, match="not the one") as caught:
            check_converted(Volume(array, affine), geometry, "ours")
        assert word in caught.value.where
        assert caught.value.code == "dicom_engine_disagrees"


# --- R10: faults -----------------------------------------------------------------------------------------------------


def test_r10_missing_slice(tmp_path: Path, write_dicom: Writer) -> None:
    write_dicom(tmp_path)
    (tmp_path / "im003.dcm").unlink()
    error = refusal(tmp_path)
    assert error.code == "dicom_uneven_slices"
    assert "from 3.00 to 6.00 mm" in error.where


def test_r10_second_slice_missing_near_the_end(tmp_path: Path, write_dicom: Writer) -> None:
    write_dicom(tmp_path, n_slices=40, size=(4, 4))
    (tmp_path / "im039.dcm").unlink()
    assert refusal(tmp_path).code == "dicom_uneven_slices"


def test_r10_every_second_slice_missing(tmp_path: Path, write_dicom: Writer) -> None:
    write_dicom(tmp_path, SpacingBetweenSlices=3.0)
    for k in (2, 4, 6):
        (tmp_path / f"im{k:03d}.dcm").unlink()
    error = refusal(tmp_path)
    assert error.code == "dicom_slices_missing"
    assert "6.00 mm apart" in error.where


def test_gap_that_counts_between_edges_is_no_missing_slice(tmp_path: Path, write_dicom: Writer) -> None:
    write_dicom(tmp_path, spacing=(3.0, 1.0, 1.0), SliceThickness=2.0, SpacingBetweenSlices=1.0)
    assert check_series(facts_of(tmp_path)).shape[0] == 6


def test_rounded_positions_are_no_gap(tmp_path: Path, write_dicom: Writer) -> None:
    write_dicom(
        tmp_path, spacing=(1.25, 1.0, 1.0), per_slice=lambda k: {"ImagePositionPatient": [-3, 5, round(1.25 * k, 1)]}
    )
    assert check_series(facts_of(tmp_path)).shape[0] == 6


def test_r10_duplicate_position(tmp_path: Path, write_dicom: Writer) -> None:
    write_dicom(tmp_path)
    shutil.copy(tmp_path / "im003.dcm", tmp_path / "im003_copy.dcm")
    error = refusal(tmp_path)
    assert error.code == "dicom_duplicate_position"
    assert "im003.dcm and im003_copy.dcm at -4.00 mm" in error.where


def test_r10_whole_series_twice_under_other_uids(tmp_path: Path, write_dicom: Writer) -> None:
    write_dicom(tmp_path, name="a", SeriesInstanceUID="1.2.9")
    write_dicom(tmp_path, name="b", SeriesInstanceUID="1.2.9", first_instance=7)
    assert refusal(tmp_path).code == "dicom_duplicate_position"


@pytest.mark.parametrize("keyword", ["SeriesInstanceUID", "StudyInstanceUID", "PatientID"])
def test_r10_last_slice_without_identity_is_missed(tmp_path: Path, write_dicom: Writer, keyword: str) -> None:
    write_dicom(tmp_path, per_slice=lambda k: {keyword: None if k == 5 else "1.2.3", "SOPInstanceUID": f"1.2.{k + 1}"})
    found = scan(tmp_path)
    assert sorted(len(s.paths) for s in found.series) == [1, 5]
    for series in found.series:
        with pytest.raises(DataError):
            check_series(read_series(tmp_path, series))


@pytest.mark.parametrize("cut", [2, 60, 200, 1000])
def test_r10_truncated_file(tmp_path: Path, write_dicom: Writer, cut: int) -> None:
    write_dicom(tmp_path)
    last = tmp_path / "im006.dcm"
    data = last.read_bytes()
    last.write_bytes(data[: max(len(data) - cut, 140)])
    error = refusal(tmp_path)
    assert error.code in {"dicom_truncated", "dicom_damaged_neighbour"}
    assert "im006.dcm" in error.where


@pytest.mark.parametrize("content", [b"", b"\0" * 100])
def test_r10_emptied_file(tmp_path: Path, write_dicom: Writer, content: bytes) -> None:
    write_dicom(tmp_path)
    (tmp_path / "im006.dcm").write_bytes(content)
    error = refusal(tmp_path)
    assert error.code == "dicom_damaged_neighbour"
    assert "im006.dcm" in error.where


def test_r10_truncated_compressed_file(tmp_path: Path, write_dicom: Writer) -> None:
    write_dicom(tmp_path)
    for path in tmp_path.iterdir():
        image = pydicom.dcmread(path)
        image.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
        image.save_as(path)
    assert check_series(facts_of(tmp_path)).shape[0] == 6
    last = tmp_path / "im006.dcm"
    last.write_bytes(last.read_bytes()[:-20])
    error = refusal(tmp_path)
    assert error.code == "dicom_truncated"
    assert "compressed pixels" in error.where


def test_r10_mixed_orientation(tmp_path: Path, write_dicom: Writer) -> None:
    write_dicom(tmp_path, per_slice=lambda k: {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]} if k > 3 else {})
    error = refusal(tmp_path)
    assert error.code == "dicom_mixed_orientation"
    assert "2 of 6 differ" in error.where


def test_r10_mixed_sizes_and_spacing(tmp_path: Path, write_dicom: Writer) -> None:
    write_dicom(tmp_path, per_slice=lambda k: {"PixelSpacing": [0.8, 0.9]} if k == 5 else {})
    error = refusal(tmp_path)
    assert error.code == "dicom_mixed_grid"
    assert "0.9 x 0.8 mm" in error.where


@pytest.mark.parametrize(
    "keyword",
    ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "StudyInstanceUID"],
)
def test_r10_missing_tag(tmp_path: Path, write_dicom: Writer, keyword: str) -> None:
    write_dicom(tmp_path, per_slice=lambda k: {keyword: None} if k == 2 else {})
    found = scan(tmp_path)
    assert sum(len(s.paths) for s in found.series) == 6
    refused = []
    for series in found.series:
        with pytest.raises(DataError) as caught:
            check_series(read_series(tmp_path, series))
        refused.append((caught.value.code, caught.value.where))
    assert any(keyword in where for _, where in refused), refused


def test_r10_series_without_uid_is_refused(tmp_path: Path, write_dicom: Writer) -> None:
    write_dicom(tmp_path, SeriesInstanceUID=None, per_slice=lambda k: {"SOPInstanceUID": f"1.2.{k + 1}"})
    error = refusal(tmp_path)
    assert (error.code, "SeriesInstanceUID is missing" in error.where) == ("dicom_missing_tag", True)


def test_r10_unusable_numbers(tmp_path: Path, write_dicom: Writer) -> None:
    write_dicom(tmp_path)
    path = tmp_path / "im002.dcm"
    path.write_bytes(path.read_bytes().replace(b"0.8\\0.7 ", b"0.8\\abc "))
    assert refusal(tmp_path).code == "dicom_missing_tag"


def test_r10_gantry_tilt(tmp_path: Path, write_dicom: Writer) -> None:
    c, s = np.cos(np.radians(14)), np.sin(np.radians(14))
    write_dicom(
        tmp_path,
        Modality="CT",
        SOPClassUID="1.2.840.10008.5.1.4.1.1.2",
        ImageOrientationPatient=[1, 0, 0, 0, round(c, 8), round(-s, 8)],
        per_slice=lambda k: {"ImagePositionPatient": [-3, 5, 3.0 * k]},
    )
    error = refusal(tmp_path)
    assert error.code == "dicom_gantry_tilt"
    assert "14.0 degrees" in error.where


def test_r10_gantry_tilt_in_the_tag_alone(tmp_path: Path, write_dicom: Writer) -> None:
    write_dicom(tmp_path, Modality="CT", SOPClassUID="1.2.840.10008.5.1.4.1.1.2", GantryDetectorTilt=12.5)
    error = refusal(tmp_path)
    assert (error.code, "12.5" in error.where) == ("dicom_gantry_tilt", True)


def test_r10_colour_images(tmp_path: Path, write_dicom: Writer) -> None:
    write_dicom(
        tmp_path, SamplesPerPixel=3, PhotometricInterpretation="RGB", PixelData=b"\0" * 480, PlanarConfiguration=0
    )
    assert refusal(tmp_path).code == "dicom_colour"


def test_r10_multi_frame_without_geometry(tmp_path: Path, write_dicom: Writer) -> None:
    write_dicom(tmp_path, n_slices=1, NumberOfFrames=4, PixelData=b"\0" * 640)
    error = refusal(tmp_path)
    assert (error.code, "functional groups" in error.where) == ("dicom_missing_tag", True)


def test_r10_one_slice_is_no_volume(tmp_path: Path, write_dicom: Writer) -> None:
    write_dicom(tmp_path, n_slices=1)
    assert refusal(tmp_path).code == "dicom_one_position"


# --- 4-D -------------------------------------------------------------------------------------------------------------


def four_d(folder: Path, write_dicom: Writer, tags: list[dict[str, Any]]) -> list[Volume]:
    return [
        write_dicom(folder, name=f"v{i}_", seed=i, first_instance=1 + 6 * i, SeriesInstanceUID="1.2.77", **extra)
        for i, extra in enumerate(tags)
    ]


@pytest.mark.parametrize(
    "tags",
    [
        [{"DiffusionBValue": 50.0}, {"DiffusionBValue": 800.0}],
        [{"TemporalPositionIdentifier": 1}, {"TemporalPositionIdentifier": 2}],
        [{"EchoNumbers": 1, "EchoTime": 10.0}, {"EchoNumbers": 2, "EchoTime": 20.0}],
        [{"ImageType": ["ORIGINAL", "PRIMARY", "M"]}, {"ImageType": ["ORIGINAL", "PRIMARY", "P"]}],
        [{"AcquisitionNumber": 1}, {"AcquisitionNumber": 2}],
        [{"TriggerTime": 10.0}, {"TriggerTime": 20.0}],
        [{"NumberOfTemporalPositions": 2}, {"NumberOfTemporalPositions": 2}],
    ],
    ids=lambda tags: next(iter(tags[0])),
)
def test_volumes_of_a_4d_series_are_told_apart(tmp_path: Path, write_dicom: Writer, tags: list[dict[str, Any]]) -> None:
    four_d(tmp_path, write_dicom, tags)
    facts = facts_of(tmp_path)
    geometry = check_series(facts)
    names = [[facts.files[i].name for i in v.files] for v in geometry.volumes]
    assert names == [[f"v{v}_{1 + 6 * v + k:03d}.dcm" for k in range(6)] for v in (0, 1)]


def test_r10_slice_missing_in_one_volume_of_two(tmp_path: Path, write_dicom: Writer) -> None:
    four_d(tmp_path, write_dicom, [{"DiffusionBValue": 50.0}, {"DiffusionBValue": 800.0}])
    (tmp_path / "v1_010.dcm").unlink()
    assert refusal(tmp_path).code == "dicom_duplicate_position"


def test_r10_half_of_each_volume_is_not_one_volume(tmp_path: Path, write_dicom: Writer) -> None:
    write_dicom(tmp_path, per_slice=lambda k: {"DiffusionBValue": 0.0 if k < 3 else 800.0})
    assert refusal(tmp_path).code == "dicom_mixed_contrast"


def enhanced(path: Path, write_dicom: Writer, b_values: list[float], *, seed: int = 3) -> list[np.ndarray]:
    """One enhanced MR file with the volumes of several b-values, made from a classic series."""
    volume = write_dicom(path.parent / "classic", seed=seed)
    image = pydicom.dcmread(path.parent / "classic" / "im001.dcm")
    shutil.rmtree(path.parent / "classic")
    rng = np.random.default_rng(seed)
    arrays = [rng.integers(0, 2000, volume.array.shape).astype(np.uint16) for _ in b_values]
    frames = []
    for v, b in enumerate(b_values):
        for k in range(6):
            frame = Dataset()
            position, orientation, measures, content, weighting = (Dataset() for _ in range(5))
            position.ImagePositionPatient = [-3.0, 5.0, -10.0 + 3 * k]
            orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
            measures.PixelSpacing, measures.SliceThickness, measures.SpacingBetweenSlices = [0.8, 0.7], 3.0, 3.0
            content.DimensionIndexValues, content.StackID, content.InStackPositionNumber = [1, k + 1, v + 1], "1", k + 1
            content.TemporalPositionIndex = v + 1
            weighting.DiffusionBValue, weighting.DiffusionDirectionality = b, "ISOTROPIC" if b else "NONE"
            frame.PlanePositionSequence, frame.PlaneOrientationSequence = Sequence([position]), Sequence([orientation])
            frame.PixelMeasuresSequence, frame.FrameContentSequence = Sequence([measures]), Sequence([content])
            frame.MRDiffusionSequence = Sequence([weighting])
            frames.append(frame)
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        del image[keyword]
    image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"
    image.NumberOfFrames = len(frames)
    image.SharedFunctionalGroupsSequence = Sequence([Dataset()])
    image.PerFrameFunctionalGroupsSequence = Sequence(frames)
    image.PixelData = np.concatenate(arrays).tobytes()
    image.save_as(path)
    return arrays


def test_r10_enhanced_multi_frame_is_placed_by_its_functional_groups(tmp_path: Path, write_dicom: Writer) -> None:
    (array,) = enhanced(tmp_path / "e.dcm", write_dicom, [0.0])
    facts = facts_of(tmp_path)
    geometry = check_series(facts)
    assert (geometry.shape, len(geometry.volumes)) == ((6, 8, 10), 1)
    result = convert_files("dcm2niix", [facts.files[0].path], tmp_path / "work")
    check_converted(result.volume, geometry, "dcm2niix")
    np.testing.assert_array_equal(result.volume.reoriented("LPS").array, array)


def test_r10_enhanced_frame_without_position(tmp_path: Path, write_dicom: Writer) -> None:
    enhanced(tmp_path / "e.dcm", write_dicom, [0.0])
    image = pydicom.dcmread(tmp_path / "e.dcm")
    del image.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence
    image.save_as(tmp_path / "e.dcm")
    assert refusal(tmp_path).code == "dicom_missing_tag"


def test_r10_enhanced_with_a_missing_frame(tmp_path: Path, write_dicom: Writer) -> None:
    enhanced(tmp_path / "e.dcm", write_dicom, [0.0, 800.0])
    image = pydicom.dcmread(tmp_path / "e.dcm")
    del image.PerFrameFunctionalGroupsSequence[3]
    image.NumberOfFrames = 11
    image.PixelData = image.PixelData[:-160]
    image.save_as(tmp_path / "e.dcm")
    assert refusal(tmp_path).code == "dicom_duplicate_position"


def test_b_values_of_enhanced_frames(tmp_path: Path, write_dicom: Writer) -> None:
    enhanced(tmp_path / "e.dcm", write_dicom, [0.0, 800.0])
    geometry = check_series(facts_of(tmp_path))
    assert [(v.b, v.direction) for v in geometry.volumes] == [(0.0, ""), (800.0, "isotropic")]


# --- diffusion -------------------------------------------------------------------------------------------------------


def private(group: int, creator: str, element: int, vr: str, value: Any, manufacturer: str = "") -> Dataset:
    header = Dataset()
    header.Manufacturer = manufacturer
    header.private_block(group, creator, create=True).add_new(element, vr, value)
    return header


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (private(0x0019, "SIEMENS MR HEADER", 0x0C, "IS", "1400"), 1400.0),
        (private(0x0019, "SIEMENS MR HEADER", 0x0C, "UN", b"50"), 50.0),
        (private(0x0019, "GEMS_ACQU_01", 0x0C, "IS", "7", "GE MEDICAL SYSTEMS"), None),
        (private(0x0043, "GEMS_PARM_01", 0x39, "IS", [1000000800, 8, 0, 0]), 800.0),
        (private(0x0043, "GEMS_PARM_01", 0x39, "IS", ["1000", "8", "0", "0"]), 1000.0),
        (private(0x2001, "Philips Imaging DD 001", 0x03, "FL", 1500.0), 1500.0),
        (private(0x2001, "Philips Imaging DD 001", 0x03, "UN", b"\x00\x80\xbb\x44"), 1500.0),
        (Dataset(), None),
    ],
)
def test_private_b_values(header: Dataset, expected: float | None) -> None:
    assert diffusion.b_value(header) == expected


def test_public_b_value_comes_before_private_ones() -> None:
    header = private(0x0019, "SIEMENS MR HEADER", 0x0C, "IS", "1400")
    header.DiffusionBValue = 1395.0
    assert diffusion.b_value(header) == 1395.0


@pytest.mark.parametrize(("name", "expected"), [("*ep_b50t", 50.0), ("*ep_b800#2", 800.0), ("*ep_b50_800", None)])
def test_b_value_of_a_siemens_sequence_name(name: str, expected: float | None) -> None:
    header = Dataset()
    header.SequenceName = name
    assert diffusion.b_value(header) == expected


def test_three_directions_become_their_geometric_mean() -> None:
    adc = np.array([0.5e-3, 1.0e-3, 2.1e-3])
    images = [np.full((2, 2, 2), 1000.0 * np.exp(-800 * d)) for d in adc]
    images[0][0, 0, 0] = 0.0
    mean, how = diffusion.combine_directions(images, ["1 0 0", "0 1 0", "0 0 1"])
    assert mean[1, 1, 1] == pytest.approx(1000.0 * np.exp(-800 * adc.mean()), rel=1e-6)
    assert mean[0, 0, 0] == 0.0
    assert "geometric mean of 3 directions" in how


def test_repetitions_are_averaged_and_a_trace_image_stands_alone() -> None:
    one, three = np.full((1, 1, 1), 1, np.int16), np.full((1, 1, 1), 3, np.int16)
    mean, how = diffusion.combine_directions([one, three], ["", ""])
    assert (mean[0, 0, 0], how) == (2.0, "arithmetic mean of 2 repetitions")
    trace, _ = diffusion.combine_directions([one, one, three], ["1 0 0", "0 1 0", diffusion.ISOTROPIC])
    assert trace is three


# --- R21 -------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255), st.integers(0, 3)), min_size=1, max_size=8))
def test_r21_damaged_headers_never_end_in_another_error(
    tmp_path: Path, write_dicom: Writer, edits: list[tuple[int, int, int]]
) -> None:
    folder = tmp_path / "fuzz"
    shutil.rmtree(folder, ignore_errors=True)
    write_dicom(folder, n_slices=3, size=(4, 4))
    data = bytearray((folder / "im002.dcm").read_bytes())
    for place, value, removed in edits:
        i = place % len(data)
        data[i : i + removed + (removed == 0)] = b"" if removed else bytes([value])
    (folder / "im002.dcm").write_bytes(data)
    for series in scan(folder, ["EchoTime", "StudyDescription"]).series:
        with contextlib.suppress(DataError):
            check_series(read_series(folder, series))
