"""A label map as an RT Structure Set: closed contours on the slices of the series that it was made from.

Contours run half-way between voxel centres inside and outside (marching squares), so that a reader who asks which
centres lie inside gets the voxels back, every one. Holes are contours of their own. A region with holes says so by the
type CLOSEDPLANAR_XOR; any other has plain CLOSED_PLANAR contours, which every reader knows.

Letters: F frames (instances of the source series), R rows, C columns, P points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medssl_cli.core.run import package_version
from medssl_cli.core.volume import Volume
from medssl_cli.services.dicom_export import NOTE, SourceSeries, dicom_identity, quiet_writing, save_dicom

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")
_STUDY = ("StudyInstanceUID", "StudyDate", "StudyTime", "ReferringPhysicianName", "StudyID", "AccessionNumber")
_DETACHED_STUDY = "1.2.840.10008.3.1.2.3.1"
_NUMBER = 4
"""Place of this object behind the source series, after map, capture and segmentation."""


def write_rtstruct(
    path: Path,
    labels: Volume,
    series: SourceSeries,
    names: Mapping[int, str],
    *,
    colours: Mapping[int, tuple[int, int, int]],
    algorithm: str,
    description: str,
) -> None:
    """Write the contours of a label map.

    Args:
        path: ``.dcm`` file.
        labels: Whole numbers on the grid of the series, 0 is background.
        series: From ``dicom_export.source_series``.
        names: Of the labels that count; others are background. A label without a voxel becomes a region without
            contours, so that "looked for and not found" is told.
        colours: RGB of each label.
        algorithm: Name of what made it.
        description: Of the series.
    """
    labels_FRC = series.frames(labels.array)
    with quiet_writing():
        made = _empty(series, labels_FRC, algorithm, description, names)
        made.ReferencedFrameOfReferenceSequence = [_frame_of_reference(series)]
        regions = list(enumerate(names.items(), start=1))
        made.StructureSetROISequence = [_region(series, number, name, algorithm) for number, (_, name) in regions]
        made.ROIContourSequence = [
            _contours(series, number, labels_FRC == label, colours[label]) for number, (label, _) in regions
        ]
        made.RTROIObservationsSequence = [_observation(number) for number, _ in regions]
        save_dicom(path, made)


def outlines(mask_RC: np.ndarray) -> list[np.ndarray]:
    """Closed lines around a mask, each (P, 2) of (column, row) in pixels, the first point not repeated."""
    from contourpy import contour_generator

    if not mask_RC.any():
        return []
    padded = np.pad(mask_RC.astype(np.float64), 1)  # so that every line closes
    lines: Sequence[np.ndarray] = contour_generator(z=padded, corner_mask=False).lines(0.5)  # type: ignore[assignment]
    return [np.asarray(line)[:-1] - 1.0 for line in lines]


# --- parts of the object ---------------------------------------------------------------------------------------------


def _empty(
    series: SourceSeries, labels_FRC: np.ndarray, algorithm: str, description: str, names: Mapping[int, str]
) -> Dataset:
    """Everything but the regions. Dates stay empty: the same result is the same object, whenever it is written."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage

    source = series.headers[0]
    identity = dicom_identity(series, _NUMBER, "structure set", labels_FRC, algorithm, description, *names.values())
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.MediaStorageSOPClassUID = RTStructureSetStorage
    made.file_meta.MediaStorageSOPInstanceUID = identity["sop_instance_uid"]
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SpecificCharacterSet = getattr(source, "SpecificCharacterSet", None) or "ISO_IR 192"
    for keyword in (*_PATIENT, *_STUDY):
        setattr(made, keyword, getattr(source, keyword, ""))
    made.SOPClassUID, made.SOPInstanceUID = RTStructureSetStorage, identity["sop_instance_uid"]
    made.Modality = "RTSTRUCT"
    made.SeriesInstanceUID, made.SeriesNumber = identity["series_instance_uid"], identity["series_number"]
    made.SeriesDescription = f"{description} ({NOTE})"[:64]
    made.InstanceNumber = 1
    made.OperatorsName = ""
    made.Manufacturer, made.ManufacturerModelName = identity["manufacturer"], identity["manufacturer_model_name"]
    made.SoftwareVersions = package_version()
    made.FrameOfReferenceUID = source.FrameOfReferenceUID
    made.PositionReferenceIndicator = getattr(source, "PositionReferenceIndicator", "")
    made.StructureSetLabel = "MEDSSL"
    made.StructureSetName = description[:64]
    made.StructureSetDescription = f"{algorithm}. {NOTE}"
    made.StructureSetDate = made.StructureSetTime = ""
    made.ApprovalStatus = "UNAPPROVED"
    return made


def _frame_of_reference(series: SourceSeries) -> Dataset:
    from pydicom.dataset import Dataset

    source = series.headers[0]
    of_series, of_study, frame = Dataset(), Dataset(), Dataset()
    of_series.SeriesInstanceUID = source.SeriesInstanceUID
    of_series.ContourImageSequence = [_image(header) for header in series.headers]
    of_study.ReferencedSOPClassUID = _DETACHED_STUDY
    of_study.ReferencedSOPInstanceUID = source.StudyInstanceUID
    of_study.RTReferencedSeriesSequence = [of_series]
    frame.FrameOfReferenceUID = source.FrameOfReferenceUID
    frame.RTReferencedStudySequence = [of_study]
    return frame


def _image(header: Dataset) -> Dataset:
    from pydicom.dataset import Dataset

    image = Dataset()
    image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
    return image


def _region(series: SourceSeries, number: int, name: str, algorithm: str) -> Dataset:
    from pydicom.dataset import Dataset

    region = Dataset()
    region.ROINumber = number
    region.ReferencedFrameOfReferenceUID = series.headers[0].FrameOfReferenceUID
    region.ROIName = name[:64]
    region.ROIGenerationAlgorithm = "AUTOMATIC"
    region.ROIGenerationDescription = f"{algorithm}. {NOTE}"[:64]
    return region


def _observation(number: int) -> Dataset:
    from pydicom.dataset import Dataset

    observation = Dataset()
    observation.ObservationNumber = observation.ReferencedROINumber = number
    observation.RTROIInterpretedType = observation.ROIInterpreter = ""
    return observation


def _contours(series: SourceSeries, number: int, mask_FRC: np.ndarray, colour: tuple[int, int, int]) -> Dataset:
    from pydicom.dataset import Dataset

    lines_F = [outlines(mask_RC) for mask_RC in mask_FRC]
    kind = "CLOSEDPLANAR_XOR" if any(_has_hole(lines) for lines in lines_F) else "CLOSED_PLANAR"
    contours: list[Dataset] = []
    for header, lines in zip(series.headers, lines_F, strict=True):
        for line_P2 in lines:
            contour = Dataset()
            contour.ContourImageSequence = [_image(header)]
            contour.ContourGeometricType = kind
            contour.NumberOfContourPoints = len(line_P2)
            contour.ContourData = [f"{value:.4f}" for value in _in_patient(header, line_P2).ravel()]
            contour.ContourNumber = len(contours) + 1
            contours.append(contour)
    region = Dataset()
    region.ROIDisplayColor = list(colour)
    region.ReferencedROINumber = number
    if contours:
        region.ContourSequence = contours
    return region


def _has_hole(lines: Sequence[np.ndarray]) -> bool:
    """Whether some line runs the other way round: marching squares keeps the region on one side of it."""
    return len({_signed_area(line) > 0 for line in lines}) > 1


def _signed_area(line_P2: np.ndarray) -> float:
    x, y = line_P2.T
    return float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2)


def _in_patient(header: Dataset, line_P2: np.ndarray) -> np.ndarray:
    """(P, 3) in mm of the patient's system (LPS), by the equation of C.7.6.2.1.1."""
    position, cosines, spacing = (
        np.array([float(value) for value in getattr(header, keyword)])
        for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
    )
    across, down = cosines[:3] * spacing[1], cosines[3:] * spacing[0]
    found: Any = position + line_P2[:, :1] * across + line_P2[:, 1:] * down
    return found
