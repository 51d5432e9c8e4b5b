"""Diffusion weighting of one DICOM image: its b-value, its direction, and the mean of several directions.

Vendors keep the b-value in different places. The public tag is read first, then the private one of the vendor whose
private creator (or manufacturer) the header names, so that the same private number of another vendor is never misread.
"""

from __future__ import annotations

import math
import re
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pydicom import Dataset

B_VALUE = (0x0018, 0x9087)
DIRECTIONALITY = (0x0018, 0x9075)
DIRECTION_SEQUENCE = (0x0018, 0x9076)
ORIENTATION = (0x0018, 0x9089)
DIFFUSION_SEQUENCE = (0x0018, 0x9117)
SEQUENCE_NAME = (0x0018, 0x0024)
SIEMENS = ((0x0019, 0x0010), "SIEMENS MR HEADER", "siemens")
SIEMENS_B, SIEMENS_DIRECTION, SIEMENS_GRADIENT = (0x0019, 0x100C), (0x0019, 0x100D), (0x0019, 0x100E)
GE = ((0x0043, 0x0010), "GEMS_PARM_01", "ge ")
GE_B = (0x0043, 0x1039)
GE_GRADIENT = ((0x0019, 0x10BB), (0x0019, 0x10BC), (0x0019, 0x10BD))
PHILIPS = ((0x2001, 0x0010), "PHILIPS IMAGING DD 001", "philips")
PHILIPS_B, PHILIPS_DIRECTION = (0x2001, 0x1003), (0x2001, 0x1004)
PHILIPS_GRADIENT = ((0x2005, 0x10B0), (0x2005, 0x10B1), (0x2005, 0x10B2))

TAGS: tuple[tuple[int, int], ...] = (
    B_VALUE,
    DIRECTIONALITY,
    DIRECTION_SEQUENCE,
    ORIENTATION,
    DIFFUSION_SEQUENCE,
    SEQUENCE_NAME,
    SIEMENS[0],
    SIEMENS_B,
    SIEMENS_DIRECTION,
    SIEMENS_GRADIENT,
    GE[0],
    GE_B,
    (0x0019, 0x0010),
    *GE_GRADIENT,
    PHILIPS[0],
    PHILIPS_B,
    PHILIPS_DIRECTION,
    (0x2005, 0x0010),
    *PHILIPS_GRADIENT,
)
"""Everything that the functions below look at, for a reader that skips the rest."""

ISOTROPIC = "isotropic"
"""Direction of a trace-weighted image: already the mean over directions."""

_MAX_B = 100_000.0  # GE adds 10^9 to mark its own encoding; no scanner reaches 10^5 s/mm2


def b_value(header: Dataset) -> float | None:
    """b-value in s/mm2 of an image or of a functional group of a multi-frame image; None when it is not stated."""
    for place in (header, _first_item(header, DIFFUSION_SEQUENCE)):
        if place is not None and (value := _number(place, B_VALUE)) is not None:
            return value
    if _is_from(header, SIEMENS) and (value := _number(header, SIEMENS_B)) is not None:
        return value
    if _is_from(header, GE) and (value := _number(header, GE_B)) is not None:
        return value % _MAX_B
    if _is_from(header, PHILIPS) and (value := _number(header, PHILIPS_B)) is not None:
        return value
    # Siemens before 2005 says it in the sequence name alone: *ep_b50t, *ep_b800#1; *ep_b50_800 is a map of two
    match = re.fullmatch(r"\*?ep_b(\d+)(t|#\d+)?", str(_value(header, SEQUENCE_NAME) or ""))
    return float(match.group(1)) if match else None


def direction(header: Dataset) -> str:
    """Gradient direction as text that is equal for equal directions; ``isotropic`` for a trace; empty if unknown."""
    diffusion = _first_item(header, DIFFUSION_SEQUENCE)
    for place in (header, diffusion):
        if place is None:
            continue
        if str(_value(place, DIRECTIONALITY) or "").upper() == "ISOTROPIC":
            return ISOTROPIC
        item = _first_item(place, DIRECTION_SEQUENCE)
        if (text := _vector(item if item is not None else place, (ORIENTATION,))) is not None:
            return text
    if _is_from(header, SIEMENS) and (text := _vector(header, (SIEMENS_GRADIENT,))) is not None:
        return text
    if _is_from(header, PHILIPS):
        if str(_value(header, PHILIPS_DIRECTION) or "").strip().upper() == "I":
            return ISOTROPIC
        if (text := _vector(header, PHILIPS_GRADIENT)) is not None:
            return text
    if _is_from(header, GE) and (text := _vector(header, GE_GRADIENT)) is not None:
        return text
    return ""


def combine_directions(volumes: list[np.ndarray], directions: list[str]) -> tuple[np.ndarray, str]:
    """One image of one b-value from its repetitions and directions, and how it was made.

    Repetitions of one direction are averaged. Different directions become the trace-weighted image, their geometric
    mean: exp(-b mean(ADC)) is the n-th root of the product of exp(-b ADC_i). Where the header already holds a trace
    image, that one alone is taken.

    Args:
        volumes: Arrays of equal shape, one for each direction or repetition.
        directions: As ``direction`` gives them, in the same order.

    Returns:
        The array, in the type of the first when it is alone and float32 otherwise; a sentence for the record.
    """
    if ISOTROPIC in directions:
        volumes = [v for v, d in zip(volumes, directions, strict=True) if d == ISOTROPIC]
        directions = [ISOTROPIC] * len(volumes)
    if len(volumes) == 1:
        return volumes[0], "one image"
    by_direction: dict[str, list[np.ndarray]] = {}
    for volume, name in zip(volumes, directions, strict=True):
        by_direction.setdefault(name, []).append(volume)
    means = [np.asarray(np.mean(group, axis=0, dtype=np.float64)) for group in by_direction.values()]
    if len(means) == 1:
        return means[0].astype(np.float32), f"arithmetic mean of {len(volumes)} repetitions"
    positive = np.all([mean > 0 for mean in means], axis=0)
    logs = np.sum([np.log(np.where(positive, mean, 1.0)) for mean in means], axis=0)
    trace = np.asarray(np.where(positive, np.exp(logs / len(means)), 0.0))
    return trace.astype(np.float32), f"geometric mean of {len(means)} directions ({len(volumes)} images)"


def round_b(value: float) -> int:
    """The b-value as it stands in a file name."""
    return math.floor(value + 0.5)


def _is_from(header: Dataset, vendor: tuple[tuple[int, int], str, str]) -> bool:
    creator, name, manufacturer = vendor
    if str(_value(header, creator) or "").strip().upper() == name:
        return True
    return (str(_value(header, (0x0008, 0x0070)) or "").lower() + " ").startswith(manufacturer)


def _value(header: Dataset, tag: tuple[int, int]) -> Any:
    return header[tag].value if tag in header else None


def _first_item(header: Dataset, tag: tuple[int, int]) -> Dataset | None:
    items = _value(header, tag)
    return items[0] if items is not None and not isinstance(items, (bytes, str)) and len(items) else None


def _number(header: Dataset, tag: tuple[int, int]) -> float | None:
    found = numbers(_value(header, tag))
    return found[0] if found and math.isfinite(found[0]) and found[0] >= 0 else None


def _vector(header: Dataset, tags: tuple[tuple[int, int], ...]) -> str | None:
    found = [n for tag in tags for n in numbers(_value(header, tag))]
    if len(found) != 3:
        return None
    return " ".join(f"{n + 0.0:.3f}" for n in np.round(found, 3))


def numbers(value: Any) -> list[float]:
    """Numbers of an element, also where an unknown private tag came as raw bytes."""
    if value is None:
        return []
    if isinstance(value, bytes):
        text = value.decode("ascii", "replace").strip("\0 ")
        if not re.fullmatch(r"[-+.\dEe\\ ]+", text):
            kind = {4: "<f", 8: "<d", 12: "<3f", 24: "<3d"}.get(len(value))
            return [float(n) for n in struct.unpack(kind, value)] if kind else []
        value = text.split("\\")
    parts = [value] if isinstance(value, (str, int, float)) else list(value)
    try:
        return [float(part) for part in parts]
    except (TypeError, ValueError):
        return []
