"""What of a header is kept beside a volume, and how persons are kept out of it.

With ``--anonymize`` an allowlist decides: technical tags of coded or numeric kind stay, everything else goes, free
text, dates and private tags above all. Identifiers become pseudonyms under a secret key: a plain hash of a hospital
number is found again by trying all numbers.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.valuerep import PersonName

from medssl_cli.core.errors import DataError
from medssl_cli.core.run import say_disk_errors

SAFE_TAGS = (
    "AcquisitionMatrix",
    "BitsStored",
    "CTDIvol",
    "Columns",
    "ConvolutionKernel",
    "DataCollectionDiameter",
    "DecayCorrection",
    "DecayFactor",
    "DiffusionBValue",
    "EchoNumbers",
    "EchoTime",
    "EchoTrainLength",
    "Exposure",
    "ExposureTime",
    "FlipAngle",
    "FrameReferenceTime",
    "GantryDetectorTilt",
    "ImageOrientationPatient",
    "ImageType",
    "ImagingFrequency",
    "InPlanePhaseEncodingDirection",
    "InversionTime",
    "KVP",
    "LossyImageCompression",
    "MRAcquisitionType",
    "MagneticFieldStrength",
    "Manufacturer",
    "ManufacturerModelName",
    "Modality",
    "NumberOfAverages",
    "NumberOfPhaseEncodingSteps",
    "NumberOfTemporalPositions",
    "PatientPosition",
    "PercentPhaseFieldOfView",
    "PercentSampling",
    "PhotometricInterpretation",
    "PixelBandwidth",
    "PixelSpacing",
    "ReconstructionDiameter",
    "RepetitionTime",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
    "Rows",
    "SAR",
    "SOPClassUID",
    "ScanOptions",
    "ScanningSequence",
    "SequenceVariant",
    "SliceThickness",
    "SpacingBetweenSlices",
    "SpiralPitchFactor",
    "Units",
    "VariableFlipAngleFlag",
    "XRayTubeCurrent",
)
"""Keywords that remain with ``--anonymize``: coded or numeric, about the scanner's settings only."""

_BINARY = {"OB", "OW", "OF", "OD", "OL", "OV", "UN"}
_KEY_FILE = ".pseudonym_key"
_MAX_TEXT = 1024


class Pseudonyms:
    """Stable stand-ins for identifiers: equal input, equal output, for everyone who holds the key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def patient(self, patient_id: str) -> str:
        """``anon-`` and 12 hexadecimal digits."""
        return "anon-" + self._digest("patient", patient_id)[:12]

    def uid(self, uid: str) -> str:
        """A valid DICOM UID below the root of random UUIDs, 2.25; empty for an empty one."""
        return f"2.25.{int(self._digest('uid', uid)[:30], 16)}" if uid else ""

    def _digest(self, purpose: str, text: str) -> str:
        return hmac.new(self._key, f"{purpose}\0{text}".encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


def open_pseudonyms(out: Path) -> Pseudonyms:
    """The pseudonyms of an output folder; its key is made at the first call, readable by its owner alone.

    Raises:
        DataError: The key file is damaged.
    """
    path = out / _KEY_FILE
    with say_disk_errors(path):
        if not path.exists():
            temporary = out / f"{_KEY_FILE}.{os.getpid()}.{secrets.token_hex(4)}"
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(secrets.token_hex(32))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        text = path.read_text(encoding="ascii", errors="replace").strip()
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) < 32:
        raise DataError(
            "The key of the pseudonyms is damaged.",
            where=str(path),
            fix="put the key back that made this folder, or convert into a new folder",
            code="pseudonym_key",
        )
    return Pseudonyms(key)


def planned_pseudonyms(out: Path) -> Pseudonyms:
    """For a plan that writes nothing: the pseudonyms of ``out`` if it has a key, else those of a throw-away key."""
    return open_pseudonyms(out) if (out / _KEY_FILE).exists() else Pseudonyms(secrets.token_bytes(32))


def kept_tags(header: Dataset, *, anonymize: bool) -> dict[str, Any]:
    """Tags of one header by keyword, as plain data; sequences only without ``anonymize``.

    Private tags, binary values and texts of more than 1024 characters are never kept.
    """
    if anonymize:
        kept = {}
        for keyword in SAFE_TAGS:
            if (value := _plain(header.get(keyword))) not in (None, "", []):
                kept[keyword] = value
        return kept
    return _all_tags(header, depth=0)


def _all_tags(header: Dataset, depth: int) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for tag in header:
        if not tag.keyword or tag.tag.is_private or tag.VR in _BINARY or tag.tag.group == 0x7FE0:
            continue
        if tag.VR == "SQ":
            if depth < 3 and tag.keyword != "PerFrameFunctionalGroupsSequence" and len(tag.value) <= 16:
                kept[tag.keyword] = [_all_tags(item, depth + 1) for item in tag.value]
            continue
        value = _plain(tag.value)
        if value not in (None, "", []) and len(str(value)) <= _MAX_TEXT:
            kept[tag.keyword] = value
    return kept


def _plain(value: Any) -> Any:
    if isinstance(value, (MultiValue, list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, (bytes, Dataset)) or value is None:
        return None
    if isinstance(value, PersonName):
        return str(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    text = str(value)
    try:  # decimal and integer strings are numbers to everyone who reads the JSON
        return float(text) if type(value).__name__ in ("DSdecimal", "Decimal") else text
    except ValueError:
        return text
