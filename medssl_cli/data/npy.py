"""NumPy files in: pictures of two axes or with colours, and volumes of three; nothing in them is ever unpickled.

A ``.npy`` file tells shape and type and no geometry: a volume is (Z, Y, X), its voxels count as 1 mm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from medssl_cli.core.errors import DataError

SUFFIX = ".npy"
GEOMETRY_NOTE = "NumPy files tell no geometry: volumes are (Z, Y, X) with voxels of 1 x 1 x 1 mm"
MAX_HEADER_BYTES = 10_000
_SAVE_AGAIN = "save it again with numpy.save as a plain array of numbers"

NpyKind = Literal["picture", "volume", "either"]


def is_npy(path: Path) -> bool:
    """Whether the suffix is that of a NumPy file."""
    return path.suffix.lower() == SUFFIX


def open_npy(path: Path) -> np.ndarray:
    """The array as a read-only map of the file: shape and type are known, no value has been read.

    Raises:
        DataError: Missing, empty, shorter than its header says, objects or text instead of numbers, a damaged or
            oversized header.
    """
    try:
        if path.stat().st_size == 0:
            raise _fault(path, "The file is empty.", "file_empty")
        array = np.lib.format.open_memmap(path, mode="r", max_header_size=MAX_HEADER_BYTES)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError("The file is missing.", where=str(path), fix="check the path", code="file_missing") from error
    except Exception as error:  # NumPy evaluates the header: a damaged one raises many kinds
        raise _named(path, str(error)) from error
    if array.dtype.kind not in "biuf":
        raise _fault(path, "The array does not hold plain numbers.", "npy_dtype", str(array.dtype))
    return array


def npy_kind(path: Path) -> NpyKind:
    """What the shape of a file says: a picture, a volume, or ``either`` for three axes of which one could be colours.

    Raises:
        DataError: As ``open_npy``; also one axis, or more than three.
    """
    shape = open_npy(path).shape
    if len(shape) == 2:
        return "picture"
    if len(shape) != 3:
        raise _fault(path, "An array of two or three axes is needed.", "npy_shape", f"shape {shape}")
    return "either" if shape[0] in (1, 3) or shape[2] in (1, 3) else "volume"


def read_npy_picture(path: Path) -> np.ndarray:
    """(H, W), (H, W, 1 or 3) or (1 or 3, H, W) -> (C, H, W) in a type that the store keeps.

    Raises:
        DataError: As ``open_npy``; also another shape.
    """
    array = open_npy(path)
    shape = array.shape
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and shape[0] not in (1, 3) and shape[2] in (1, 3):
        array = array.transpose(2, 0, 1)
    elif array.ndim != 3 or shape[0] not in (1, 3):
        fix = "give (H, W), (H, W, 3) or (3, H, W); name volumes (Z, Y, X) in a table with a path column"
        raise _fault(path, "The array is no picture.", "npy_shape", f"shape {shape}", fix)
    _refuse_empty(path, array)
    return _plain(array)


def read_npy_volume(path: Path) -> np.ndarray:
    """(Z, Y, X) in a type that the store keeps.

    Raises:
        DataError: As ``open_npy``; also another number of axes.
    """
    array = open_npy(path)
    if array.ndim != 3:
        raise _fault(path, "A volume (Z, Y, X) is needed.", "npy_shape", f"shape {array.shape}")
    _refuse_empty(path, array)
    return _plain(array)


def _plain(array: np.ndarray) -> np.ndarray:
    """A copy in memory and in this machine's byte order; bool as 0 and 255, other types as small as they may be."""
    if array.dtype.kind == "b":
        return np.ascontiguousarray(array).astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # becomes infinite, which whoever checks the values refuses
            return np.ascontiguousarray(array, dtype=np.float32)
    kept = (np.uint8, np.int16, np.uint16, np.int32)
    if array.dtype.newbyteorder("=") not in kept:
        low, high = int(array.min()), int(array.max())
        fits = (kind for kind in kept if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max)
        return np.ascontiguousarray(array, dtype=next(fits, np.float32))
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))


def _refuse_empty(path: Path, array: np.ndarray) -> None:
    if array.size == 0:
        raise _fault(path, "The array holds no value.", "npy_shape", f"shape {array.shape}")


def _named(path: Path, text: str) -> DataError:
    """The fault behind a message of NumPy."""
    lower = text.lower()
    if "python objects" in lower:
        return _fault(path, "The array holds Python objects, which are never read.", "npy_objects")
    if "greater than file size" in lower:
        return _fault(path, "The file is shorter than its header says.", "npy_truncated")
    if "magic" in lower:
        return _fault(path, "This is not a NumPy file.", "npy_magic", text)
    return _fault(path, "The header of the NumPy file is damaged or oversized.", "npy_header", text)


def _fault(path: Path, what: str, code: str, detail: str = "", fix: str = _SAVE_AGAIN) -> DataError:
    detail = " ".join(detail.split())[:200]
    return DataError(what, where=f"{path}" + (f": {detail}" if detail else ""), fix=fix, code=code)
