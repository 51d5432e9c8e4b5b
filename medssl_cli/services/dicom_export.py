"""Results back to DICOM, on the geometry of the series that they were made from: maps, pictures, label maps.

A volume on the grid of a converted file is laid frame by frame onto the instances of the source series. The grids have
to be the same but for turned and flipped axes; nothing is interpolated, and a series that does not fit is refused.
Patient, study and frame of reference are those of the source. Identifiers of the new objects are a function of what is
in them, so that the same result written twice is one object to an archive.

Letters: F frames (instances of the source series), R rows, C columns, Z Y X voxels of a volume.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from medssl_cli.core.case import Case
from medssl_cli.core.errors import ConfigError, DataError, ResourceError
from medssl_cli.core.run import atomic_path, hide_home, package_version
from medssl_cli.core.volume import GRID_TOLERANCE_MM, Volume
from medssl_cli.data.dicom import DamagedFile, quiet_pydicom, read_header, walk
from medssl_cli.data.images import volume_stem

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

log = logging.getLogger(__name__)

FORMATS = ("pm", "sc", "seg")
"""Parametric map, secondary capture, segmentation."""
NOTE = "Research only; not a lesion outline"
MANUFACTURER = "medssl"
SERIES_OFFSET = 9000
"""Added to the number of the source series, so that new series stand behind it in lists."""
SCHEME = "99MEDSSL"
"""Coding scheme of what no public code says."""
Code = tuple[str, str, str]
"""(value, scheme, meaning)."""
Property = tuple[Code, Code]
"""Category and type of what a segment shows."""
HOT_REGION: Property = (
    ("309825002", "SCT", "Spatial and Relational Concept"),
    ("HOT-REGION", SCHEME, "Region of high values of a map"),
)
_LPS = np.diag([-1.0, -1.0, 1.0])  # DICOM counts to left and posterior, affines to right and anterior


# --- what was asked for ----------------------------------------------------------------------------------------------


def dicom_formats(text: str | None, *, heatmap: bool) -> tuple[str, ...]:
    """``pm,sc,seg`` as names.

    Raises:
        ConfigError: Another name, or no heat map that could be written.
        ResourceError: highdicom is not installed.
    """
    if text is None:
        return ()
    names = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",")))
    unknown = [name for name in names if name not in FORMATS]
    if "rtstruct" in unknown:
        raise ConfigError(
            "A heat map is not written as DICOM 'rtstruct': contours outline what a model segmented, and a heat map "
            "has no outline.",
            where=f"--dicom {text}",
            fix="name some of pm, sc, seg; or a segmentation network with --model",
            code="dicom_format_unknown",
        )
    if unknown:
        raise ConfigError(
            f"--dicom does not know {unknown[0]!r}.",
            where=f"--dicom {text}",
            fix="name some of pm (parametric map), sc (picture), seg (region), separated by commas",
            code="dicom_format_unknown",
        )
    if not heatmap:
        raise ConfigError(
            "--dicom writes the heat map, and none was asked for.",
            where=f"--dicom {text}",
            fix="add --heatmap",
            code="dicom_without_heatmap",
        )
    _highdicom()
    return names


def check_dicom_source(path: Path) -> None:
    """Refuse early what is no DICOM folder.

    Raises:
        ConfigError: A file, or a folder of NIfTI files.
    """
    reason = "it is a file" if path.is_file() else ""
    if path.is_dir() and any(volume_stem(inside) is not None for inside in path.rglob("*")):
        reason = "it holds NIfTI files, which keep neither patient nor series"
    if reason:
        raise ConfigError(
            "--dicom takes DICOM folders: the results belong to a series.",
            where=f"{hide_home(str(path))}: {reason}",
            fix="name the folder of DICOM files, or leave --dicom out",
            code="dicom_needs_dicom",
        )


def highdicom_is_there() -> None:
    """Refuse early where DICOM cannot be written.

    Raises:
        ResourceError: highdicom is not installed.
    """
    _highdicom()


def _highdicom() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its dependencies announce changes of their own
            import highdicom
    except ImportError as error:
        raise ResourceError(
            "Writing DICOM takes the package highdicom.",
            where=str(error),
            fix="pip install 'medssl[dicom]', or leave --dicom out",
            code="package_missing",
        ) from error
    return highdicom


# --- the source series -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceSeries:
    """Instances that stand for the planes of a volume.

    Args:
        headers: F headers without pixels, sorted along the normal of the planes.
        places_F3: Voxel (x, y, z) of the first pixel of each instance.
        column_step, row_step: Voxels (x, y, z) from one column, and from one row, to the next.
    """

    headers: tuple[Dataset, ...]
    places_F3: np.ndarray
    column_step: np.ndarray
    row_step: np.ndarray

    def frames(self, array_ZYX: np.ndarray) -> np.ndarray:
        """(Z, Y, X) -> (F, R, C): the voxels as the instances show them, none of them changed."""
        rows, columns = int(self.headers[0].Rows), int(self.headers[0].Columns)
        down_RC1, across_RC1 = np.mgrid[:rows, :columns][..., None]
        inside_RC3 = across_RC1 * self.column_step + down_RC1 * self.row_step
        frames = np.empty((len(self.headers), rows, columns), array_ZYX.dtype)
        for frame, place in zip(frames, self.places_F3, strict=True):
            x, y, z = np.moveaxis(place + inside_RC3, -1, 0)
            frame[...] = array_ZYX[z, y, x]
        return frames


def source_series(folder: Path, case: Case, grid: Volume, *, first: str | None = None) -> SourceSeries:
    """The series of a DICOM folder whose instances lie on the grid of a converted case.

    Args:
        folder: What was converted.
        case: Its converted files, each with the sidecar that ``medssl convert`` writes.
        grid: A volume on the grid of one of them.
        first: Sequence that is tried first.

    Raises:
        DataError: No series fits; tells why.
    """
    names = sorted(case.sequences, key=lambda name: name != first)
    records = {name: _record(case.sequences[name].path) for name in names}
    by_series = _headers(folder, {str(record["series_uid"]) for record in records.values() if record})
    reasons = []
    for name, record in records.items():
        found = by_series.get(str(record.get("series_uid")), [])
        fitting = _placed(found, grid, record.get("b_value"))
        if isinstance(fitting, SourceSeries):
            return fitting
        reasons.append(f"{name}: {fitting}")
    raise DataError(
        "The results cannot be laid back onto a DICOM series.",
        where=f"{hide_home(str(folder))}: " + "; ".join(reasons),
        fix="leave --dicom out: the NIfTI heat map holds the same numbers on the grid of the converted file",
        code="dicom_no_source",
    )


def _record(path: Path) -> dict[str, Any]:
    """What ``medssl convert`` wrote down of a file; empty without a sidecar."""
    sidecar = path.with_name(f"{volume_stem(path)}.json")
    try:
        return dict(json.loads(sidecar.read_text(encoding="utf-8"))["medssl"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _headers(folder: Path, wanted: set[str]) -> dict[str, list[Dataset]]:
    found: dict[str, list[Dataset]] = {}
    with quiet_pydicom():
        for name in walk(folder):
            try:
                header = read_header(folder / name)
            except (DamagedFile, OSError):
                continue  # the conversion has read the series already and refused what is damaged
            uid = str(getattr(header, "SeriesInstanceUID", "")) if header is not None else ""
            if header is not None and uid in wanted:
                found.setdefault(uid, []).append(header)
    return found


def _placed(headers: Sequence[Dataset], grid: Volume, b_value: float | None) -> SourceSeries | str:
    """The instances on the grid, or why they do not lie on it."""
    if not headers:
        return "its series was not found"
    if any(int(getattr(header, "NumberOfFrames", 1) or 1) > 1 for header in headers):
        return "its series packs several frames into a file (multi-frame), which this export does not map"
    if not all(hasattr(header, "ImagePositionPatient") for header in headers):
        return "its series does not tell where its slices lie"
    if not all(getattr(header, "FrameOfReferenceUID", "") for header in headers):
        return "its series names no frame of reference"
    chosen = _one_a_place(headers, b_value)
    across, down, normal = _directions(chosen[0])
    chosen.sort(key=lambda header: float(np.dot(normal, _vector(header, "ImagePositionPatient"))))
    to_voxel = np.linalg.inv(grid.affine)
    steps = [to_voxel[:3, :3] @ _LPS @ step for step in (across, down)]
    places = [to_voxel @ [*(_LPS @ _vector(header, "ImagePositionPatient")), 1] for header in chosen]
    return _on_grid(chosen, np.array(places)[:, :3], steps[0], steps[1], grid)


def _on_grid(
    headers: Sequence[Dataset], places_F3: np.ndarray, across: np.ndarray, down: np.ndarray, grid: Volume
) -> SourceSeries | str:
    """Places rounded to whole voxels, where that moves no corner by more than the tolerance of a grid."""
    rows, columns = int(headers[0].Rows), int(headers[0].Columns)
    column_step, row_step, places = (np.rint(value).astype(int) for value in (across, down, places_F3))
    corners = [(r, c) for r in (0, rows - 1) for c in (0, columns - 1)]
    exact = np.stack([places_F3 + c * across + r * down for r, c in corners])
    whole = np.stack([places + c * column_step + r * row_step for r, c in corners])
    shift_mm = np.linalg.norm((exact - whole) @ grid.affine[:3, :3].T, axis=-1).max()
    if shift_mm > GRID_TOLERANCE_MM or not _are_axes(column_step, row_step):
        return f"its slices lie up to {shift_mm:.2f} mm off the voxels: the file was resampled"
    if whole.min() < 0 or (whole.max((0, 1)) >= grid.shape[::-1]).any():
        return f"its slices reach beyond the grid of {grid}"
    if len(headers) * rows * columns != int(np.prod(grid.shape)):
        x, y, z = grid.shape[::-1]
        return f"{len(headers)} slices of {columns} x {rows} pixels, the grid has {x} x {y} x {z} voxels"
    return SourceSeries(tuple(headers), places, column_step, row_step)


def _are_axes(column_step: np.ndarray, row_step: np.ndarray) -> bool:
    return bool(np.abs(column_step).sum() == np.abs(row_step).sum() == 1 and not (column_step * row_step).any())


def _one_a_place(headers: Sequence[Dataset], b_value: float | None) -> list[Dataset]:
    """One instance for each position: of the b-value in question if told, else the first by its number."""
    chosen: dict[tuple[float, ...], Dataset] = {}
    for header in sorted(headers, key=lambda header: (_is_other_b(header, b_value), _number(header))):
        place = tuple(np.round(_vector(header, "ImagePositionPatient"), 2).tolist())
        chosen.setdefault(place, header)
    return list(chosen.values())


def _is_other_b(header: Dataset, b_value: float | None) -> bool:
    own = getattr(header, "DiffusionBValue", None)
    return b_value is not None and own is not None and abs(float(own) - b_value) > 50


def _number(header: Dataset) -> int:
    return int(getattr(header, "InstanceNumber", 0) or 0)


def _directions(header: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps in mm from a column, and from a row, to the next, and the unit normal; LPS."""
    cosines, spacing = _vector(header, "ImageOrientationPatient"), _vector(header, "PixelSpacing")
    return cosines[:3] * spacing[1], cosines[3:] * spacing[0], np.cross(cosines[:3], cosines[3:])


def _vector(header: Dataset, keyword: str) -> np.ndarray:
    return np.array([float(value) for value in getattr(header, keyword)])


# --- writing ---------------------------------------------------------------------------------------------------------


def write_parametric_map(path: Path, volume: Volume, series: SourceSeries, *, label: str, definition: str) -> None:
    """A float map, for example heat, as a Parametric Map: one float32 frame for each source image.

    Args:
        path: ``.dcm`` file.
        volume: On the grid of the series.
        series: From ``source_series``.
        label: What it is, in a few words.
        definition: What its numbers mean.
    """
    hd = _highdicom()
    frames_FRC = np.ascontiguousarray(series.frames(volume.array), np.float32)
    low, high = float(frames_FRC.min()), float(frames_FRC.max())
    with quiet_writing():
        mapping = hd.pm.RealWorldValueMapping(
            lut_label="HEATMAP",
            lut_explanation=f"{label}. {NOTE}"[:64],
            unit=_code("1", "UCUM", "no units"),
            value_range=(low, high),
            slope=1.0,
            intercept=0.0,
        )
        made = hd.pm.ParametricMap(
            source_images=series.headers,
            pixel_array=frames_FRC,
            **dicom_identity(series, 1, "parametric map", frames_FRC, label, definition),
            contains_recognizable_visual_features=False,
            real_world_value_mappings=[mapping],
            voi_lut_transformations=[
                hd.VOILUTTransformation(window_center=(low + high) / 2, window_width=max(high - low, 1e-6))
            ],
            content_description=f"{label}. {NOTE}"[:64],
            content_label="HEATMAP",
        )
        made.SeriesDescription = f"{label} ({NOTE})"[:64]
        made.ImageComments = definition
        save_dicom(path, made)


def write_segmentation(
    path: Path,
    labels: Volume,
    series: SourceSeries,
    names: Mapping[int, str],
    *,
    algorithm: str,
    description: str,
    content_label: str = "HEATMAP",
    properties: Mapping[int, Property] | None = None,
) -> None:
    """A label map as a binary Segmentation, one segment a label; of a heat map or of any other model.

    Args:
        path: ``.dcm`` file.
        labels: Whole numbers on the grid of the series, 0 is background.
        series: From ``source_series``.
        names: Of the labels that count; others are background.
        algorithm: Name of what made it.
        description: Of the series.
        content_label: Identifies the content for people, in capitals.
        properties: What the segment of each label shows; the hot region of a map if not given.
    """
    hd = _highdicom()
    labels_FRC = series.frames(labels.array)
    numbers_FRC = np.zeros(labels_FRC.shape, np.uint8)
    for number, label in enumerate(names, start=1):
        numbers_FRC[labels_FRC == label] = number
    with quiet_writing():
        identification = hd.AlgorithmIdentificationSequence(
            name=algorithm[:64],
            family=_code("123110", "DCM", "Artificial Intelligence"),
            version=package_version(),
            source=NOTE,
        )
        shown = dict.fromkeys(names, HOT_REGION) if properties is None else properties
        segments = [
            hd.seg.SegmentDescription(
                segment_number=number,
                segment_label=name[:64],
                segmented_property_category=_code(*shown[label][0]),
                segmented_property_type=_code(*shown[label][1]),
                algorithm_type="AUTOMATIC",
                algorithm_identification=identification,
            )
            for number, (label, name) in enumerate(names.items(), start=1)
        ]
        made = hd.seg.Segmentation(
            source_images=series.headers,
            pixel_array=numbers_FRC,
            segmentation_type="BINARY",
            segment_descriptions=segments,
            **dicom_identity(series, 3, "segmentation", numbers_FRC, algorithm, description, *names.values()),
            content_description=NOTE,
            content_label=content_label,
            omit_empty_frames=False,
        )
        made.SeriesDescription = f"{description} ({NOTE})"[:64]
        save_dicom(path, made)


def write_capture(path: Path, picture_HW3: np.ndarray, series: SourceSeries, *, label: str, definition: str) -> None:
    """A colour picture as a secondary capture in the study of the series.

    Args:
        path: ``.dcm`` file.
        picture_HW3: uint8, RGB.
        series: From ``source_series``.
        label: What it is, in a few words.
        definition: What it shows.
    """
    hd = _highdicom()
    picture = np.ascontiguousarray(picture_HW3, np.uint8)
    identity = dicom_identity(series, 2, "secondary capture", picture, label, definition)
    software, model = identity.pop("software_versions"), identity.pop("manufacturer_model_name")
    del identity["device_serial_number"]
    with quiet_writing():
        made = hd.sc.SCImage.from_ref_dataset(
            ref_dataset=series.headers[0],
            pixel_array=picture,
            photometric_interpretation="RGB",
            bits_allocated=8,
            coordinate_system="PATIENT",
            patient_orientation=("L", "P"),
            transfer_syntax_uid="1.2.840.10008.1.2.1",
            **identity,
        )
        made.SeriesDescription = f"{label} ({NOTE})"[:64]
        made.ImageComments = definition
        made.ManufacturerModelName, made.SoftwareVersions = model, software
        made.BurnedInAnnotation = "NO"  # captions count slices and heat; they name nobody
        save_dicom(path, made)


def region_of(heat: Volume, share: float) -> Volume:
    """1 where heat reaches ``share`` of its largest value, else 0; nothing where there is no heat at all."""
    top = float(heat.array.max(initial=0.0))
    is_hot = heat.array >= share * top if top > 0 else np.zeros(heat.array.shape, bool)
    return Volume(is_hot.astype(np.uint8), heat.affine)


def dicom_identity(series: SourceSeries, offset: int, kind: str, pixels: np.ndarray, *texts: str) -> dict[str, Any]:
    """Identifiers and origin of a new object, a function of what is in it."""
    from pydicom.uid import generate_uid

    source = series.headers[0]
    digest = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
    entropy = [str(source.SeriesInstanceUID), kind, str(pixels.shape), digest, package_version(), *texts]
    return {
        "series_instance_uid": generate_uid(entropy_srcs=["series", *entropy]),
        "sop_instance_uid": generate_uid(entropy_srcs=["instance", *entropy]),
        "series_number": SERIES_OFFSET + offset + 10 * (int(getattr(source, "SeriesNumber", 0) or 0) % 10**6),
        "instance_number": 1,
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": "medssl infer",
        "software_versions": package_version(),
        "device_serial_number": "0",
    }


def _code(value: str, scheme: str, meaning: str) -> Any:
    from pydicom.sr.coding import Code

    return Code(value, scheme, meaning)


@contextmanager
def quiet_writing() -> Iterator[None]:
    """No warnings about values of the source that break the standard: scanners write them every day."""
    with quiet_pydicom(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"highdicom")
        yield


def save_dicom(path: Path, made: Dataset) -> None:
    """Write a DICOM file whole or not at all."""
    with atomic_path(path) as temporary:
        made.save_as(temporary, enforce_file_format=True)
