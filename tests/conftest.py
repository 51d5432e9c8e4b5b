"""Shared phantoms, and where the real images are."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medssl_cli.core.volume import Volume

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real images, ``MEDSSL_TEST_DATA``; the test is skipped visibly without it."""
    folder = Path(os.environ.get("MEDSSL_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images: {folder} is missing; set MEDSSL_TEST_DATA")
    return folder


@pytest.fixture
def ball() -> Volume:
    """A ball of radius 8 mm at RAS (3, -4, 6) mm in noise, on an oblique-free LAS grid of 0.8 x 0.9 x 3 mm."""
    rng = np.random.default_rng(0)
    affine = np.array([[-0.8, 0, 0, 30.0], [0, 0.9, 0, -40.0], [0, 0, 3.0, -30.0], [0, 0, 0, 1]])
    z, y, x = np.meshgrid(np.arange(20), np.arange(80), np.arange(70), indexing="ij")
    world = np.einsum("ij,j...->i...", affine, np.stack([x, y, z, np.ones_like(x)]))[:3]
    inside = ((world - np.array([3.0, -4.0, 6.0]).reshape(3, 1, 1, 1)) ** 2).sum(0) < 64
    return Volume((100 + 10 * rng.standard_normal(x.shape) + 400 * inside).astype(np.int16), affine)


@pytest.fixture
def write_dicom() -> Callable[..., Volume]:
    """A function that writes a small DICOM series and returns the volume it must become."""
    return write_dicom_series


def write_dicom_series(
    folder: Path,
    *,
    n_slices: int = 6,
    size: tuple[int, int] = (8, 10),
    spacing: tuple[float, float, float] = (3.0, 0.8, 0.7),
    orientation: tuple[float, ...] = (1, 0, 0, 0, 1, 0),
    origin: tuple[float, float, float] = (-3.0, 5.0, -10.0),
    name: str = "im",
    first_instance: int = 1,
    seed: int = 0,
    per_slice: Callable[[int], dict[str, Any]] | None = None,
    **tags: Any,
) -> Volume:
    """Write one classic MR series; ``tags`` and ``per_slice(k)`` are DICOM keywords, None leaves a tag out.

    Returns:
        Its volume, built from the definition of the DICOM tags: (Z, Y, X), spacing (z, y, x) in mm, RAS+.
    """
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset

    row, column = np.array(orientation[:3], float), np.array(orientation[3:], float)
    normal = np.cross(row, column)
    array = np.random.default_rng(seed).integers(0, 2000, (n_slices, *size)).astype(np.uint16)
    defaults: dict[str, Any] = {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.4",
        "PatientName": "Doe^Jane",
        "PatientID": "PAT-1",
        "PatientBirthDate": "19500102",
        "StudyDate": "20200304",
        "StudyTime": "101112",
        "StudyInstanceUID": "1.2.3.4",
        "SeriesInstanceUID": f"1.2.3.4.{seed}",
        "SeriesNumber": 5,
        "SeriesDescription": "t2_tse_tra",
        "Modality": "MR",
        "Manufacturer": "ACME",
        "ImageType": ["ORIGINAL", "PRIMARY", "M"],
        "AcquisitionNumber": 1,
        "EchoTime": 100.0,
        "RepetitionTime": 4000.0,
        "SliceThickness": spacing[0],
        "PixelSpacing": [spacing[1], spacing[2]],
        "ImageOrientationPatient": list(orientation),
        "Rows": size[0],
        "Columns": size[1],
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n_slices):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        values = {
            **defaults,
            "InstanceNumber": first_instance + k,
            "ImagePositionPatient": [round(float(v), 6) for v in np.array(origin) + k * spacing[0] * normal],
            "PixelData": array[k].tobytes(),
            **tags,
            **(per_slice(k) if per_slice else {}),
        }
        values.setdefault("SOPInstanceUID", f"{values['SeriesInstanceUID']}.{values['InstanceNumber']}")
        meta.MediaStorageSOPClassUID = values["SOPClassUID"]
        meta.MediaStorageSOPInstanceUID = values["SOPInstanceUID"]
        image = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        for keyword, value in values.items():
            if value is not None:
                setattr(image, keyword, value)
        image.save_as(folder / f"{name}{first_instance + k:03d}.dcm", enforce_file_format=True)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = row * spacing[2], column * spacing[1], normal * spacing[0]
    affine[:3, 3] = origin
    return Volume(array, np.diag([-1.0, -1, 1, 1]) @ affine)
