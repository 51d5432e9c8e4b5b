"""A phantom study as the DICOM files that a scanner of its vendor would export.

Each vendor has its habits: Siemens names a folder after each series and puts three b-values into one; GE leaves out the
file suffix; Philips throws all series into one folder, gives each b-value its own series and scales its ADC map. Every
study also holds what a converter has to leave alone: a localizer in three planes, a sagittal and a coronal T2. No clock
is read: dates, times and identifiers are functions of the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, MRImageStorage
from pydicom.valuerep import format_number_as_ds

from medssl_cli.core.run import seed_for
from medssl_cli.core.volume import Volume
from medssl_cli.data.phantoms import CALCULATED_B, Grid, PhantomCase, PhantomImages, Scan, uid_for

IMPLEMENTATION_UID = UID(uid_for(0, "implementation"))
_PHILIPS_ADC_SLOPE = 0.8
_LPS = np.array([-1.0, -1.0, 1.0])  # RAS+ -> LPS+
_GIVEN_NAMES = ("Adam", "Bruno", "Carl", "David", "Erik", "Felix", "Georg", "Hugo", "Ivan", "Jonas", "Karim", "Luis")
_FAMILY_NAMES = ("Atlas", "Birch", "Cedar", "Dahl", "Elm", "Fern", "Grove", "Heath", "Ivory", "Juniper", "Kelp", "Lake")


@dataclass(frozen=True)
class Series:
    """One series: volumes one after the other, each with its b-value (None outside diffusion).

    Args:
        kind: ``localizer``, ``t2``, ``dwi``, ``adc`` or ``calculated``.
        stem: Stem of the same images in the case tree, empty for what has no place there.
        spacing_mm, thickness_mm: From slice centre to slice centre, and of the slice itself.
    """

    number: int
    description: str
    kind: str
    frames: tuple[tuple[Volume, int | None], ...]
    thickness_mm: float
    spacing_mm: float
    stem: str = ""


@dataclass(frozen=True)
class Vendor:
    """What one manufacturer writes into its headers."""

    manufacturer: str
    model: str
    software: str
    station: str
    image_types: Mapping[str, tuple[str, ...]]
    file_name: Callable[[Series, int, int], str]
    """Series, instance number, running number in the study -> path below the study folder."""


def write_study(folder: Path, case: PhantomCase, images: PhantomImages, size: str) -> int:
    """Write every series of one study below ``folder``, one file a slice, explicit VR little endian.

    Returns:
        Number of files.
    """
    vendor = _VENDORS[case.vendor]
    running = 0
    for series in plan_series(case, images, size):
        header = _series_header(case, vendor, series)
        for instance, dataset in enumerate(_instances(case, series, header), start=1):
            running += 1
            path = folder / vendor.file_name(series, instance, running)
            path.parent.mkdir(parents=True, exist_ok=True)
            dataset.save_as(path, enforce_file_format=True)
    return running


def plan_series(case: PhantomCase, images: PhantomImages, size: str) -> list[Series]:
    """The series of a study in the order of their numbers; a missing sequence has none."""
    t2, diffusion = case.protocol.t2[size], case.protocol.diffusion[size]
    b_of = {stem: int(stem.removeprefix("ax_dwi_b")) for stem in images.volumes if stem.startswith("ax_dwi_b")}
    series = _scouts(case)
    for number, description, kind, stems in _SERIES[case.vendor]:
        frames = tuple((images.volumes[stem], b_of.get(stem)) for stem in stems if stem in images.volumes)
        if frames:
            grid = t2 if kind == "t2" else diffusion
            stem = stems[0] if len(stems) == 1 else ""
            series.append(Series(number, description, kind, frames, grid.thickness_mm, grid.spacing_mm, stem))
    return series


def _scouts(case: PhantomCase) -> list[Series]:
    """Localizer, sagittal and coronal T2: the same patient, coarsely."""
    scan = Scan.of(case)
    names, step = _SCOUT_NAMES[case.vendor], 100 if case.vendor == "philips" else 1
    first = 101 if case.vendor == "philips" else 1
    loops = [Grid(64, 64, 4.0, 3, 12.0, 8.0, plane=plane) for plane in ("axial", "coronal", "sagittal")]
    frames = tuple((scan.t2(grid, f"localizer_{grid.plane}"), None) for grid in loops)
    series = [Series(first, names[0], "localizer", frames, 8.0, 12.0)]
    for place, plane in enumerate(("sagittal", "coronal"), start=1):
        grid = Grid(72, 72, 1.8, 9, 4.0, 3.5, plane=plane)
        volume = scan.t2(grid, f"{plane[:3]}_t2wi")
        series.append(Series(first + place * step, names[place], "t2", ((volume, None),), 3.5, 4.0))
    return series


# --- vendors ---------------------------------------------------------------------------------------------------------

_SCOUT_NAMES = {
    "siemens": ("localizer", "t2_tse_sag", "t2_tse_cor"),
    "ge": ("3-Plane Loc SSFSE", "Sag T2 FRFSE", "Cor T2 FRFSE"),
    "philips": ("Survey", "T2W_TSE_sag", "T2W_TSE_cor"),
}

_HIGH = f"ax_dwi_b{CALCULATED_B}"
_SERIES: dict[str, tuple[tuple[int, str, str, tuple[str, ...]], ...]] = {  # number, description, kind, stems in it
    "siemens": (
        (4, "t2_tse_tra", "t2", ("ax_t2wi",)),
        (5, "ep2d_diff_b50_400_800_tra", "dwi", ("ax_dwi_b50", "ax_dwi_b400", "ax_dwi_b800")),
        (6, "ep2d_diff_b50_400_800_tra_ADC", "adc", ("ax_adc",)),
        (7, "ep2d_diff_b50_400_800_tra_CALC_BVAL", "calculated", (_HIGH,)),
    ),
    "ge": (
        (4, "Ax T2 FRFSE", "t2", ("ax_t2wi",)),
        (5, "Ax DWI b50,800", "dwi", ("ax_dwi_b50", "ax_dwi_b800")),
        (6, f"Ax DWI b{CALCULATED_B}", "dwi", (_HIGH,)),
        (500, "Apparent Diffusion Coefficient (mm2/s)", "adc", ("ax_adc",)),
    ),
    "philips": (
        (401, "T2W_TSE_ax", "t2", ("ax_t2wi",)),
        (501, "DWI_b0", "dwi", ("ax_dwi_b0",)),
        (502, "dADC_map", "adc", ("ax_adc",)),
        (601, "DWI_b800", "dwi", ("ax_dwi_b800",)),
        (701, f"DWI_b{CALCULATED_B}", "dwi", (_HIGH,)),
    ),
}

_VENDORS = {
    "siemens": Vendor(
        "SIEMENS",
        "Prisma",
        "syngo MR E11",
        "MR01",
        {
            "localizer": ("ORIGINAL", "PRIMARY", "M", "NORM", "DIS2D"),
            "t2": ("ORIGINAL", "PRIMARY", "M", "NORM", "DIS2D"),
            "dwi": ("ORIGINAL", "PRIMARY", "DIFFUSION", "TRACEW", "NORM", "DIS2D"),
            "adc": ("DERIVED", "PRIMARY", "DIFFUSION", "ADC", "NORM", "DIS2D"),
            "calculated": ("DERIVED", "PRIMARY", "DIFFUSION", "CALC_BVALUE", "TRACEW", "NORM", "DIS2D"),
        },
        lambda series, instance, running: f"{series.number:03d}_{series.description}/{instance:04d}.dcm",
    ),
    "ge": Vendor(
        "GE MEDICAL SYSTEMS",
        "DISCOVERY MR750w",
        "DV26.0",
        "GEMR02",
        {
            "localizer": ("ORIGINAL", "PRIMARY", "OTHER"),
            "t2": ("ORIGINAL", "PRIMARY", "OTHER"),
            "dwi": ("ORIGINAL", "PRIMARY", "OTHER"),
            "adc": ("DERIVED", "PRIMARY", "ADC"),
        },
        lambda series, instance, running: f"S{series.number:04d}/I{instance:04d}",
    ),
    "philips": Vendor(
        "Philips Medical Systems",
        "Ingenia",
        "5.3.0",
        "PHMR03",
        {
            "localizer": ("ORIGINAL", "PRIMARY", "M_SE", "M", "SE"),
            "t2": ("ORIGINAL", "PRIMARY", "M_SE", "M", "SE"),
            "dwi": ("ORIGINAL", "PRIMARY", "M_SE", "M", "SE"),
            "adc": ("DERIVED", "PRIMARY", "ADC_UNSPECIFIED", "ADC", "UNSPECIFIED"),
        },
        lambda series, instance, running: f"DICOM/IM_{running:04d}",
    ),
}


def _add_b_value(dataset: Dataset, vendor: str, b_value: int) -> None:
    """The standard tag, and the vendor's own from before there was one."""
    dataset.DiffusionBValue = float(b_value)
    dataset.DiffusionDirectionality = "ISOTROPIC" if b_value else "NONE"
    if vendor == "siemens":
        dataset.SequenceName = f"*ep_b{b_value}t"
        block = dataset.private_block(0x0019, "SIEMENS MR HEADER", create=True)
        block.add_new(0x0C, "IS", b_value)
        block.add_new(0x0D, "CS", "ISOTROPIC")
    elif vendor == "ge":
        block = dataset.private_block(0x0043, "GEMS_PARM_01", create=True)
        block.add_new(
            0x30, "SS", 15 if b_value else 14
        )  # directions combined, or none; dcm2niix reads b = 0 without it
        block.add_new(0x39, "IS", [1_000_000_000 + b_value, 8, 0, 0])  # GE adds 1e9 to b of averaged directions
    else:
        block = dataset.private_block(0x2001, "Philips Imaging DD 001", create=True)
        block.add_new(0x03, "FL", float(b_value))
        block.add_new(0x04, "CS", "I")


# --- headers ---------------------------------------------------------------------------------------------------------


def _series_header(case: PhantomCase, vendor: Vendor, series: Series) -> Dataset:
    """All that the slices of one series share."""
    header = _patient_and_study(case)
    header.Modality = "MR"
    header.Manufacturer = vendor.manufacturer
    header.ManufacturerModelName = vendor.model
    header.SoftwareVersions = vendor.software
    header.StationName = vendor.station
    header.DeviceSerialNumber = f"{seed_for(0, vendor.station) % 100000:05d}"
    header.SeriesInstanceUID = uid_for(case.seed, "series", case.patient, case.visit, series.number)
    header.SeriesNumber = series.number
    header.SeriesDescription = header.ProtocolName = series.description
    header.SeriesTime = header.AcquisitionTime = header.ContentTime = _clock(case, 3 * (series.number % 100))
    header.ImageType = list(vendor.image_types[series.kind])
    _add_measurement(header, case, series)
    _add_pixel_format(header, series.frames[0][0], series, case.vendor)
    return header


def _patient_and_study(case: PhantomCase) -> Dataset:
    rng = np.random.default_rng(seed_for(case.seed, "person", case.patient))
    born = 1940 + int(rng.integers(0, 35))
    header = Dataset()
    header.SpecificCharacterSet = "ISO_IR 192"
    header.PatientName = f"{_FAMILY_NAMES[rng.integers(12)]}^{_GIVEN_NAMES[rng.integers(12)]}"
    header.PatientID = case.patient_id
    header.PatientBirthDate = f"{born}{int(rng.integers(1, 13)):02d}{int(rng.integers(1, 29)):02d}"
    header.PatientSex = "M"
    header.PatientAge = f"{int(case.study_date[:4]) - born:03d}Y"
    header.PatientWeight = str(int(rng.integers(60, 110)))
    header.PatientComments = "Invented person of a phantom study"
    header.InstitutionName = "Phantom Hospital"
    header.ReferringPhysicianName = "Referrer^Rosa"
    header.OperatorsName = "Operator^Otto"
    header.StudyInstanceUID = case.study_uid
    header.StudyID = f"{case.patient:04d}{case.visit}"
    header.AccessionNumber = f"A{seed_for(case.seed, 'accession', case.patient, case.visit) % 10**8:08d}"
    header.StudyDescription = "MR Prostate"
    header.StudyDate = header.SeriesDate = header.AcquisitionDate = header.ContentDate = case.study_date
    header.StudyTime = _clock(case, 0)
    header.FrameOfReferenceUID = uid_for(case.seed, "frame", case.patient, case.visit)
    header.PositionReferenceIndicator = ""
    header.PatientPosition = "HFS"
    header.BodyPartExamined = "PROSTATE"
    return header


def _clock(case: PhantomCase, minutes: int) -> str:
    start = 8 * 60 + seed_for(case.seed, "time", case.patient, case.visit) % 480
    hours, rest = divmod(start + minutes, 60)
    return f"{hours % 24:02d}{rest:02d}00"


def _add_measurement(header: Dataset, case: PhantomCase, series: Series) -> None:
    diffusion = series.kind in ("dwi", "adc", "calculated")
    protocol = case.protocol
    header.ScanningSequence = "EP" if diffusion else "SE"
    header.SequenceVariant = "SK"
    header.ScanOptions = "FS" if diffusion else ""
    header.MRAcquisitionType = "2D"
    header.RepetitionTime = "4600" if diffusion else "5200"
    header.EchoTime = f"{protocol.diffusion_echo_ms if diffusion else protocol.t2_echo_ms:g}"
    header.EchoTrainLength = 1 if diffusion else 25
    header.FlipAngle = "90"
    header.MagneticFieldStrength = "3"
    header.ImagingFrequency = "123.2"
    header.NumberOfAverages = "1"
    header.InPlanePhaseEncodingDirection = "COL" if diffusion else "ROW"
    header.SliceThickness = _ds(series.thickness_mm)
    header.SpacingBetweenSlices = _ds(series.spacing_mm)


def _add_pixel_format(header: Dataset, volume: Volume, series: Series, vendor: str) -> None:
    header.SamplesPerPixel = 1
    header.PhotometricInterpretation = "MONOCHROME2"
    header.Rows, header.Columns = volume.shape[1:]
    header.PixelSpacing = [_ds(volume.spacing.y), _ds(volume.spacing.x)]
    signed = vendor == "ge"
    header.BitsAllocated, header.BitsStored = 16, 16 if signed else 12
    header.HighBit = header.BitsStored - 1
    header.PixelRepresentation = int(signed)
    if vendor == "philips":
        slope = _PHILIPS_ADC_SLOPE if series.kind == "adc" else 1.0
        header.RescaleIntercept, header.RescaleSlope, header.RescaleType = "0", _ds(slope), "normalized"
    bright = max(1.0, float(np.percentile(volume.array, 99)))
    header.WindowCenter, header.WindowWidth = _ds(round(bright / 2)), _ds(round(bright))


def _instances(case: PhantomCase, series: Series, header: Dataset) -> Iterator[Dataset]:
    """One dataset for each slice: volume by volume, from the first slice to the last."""
    instance = 0
    for frame, (volume, b_value) in enumerate(series.frames):
        for k in range(volume.shape[0]):
            instance += 1
            dataset = _file_dataset(header, uid_for(case.seed, "image", header.SeriesInstanceUID, instance))
            dataset.InstanceNumber = instance
            dataset.AcquisitionNumber = frame + 1
            _add_plane(dataset, volume, k)
            if b_value is not None:
                _add_b_value(dataset, case.vendor, b_value)
            stored = np.rint(volume.array[k, ::-1] / float(header.get("RescaleSlope", 1)))  # the first row is on top
            dataset.PixelData = stored.astype("<i2").tobytes()
            yield dataset


def _file_dataset(header: Dataset, sop_uid: str) -> Dataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = MRImageStorage
    meta.MediaStorageSOPInstanceUID = UID(sop_uid)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = IMPLEMENTATION_UID
    meta.ImplementationVersionName = "MEDSSL_PHANTOM"
    dataset = Dataset()
    dataset.update(header)
    dataset.file_meta = meta
    dataset.SOPClassUID = MRImageStorage
    dataset.SOPInstanceUID = sop_uid
    return dataset


def _add_plane(dataset: Dataset, volume: Volume, k: int) -> None:
    """Position and orientation of slice ``k``: rows run from the top, so the second image axis is turned round."""
    right, up = volume.affine[:3, 0], volume.affine[:3, 1]
    row, column = _LPS * right / np.linalg.norm(right), -_LPS * up / np.linalg.norm(up)
    corner = _LPS * (volume.affine @ np.array([0, volume.shape[1] - 1, k, 1.0]))[:3]
    dataset.ImageOrientationPatient = [_ds(value) for value in (*row, *column)]
    dataset.ImagePositionPatient = [_ds(value) for value in corner]
    dataset.SliceLocation = _ds(float(np.cross(row, column) @ corner))


def _ds(value: float) -> str:
    """A number in the 16 characters of a decimal string."""
    return format_number_as_ds(float(value) + 0.0)
