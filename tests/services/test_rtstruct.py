"""Contours of a label map as an RT Structure Set, read back and filled again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from matplotlib.path import Path as Line
from scipy.ndimage import gaussian_filter

from medssl_cli.core.volume import Volume
from medssl_cli.data.dicom import read_header
from medssl_cli.services.dicom_export import SourceSeries
from medssl_cli.services.rtstruct import outlines, write_rtstruct

pytest.importorskip("highdicom")
WriteDicom = Callable[..., Volume]
OBLIQUE = (0.98480775, 0.17364818, 0, -0.16317591, 0.92541658, 0.34202014)
COLOURS = {1: (255, 0, 0), 2: (0, 90, 255)}


@pytest.fixture
def series(tmp_path: Path, write_dicom: WriteDicom) -> SourceSeries:
    write_dicom(tmp_path / "s", size=(32, 40), orientation=OBLIQUE, FrameOfReferenceUID="1.2.3.9")
    headers = [read_header(path) for path in sorted((tmp_path / "s").rglob("*.dcm"))]
    normal = np.cross(OBLIQUE[:3], OBLIQUE[3:])
    headers.sort(key=lambda header: float(np.dot(normal, np.array(header.ImagePositionPatient, float))))  # type: ignore[union-attr]
    places = np.array([(0, 0, z) for z in range(len(headers))])
    return SourceSeries(tuple(headers), places, np.array([1, 0, 0]), np.array([0, 1, 0]))  # type: ignore[arg-type]


def filled(lines: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Pixels whose centres lie inside an odd number of lines."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    centres = np.stack([columns.ravel(), rows.ravel()], 1)
    inside = sum((Line(line).contains_points(centres).astype(int) for line in lines), np.zeros(len(centres), int))
    return (inside % 2 == 1).reshape(shape)


def masks() -> np.ndarray:
    rng = np.random.default_rng(0)
    return gaussian_filter(rng.standard_normal((12, 32, 40)), (0, 1.2, 1.2)) > 0.05


def test_filling_the_outlines_gives_the_mask_back_with_holes_borders_and_single_pixels() -> None:
    for mask in masks():
        np.testing.assert_array_equal(filled(outlines(mask), mask.shape), mask)
    single = np.zeros((5, 6), bool)
    single[0, 5] = True
    np.testing.assert_array_equal(filled(outlines(single), single.shape), single)
    assert outlines(np.zeros((4, 4), bool)) == []


def labels_of(series: SourceSeries, masks_FRC: np.ndarray) -> Volume:
    labels = np.zeros((len(series.headers), 32, 40), np.uint8)
    labels[:] = masks_FRC[: len(labels)]
    return Volume(labels, np.eye(4))


def read(path: Path) -> Any:
    return pydicom.dcmread(path)


def test_contours_lie_where_the_voxels_are_in_the_patient(series: SourceSeries, tmp_path: Path) -> None:
    wanted = labels_of(series, masks())
    names = {1: "gland", 2: "lesion"}
    path = tmp_path / "x.dcm"
    write_rtstruct(path, wanted, series, names, colours=COLOURS, algorithm="unet", description="Prostate")
    found = read(path)
    assert (found.Modality, found.ApprovalStatus) == ("RTSTRUCT", "UNAPPROVED")
    assert [roi.ROIName for roi in found.StructureSetROISequence] == ["gland", "lesion"]
    gland, lesion = found.ROIContourSequence
    assert not hasattr(lesion, "ContourSequence")  # looked for, not found
    by_image: dict[str, list[np.ndarray]] = {}
    for contour in gland.ContourSequence:
        assert contour.ContourGeometricType == "CLOSEDPLANAR_XOR"
        points = np.array(contour.ContourData, float).reshape(-1, 3)
        assert len(points) == contour.NumberOfContourPoints
        by_image.setdefault(contour.ContourImageSequence[0].ReferencedSOPInstanceUID, []).append(points)
    for header, expected in zip(series.headers, wanted.array, strict=True):
        to_mm = np.eye(4)
        cosines, spacing = np.array(header.ImageOrientationPatient, float), np.array(header.PixelSpacing, float)
        to_mm[:3, 0], to_mm[:3, 1] = cosines[:3] * spacing[1], cosines[3:] * spacing[0]
        to_mm[:3, 2] = np.cross(cosines[:3], cosines[3:])
        to_mm[:3, 3] = np.array(header.ImagePositionPatient, float)
        pixels = [(np.linalg.inv(to_mm) @ np.c_[p, np.ones(len(p))].T).T for p in by_image[header.SOPInstanceUID]]
        assert max(np.abs(p[:, 2]).max() for p in pixels) < 1e-3  # in the plane of the slice
        np.testing.assert_array_equal(filled([p[:, :2] for p in pixels], (32, 40)), expected == 1)


def test_a_region_without_holes_has_contours_that_every_reader_knows(series: SourceSeries, tmp_path: Path) -> None:
    mask = np.zeros((12, 32, 40), bool)
    mask[:, 5:12, 8:20] = mask[:, 20:25, 8:20] = True
    path = tmp_path / "x.dcm"
    write_rtstruct(path, labels_of(series, mask), series, {1: "gland"}, colours=COLOURS, algorithm="a", description="d")
    kinds = {contour.ContourGeometricType for contour in read(path).ROIContourSequence[0].ContourSequence}
    assert kinds == {"CLOSED_PLANAR"}


def test_the_object_belongs_to_patient_study_and_frame_of_the_series_and_is_the_same_when_written_again(
    series: SourceSeries, tmp_path: Path
) -> None:
    wanted = labels_of(series, masks())
    for name in ("a.dcm", "b.dcm"):
        write_rtstruct(
            tmp_path / name, wanted, series, {1: "gland"}, colours=COLOURS, algorithm="unet", description="Prostate"
        )
    assert (tmp_path / "a.dcm").read_bytes() == (tmp_path / "b.dcm").read_bytes()
    found, source = read(tmp_path / "a.dcm"), series.headers[0]
    for keyword in ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert getattr(found, keyword) == getattr(source, keyword)
    assert found.SeriesInstanceUID != source.SeriesInstanceUID
    referenced = found.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    told = [image.ReferencedSOPInstanceUID for image in referenced.ContourImageSequence]
    assert told == [header.SOPInstanceUID for header in series.headers]
