"""Folders of DICOM files, grouped into series, and the headers of one series as plain facts.

Two passes, so that memory does not grow with the cohort: ``scan`` keeps a path and a series for each file; the geometry
of every frame (``read_series``) is read again only while its case is being converted. Nothing here decides whether a
series is a good volume: that is ``dicom_gates``.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydicom
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from medssl_cli.data import diffusion

GROUP_TAGS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "PatientID",
    "StudyInstanceUID",
    "StudyDate",
    "StudyTime",
    "SeriesInstanceUID",
    "SeriesNumber",
    "SeriesDescription",
    "ProtocolName",
    "SequenceName",
    "Modality",
    "Manufacturer",
    "ImageType",
    "Rows",
)
"""Tags that the first pass always reads; a mapping may ask for more."""

FRAME_TAGS: tuple[Any, ...] = (
    "SpecificCharacterSet",
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "Manufacturer",
    "Modality",
    "ImageType",
    "InstanceNumber",
    "AcquisitionNumber",
    "AcquisitionTime",
    "SeriesTime",
    "TemporalPositionIdentifier",
    "NumberOfTemporalPositions",
    "EchoNumbers",
    "EchoTime",
    "InversionTime",
    "TriggerTime",
    "ConvolutionKernel",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PixelSpacing",
    "SpacingBetweenSlices",
    "SliceThickness",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "GantryDetectorTilt",
    "BurnedInAnnotation",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
    *diffusion.TAGS,
)

_DICOM_SUFFIXES = (".dcm", ".ima", ".dicom")
_UNDEFINED = 0xFFFFFFFF
_LONG_VRS = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"UN"}


@dataclass
class SeriesEntry:
    """One series as the first pass sees it.

    Args:
        study_uid, series_uid, number: What identifies it: two series may share a number, and two numbers a UID.
        patient_id, study_date, study_time: Of its first file.
        tags: Every distinct value of the tags that rules look at, as text; parts joined by a backslash.
        paths: Its files, below the source folder, sorted.
        damaged: (path, reason) of DICOM files in the folders of this series that may be its missing slices: unreadable
            ones, ones that name no series or study, and ones that give its UID to another patient or study.
    """

    study_uid: str
    series_uid: str
    number: str
    patient_id: str
    study_date: str
    study_time: str
    tags: dict[str, list[str]] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)
    damaged: list[tuple[str, str]] = field(default_factory=list)

    @property
    def description(self) -> str:
        """Series description, else protocol name, else modality."""
        for keyword in ("SeriesDescription", "ProtocolName", "Modality"):
            if self.tags.get(keyword, [""])[0]:
                return self.tags[keyword][0]
        return "series"


@dataclass
class Scan:
    """What lies in a source folder.

    Args:
        n_files: All files.
        n_other: Files that are not DICOM, or DICOM without an image (reports, plans, directories).
        damaged: (path, reason) of files that look like DICOM and cannot be read.
        series: Sorted by patient, study, number and UID.
    """

    n_files: int = 0
    n_other: int = 0
    damaged: list[tuple[str, str]] = field(default_factory=list)
    series: list[SeriesEntry] = field(default_factory=list)


class Plane(NamedTuple):
    """Where an image lies, in DICOM's patient space (LPS).

    Args:
        position: Centre of the first voxel in mm.
        row_cosines, column_cosines: Unit directions of increasing column and row index.
        pixel_spacing: (between rows, between columns) in mm.
    """

    position: tuple[float, float, float]
    row_cosines: tuple[float, float, float]
    column_cosines: tuple[float, float, float]
    pixel_spacing: tuple[float, float]


@dataclass(frozen=True)
class Frame:
    """One image plane and all that may tell it from another plane at the same place.

    Args:
        file: Index of its file in the series.
        index: Frame within a multi-frame file, else 0.
    """

    file: int
    plane: Plane
    rows: int
    columns: int
    b: float | None = None
    direction: str = ""
    temporal: str = ""
    echo: str = ""
    image_type: str = ""
    inversion: str = ""
    kernel: str = ""
    acquisition: str = ""
    trigger: str = ""
    instance: int | None = None
    index: int = 0


@dataclass(frozen=True)
class FileFacts:
    """One file of a series: its name for messages, its identity for the digest, its encoding."""

    path: Path
    name: str
    sop_uid: str
    size: int
    modified_ns: int
    is_compressed: bool
    n_frames: int


@dataclass
class SeriesFacts:
    """Everything the gates need to know of one series.

    Args:
        files: In the order of the entry's paths.
        frames: In file order; a mosaic is unfolded into its slices.
        faults: (code, sentence) of files or tags that forbid a conversion.
        modality: ``MR``, ``CT``, ``PT`` …
        slice_gap, slice_thickness: Spacing between slices and thickness as the header states them, mm.
        n_temporal: Number of temporal positions that the header states, 0 if none.
        tilt: Gantry tilt that the header states, degrees.
        is_original: Whether the first image type is ORIGINAL.
        is_mosaic, is_multi_frame: How planes are packed into files.
    """

    entry: SeriesEntry
    files: list[FileFacts] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)
    modality: str = ""
    acquisition_time: str = ""
    slice_gap: float | None = None
    slice_thickness: float | None = None
    n_temporal: int = 0
    tilt: float = 0.0
    is_original: bool = False
    is_mosaic: bool = False
    is_multi_frame: bool = False
    has_burned_in_text: bool = False

    @property
    def plane(self) -> str:
        """``axial``, ``coronal`` or ``sagittal``, nearest to the first frame; empty without orientation."""
        if not self.frames:
            return ""
        normal = np.abs(np.cross(self.frames[0].plane.row_cosines, self.frames[0].plane.column_cosines))
        return ("sagittal", "coronal", "axial")[int(np.argmax(normal))]


class DamagedFile(Exception):
    """A file that looks like DICOM and cannot be read; the text says why."""


def walk(source: Path, skip: Path | None = None) -> Iterator[str]:
    """Paths below ``source`` of all its files, sorted by folder, links followed once; hidden folders are left out."""
    if source.is_file():
        yield source.name
        return
    seen: set[tuple[int, int]] = set()
    for folder, folders, names in os.walk(source, followlinks=True):
        here = Path(folder)
        state = here.stat()
        if (state.st_dev, state.st_ino) in seen or here == skip:
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            yield str((here / name).relative_to(source))


def scan(
    source: Path,
    keywords: Sequence[str] = (),
    *,
    skip: Path | None = None,
    run: Callable[..., Iterator[Any]] = map,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Scan:
    """Group every DICOM image below ``source`` by patient, study and series.

    Args:
        source: Folder, or one file.
        keywords: Tags to read beside ``GROUP_TAGS``, for the rules of a mapping.
        skip: Folder to leave out.
        run: ``map``, or the ordered map of a process pool.
        progress: Called with (files read, files in all).
    """
    root = source.parent if source.is_file() else source
    paths = list(walk(source, skip))
    wanted = tuple(dict.fromkeys((*GROUP_TAGS, *keywords)))
    batches = [(str(root), paths[i : i + 64], wanted) for i in range(0, len(paths), 64)]
    result = Scan(n_files=len(paths))
    series: dict[tuple[str, ...], SeriesEntry] = {}
    done = 0
    for batch in run(_scan_batch, batches):
        for path, values, damage in batch:
            if damage:
                result.damaged.append((path, damage))
            elif values is None:
                result.n_other += 1
            else:
                _add_file(series, path, values)
        done += len(batch)
        progress(done, len(paths))
    _warn_neighbours(list(series.values()), [path for path, _ in result.damaged])
    result.series = sorted(
        series.values(), key=lambda s: (s.patient_id, s.study_uid, _as_number(s.number), s.series_uid)
    )
    return result


def read_series(root: Path, entry: SeriesEntry, *, name_files: bool = True) -> SeriesFacts:
    """Headers of every file of a series; faults are collected, not raised.

    Args:
        root: Folder that the entry's paths are below.
        entry: From ``scan``.
        name_files: Whether messages name files; otherwise they count them, since names may tell persons.
    """
    facts = SeriesFacts(entry)
    for path, reason in entry.damaged:
        facts.faults.append(("dicom_damaged_neighbour", f"{path if name_files else 'a file'}: {reason}"))
    for i, path in enumerate(entry.paths):
        name = path if name_files else f"file {i + 1} of {len(entry.paths)}"
        try:
            _read_into(facts, root / path, name)
        except DamagedFile as error:
            facts.faults.append(("dicom_truncated", f"{name}: {error}"))
        except OSError as error:
            facts.faults.append(("dicom_unreadable", f"{name}: {error.strerror}"))
        except Exception as error:  # pydicom converts values on access, and a damaged header ends in many kinds
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            facts.faults.append(("dicom_truncated", f"{name}: the header is damaged ({reason})"))
    return facts


def read_header(path: Path, tags: Sequence[Any] | None = None) -> Dataset | None:
    """Header of a DICOM file up to its pixels, or None for another kind of file.

    Raises:
        DamagedFile: It looks like DICOM and cannot be read.
    """
    with path.open("rb") as file:
        return _parse(file, path, tags)


@contextlib.contextmanager
def quiet_pydicom() -> Iterator[None]:
    """No checks and no warnings about values that break the standard: scanners write them every day.

    What we rely on is checked by the gates; a name with an unknown character set is no reason to refuse a volume.
    """
    with warnings.catch_warnings(), disable_value_validation():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"pydicom")
        yield


# --- first pass ------------------------------------------------------------------------------------------------------


def _scan_batch(batch: tuple[str, list[str], tuple[str, ...]]) -> list[tuple[str, dict[str, str] | None, str]]:
    """(path, tags or None, damage) of each file of a batch; a picklable task for a worker process."""
    root, paths, keywords = batch
    found: list[tuple[str, dict[str, str] | None, str]] = []
    with quiet_pydicom():
        for path in paths:
            try:
                found.append((path, _group_values(Path(root) / path, keywords), ""))
            except DamagedFile as error:
                found.append((path, None, str(error)))
            except OSError as error:
                found.append((path, None, f"it cannot be opened: {error.strerror}"))
            except Exception as error:  # pydicom converts values on access, and a damaged header ends in many kinds
                found.append((path, None, f"the header is damaged: {' '.join(str(error).split())[:120]}"))
    return found


def _group_values(path: Path, keywords: tuple[str, ...]) -> dict[str, str] | None:
    header = read_header(path, keywords)
    if header is None:
        return None
    values = {keyword: _text(header, keyword) for keyword in keywords}
    if "SOPClassUID" not in header and "SeriesInstanceUID" not in header:
        raise DamagedFile("the header ends before it names an image and a series")
    kind = UID(values["SOPClassUID"])
    if "Rows" in header or "Image Storage" in kind.name:
        return values
    is_standard = kind.startswith("1.2.840.10008.")
    if not kind.is_valid or (is_standard and kind.name == str(kind)):  # a vendor's own kinds are no images
        raise DamagedFile("the header does not say what kind of object it is")
    return None


def _add_file(series: dict[tuple[str, ...], SeriesEntry], path: str, values: dict[str, str]) -> None:
    uid = values["SeriesInstanceUID"]
    place = "" if uid else str(Path(path).parent)  # without a UID, a folder is all that holds a series together
    key = (values["PatientID"], values["StudyInstanceUID"], uid, values["SeriesNumber"], place)
    entry = series.get(key)
    if entry is None:
        entry = series[key] = SeriesEntry(
            study_uid=values["StudyInstanceUID"],
            series_uid=uid,
            number=values["SeriesNumber"],
            patient_id=values["PatientID"],
            study_date=values["StudyDate"],
            study_time=values["StudyTime"],
        )
    entry.paths.append(path)
    for keyword, value in values.items():
        if keyword not in ("SOPInstanceUID", "Rows"):
            known = entry.tags.setdefault(keyword, [])
            if value not in known and len(known) < 32:
                known.append(value)


def _warn_neighbours(series: list[SeriesEntry], damaged: list[str]) -> None:
    """Tell each series of files in its folders that may be slices of it."""
    strays: dict[Path, list[tuple[str, str]]] = {}
    for path in damaged:
        strays.setdefault(Path(path).parent, []).append((path, "unreadable, in a folder of this series"))
    owners: dict[tuple[Path, str], list[SeriesEntry]] = {}
    for entry in series:
        for folder in {Path(path).parent for path in entry.paths}:
            owners.setdefault((folder, entry.series_uid), []).append(entry)
            if not entry.series_uid or not entry.study_uid:
                missing = "SeriesInstanceUID" if not entry.series_uid else "StudyInstanceUID"
                mine = [path for path in entry.paths if Path(path).parent == folder]
                strays.setdefault(folder, []).extend((path, f"{missing} is missing") for path in mine)
    for entry in series:
        folders = {Path(path).parent for path in entry.paths}
        found = [stray for folder in sorted(folders & strays.keys()) for stray in strays[folder]]
        for folder in sorted(folders):
            others = [o for o in owners[folder, entry.series_uid] if _person(o) != _person(entry)]
            found += [(other.paths[0], "the same series under another patient or study") for other in others]
        entry.damaged = [stray for stray in found if stray[0] not in entry.paths]


def _person(entry: SeriesEntry) -> tuple[str, str]:
    return entry.patient_id, entry.study_uid


def _parse(file: Any, path: Path, tags: Sequence[Any] | None) -> Dataset | None:
    """Read a header and leave ``file`` before its pixels."""
    start = file.read(132)
    has_magic = start[128:132] == b"DICM"
    if not has_magic:
        if path.suffix.lower() in _DICOM_SUFFIXES and not start.strip(b"\0"):
            raise DamagedFile("the file is empty" if not start else "only the empty preamble is left of it")
        # a data set without preamble begins with group 0002 or 0008, in either byte order
        if start[:2] not in (b"\x02\0", b"\x08\0", b"\0\x02", b"\0\x08") or len(start) < 132:
            return None
    file.seek(0)
    specific = None if tags is None else [Tag(tag) for tag in tags]
    try:
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=specific, force=not has_magic)
    except Exception as error:  # pydicom raises many kinds for a damaged file
        if has_magic:
            raise DamagedFile(f"the header cannot be read: {' '.join(str(error).split())[:120]}") from error
        return None
    if not has_magic and not {"SOPClassUID", "SeriesInstanceUID"} & set(header.dir()):
        return None
    return header


# --- second pass -----------------------------------------------------------------------------------------------------


def _read_into(facts: SeriesFacts, path: Path, name: str) -> None:
    with path.open("rb") as file, quiet_pydicom():
        header = _parse(file, path, FRAME_TAGS)
        if header is None:
            raise DamagedFile("it is no DICOM file any more")
        state = path.stat()
        syntax = UID(str(getattr(header, "file_meta", {}).get("TransferSyntaxUID", "") or ImplicitVRLittleEndian))
        n_frames = max(1, int(_float(header, "NumberOfFrames") or 1))
        index = len(facts.files)
        facts.files.append(
            FileFacts(
                path,
                name,
                _text(header, "SOPInstanceUID"),
                state.st_size,
                state.st_mtime_ns,
                syntax.is_compressed,
                n_frames,
            )
        )
        _check_pixels(file, header, syntax, n_frames, state.st_size)
    with quiet_pydicom():
        _add_series_facts(facts, header, first=index == 0)
        try:
            frames = list(_frames_of(facts, path, header, index))
        except _MissingTag as missing:
            facts.faults.append(("dicom_missing_tag", f"{name}: {missing}"))
        else:
            facts.frames += frames


class _MissingTag(Exception):
    """A tag without which a plane has no place."""


def _add_series_facts(facts: SeriesFacts, header: Dataset, *, first: bool) -> None:
    photometric = _text(header, "PhotometricInterpretation")
    if not photometric.startswith("MONOCHROME") or int(_float(header, "SamplesPerPixel") or 1) != 1:
        facts.faults.append(("dicom_colour", f"the images are {photometric or 'of unknown colour'}, not greyscale"))
    facts.has_burned_in_text |= _text(header, "BurnedInAnnotation").upper() == "YES"
    if not first:
        return
    facts.modality = _text(header, "Modality")
    facts.acquisition_time = _text(header, "AcquisitionTime") or _text(header, "SeriesTime")
    facts.slice_gap = _float(header, "SpacingBetweenSlices")
    facts.slice_thickness = _float(header, "SliceThickness")
    facts.n_temporal = int(_float(header, "NumberOfTemporalPositions") or 0)
    facts.tilt = _float(header, "GantryDetectorTilt") or 0.0
    image_type = _text(header, "ImageType").upper().split("\\")
    facts.is_original = image_type[0] == "ORIGINAL"
    facts.is_multi_frame = "PerFrameFunctionalGroupsSequence" in header
    facts.is_mosaic = "MOSAIC" in image_type and not facts.is_multi_frame


def _frames_of(facts: SeriesFacts, path: Path, header: Dataset, index: int) -> Iterator[Frame]:
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "Rows", "Columns"):
        if not _text(header, keyword):
            raise _MissingTag(f"{keyword} is missing")
    if "MOSAIC" in _text(header, "ImageType").upper().split("\\") and "PerFrameFunctionalGroupsSequence" not in header:
        yield from _mosaic_frames(path, header, index)
    elif "PerFrameFunctionalGroupsSequence" in header:
        yield from _functional_frames(header, index)
    elif int(_float(header, "NumberOfFrames") or 1) > 1:
        raise _MissingTag("several frames in one file, without functional groups that place them")
    else:
        yield _frame(header, index, _plane(header, header, header), int(header.Rows), int(header.Columns))


def _functional_frames(header: Dataset, index: int) -> Iterator[Frame]:
    shared = (header.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    for i, own in enumerate(header.PerFrameFunctionalGroupsSequence):

        def group(keyword: str, own: Dataset = own) -> Dataset:
            items = own.get(keyword) or shared.get(keyword)
            return items[0] if items else Dataset()

        place = _plane(
            group("PlanePositionSequence"), group("PlaneOrientationSequence"), group("PixelMeasuresSequence")
        )
        content = group("FrameContentSequence")
        kind = group("MRImageFrameTypeSequence") or group("CTImageFrameTypeSequence") or group("PETFrameTypeSequence")
        echo = group("MREchoSequence")
        merged = Dataset()
        merged.update({element.tag: element for element in group("MRDiffusionSequence")})
        for tag in diffusion.TAGS:
            if tag in header and tag not in merged:
                merged[tag] = header[tag]
        if "Manufacturer" in header:
            merged.Manufacturer = header.Manufacturer
        yield Frame(
            file=index,
            plane=place,
            rows=int(header.Rows),
            columns=int(header.Columns),
            b=diffusion.b_value(merged),
            direction=diffusion.direction(merged),
            temporal=_text(content, "TemporalPositionIndex"),
            echo=_text(echo, "EffectiveEchoTime"),
            image_type=_text(kind, "FrameType") or _text(header, "ImageType"),
            acquisition=_text(header, "AcquisitionNumber") or _text(content, "FrameAcquisitionNumber"),
            instance=int(_float(header, "InstanceNumber") or 0),
            index=i,
        )


def _mosaic_frames(path: Path, header: Dataset, index: int) -> Iterator[Frame]:
    """The slices of a Siemens mosaic, placed by nibabel's reading of the vendor's private header."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The DICOM readers are highly experimental", category=UserWarning)
        from nibabel.nicom.dicomwrappers import MosaicWrapper, WrapperError, wrapper_from_data
    whole = pydicom.dcmread(path, stop_before_pixels=True)
    try:
        wrapper = wrapper_from_data(whole)
        if not isinstance(wrapper, MosaicWrapper):
            raise _MissingTag("a mosaic without the vendor's private header: its slices cannot be placed")
        affine, (rows, columns, n_slices) = wrapper.affine, wrapper.image_shape  # LPS; voxel (row, column, slice)
    except (WrapperError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise _MissingTag(f"a mosaic whose private header cannot be read ({error})") from error
    steps = affine[:3, :3]
    spacing = np.linalg.norm(steps, axis=0)
    column_cosines, row_cosines = steps[:, 0] / spacing[0], steps[:, 1] / spacing[1]
    for k in range(n_slices):
        position = _triple(affine[:3, 3] + k * steps[:, 2])
        plane = Plane(position, _triple(row_cosines), _triple(column_cosines), (float(spacing[0]), float(spacing[1])))
        yield _frame(header, index, plane, int(rows), int(columns))


def _frame(header: Dataset, index: int, plane: Plane, rows: int, columns: int) -> Frame:
    instance = _float(header, "InstanceNumber")
    return Frame(
        file=index,
        plane=plane,
        rows=rows,
        columns=columns,
        b=diffusion.b_value(header),
        direction=diffusion.direction(header),
        temporal=_text(header, "TemporalPositionIdentifier"),
        echo=_text(header, "EchoNumbers") + "/" + _text(header, "EchoTime"),
        image_type=_text(header, "ImageType"),
        inversion=_text(header, "InversionTime"),
        kernel=_text(header, "ConvolutionKernel"),
        acquisition=_text(header, "AcquisitionNumber"),
        trigger=_text(header, "TriggerTime"),
        instance=None if instance is None else int(instance),
    )


def _plane(position: Dataset, orientation: Dataset, measures: Dataset) -> Plane:
    """Where a plane lies, or the name of the tag that is missing."""
    p = _vector(position, "ImagePositionPatient", 3)
    o = _vector(orientation, "ImageOrientationPatient", 6)
    s = _vector(measures, "PixelSpacing", 2)
    row, column = np.array(o[:3]), np.array(o[3:])
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if min(lengths) < 0.99 or max(lengths) > 1.01 or abs(row @ column) > 0.01:
        raise _MissingTag("ImageOrientationPatient is no pair of perpendicular directions")
    if min(s) <= 0:
        raise _MissingTag(f"PixelSpacing is {s[0]:g}\\{s[1]:g}")
    return Plane(_triple(np.array(p)), _triple(row / lengths[0]), _triple(column / lengths[1]), (s[0], s[1]))


# --- pixels ----------------------------------------------------------------------------------------------------------


def _check_pixels(file: Any, header: Dataset, syntax: UID, n_frames: int, size: int) -> None:
    """Refuse a file whose pixels are missing or shorter than its header says; they are not decoded.

    ``file`` stands before the pixel element, where pydicom stopped.
    """
    if syntax == DeflatedExplicitVRLittleEndian:
        return  # the reader unpacked it whole, and a cut stream would have failed there
    start = file.tell()
    length = _pixel_length(file, syntax)
    if length is None:
        raise DamagedFile("it holds no pixels; the file is cut off")
    if length == _UNDEFINED:
        _check_fragments(file, syntax)
        return
    if file.tell() + length > size:
        raise DamagedFile(f"its pixels are cut off: {size - file.tell():,} of {length:,} bytes from byte {start:,}")
    bits = int(_float(header, "BitsAllocated") or 0)
    samples = int(_float(header, "SamplesPerPixel") or 1)
    expected = int(header.get("Rows") or 0) * int(header.get("Columns") or 0) * n_frames * samples * bits // 8
    if length < expected:
        raise DamagedFile(f"it holds {length:,} bytes of pixels, its header promises {expected:,}")


def _pixel_length(file: Any, syntax: UID) -> int | None:
    """Length of the pixel element, ``file`` left before its value; None when no pixel element follows."""
    order: Any = "big" if syntax == ExplicitVRBigEndian else "little"
    head = file.read(8)
    tag = (int.from_bytes(head[:2], order), int.from_bytes(head[2:4], order))
    if len(head) < 8 or tag not in ((0x7FE0, 0x0010), (0x7FE0, 0x0008), (0x7FE0, 0x0009)):
        return None
    if syntax == ImplicitVRLittleEndian:
        return int.from_bytes(head[4:], order)
    if head[4:6] in _LONG_VRS:
        return int.from_bytes(file.read(4), order)
    return int.from_bytes(head[6:], order)


def _check_fragments(file: Any, syntax: UID) -> None:
    """Walk the fragments of compressed pixels up to their closing delimiter."""
    count = 0
    while True:
        head = file.read(8)
        if len(head) < 8:
            raise DamagedFile(f"its compressed pixels are cut off after {max(count - 1, 0)} fragments")
        length = int.from_bytes(head[4:], "little")
        if head[:4] == b"\xfe\xff\xdd\xe0":
            break
        if head[:4] != b"\xfe\xff\x00\xe0":
            raise DamagedFile("its compressed pixels are damaged: no fragment where one should begin")
        if length and len(file.read(1)) < 1:
            raise DamagedFile(f"its compressed pixels are cut off in fragment {count}")
        file.seek(max(length - 1, 0), os.SEEK_CUR)
        count += 1
    if count < 2:  # the first item is the offset table
        raise DamagedFile("it holds no compressed pixels")


# --- values ----------------------------------------------------------------------------------------------------------


def _text(header: Dataset, keyword: str) -> str:
    """Value as text; several parts joined by a backslash, as in the file."""
    value = header.get(keyword)
    if value is None:
        return ""
    parts = value if isinstance(value, (list, tuple, pydicom.multival.MultiValue)) else [value]
    return "\\".join(str(part).strip().strip("\0") for part in parts)


def _numbers(header: Dataset, keyword: str) -> list[float]:
    try:
        return diffusion.numbers(header.get(keyword))
    except (TypeError, ValueError):  # pydicom converts on access, and text that is no number ends here
        return []


def _float(header: Dataset, keyword: str) -> float | None:
    numbers = _numbers(header, keyword)
    return numbers[0] if numbers and np.isfinite(numbers[0]) else None


def _vector(header: Dataset, keyword: str, length: int) -> list[float]:
    numbers = _numbers(header, keyword)
    if len(numbers) != length or not np.isfinite(numbers).all():
        raise _MissingTag(
            f"{keyword} is missing" if not numbers else f"{keyword} has {len(numbers)} usable numbers, not {length}"
        )
    return numbers


def _triple(vector: np.ndarray) -> tuple[float, float, float]:
    x, y, z = (float(v) for v in vector)
    return x, y, z


def _as_number(text: str) -> tuple[int, str]:
    return (int(text), "") if text.lstrip("-").isdigit() else (10**9, text)
