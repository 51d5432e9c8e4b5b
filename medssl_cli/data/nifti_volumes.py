"""The volumes of a 4-D NIfTI file as files of their own, bit for bit.

Voxels, scaling, data type, byte order, both affines and extensions stay as they are; only the number of axes changes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from isal import igzip, igzip_lib

from medssl_cli.core.errors import DataError
from medssl_cli.core.run import atomic_path
from medssl_cli.data.images import ImageHeader, read_header, refuse_absent_volume

# NIfTI-1 and NIfTI-2: bytes of the header, where `dim` stands and how, where `vox_offset` stands and how
_NIFTI_1 = (348, 40, "8h", 108, "f")
_NIFTI_2 = (540, 16, "8q", 168, "q")
_DAMAGED: tuple[type[Exception], ...] = (EOFError, OSError, zlib.error, igzip_lib.IsalError)  # type: ignore[assignment]


Read = Callable[[int], bytes]
"""The next bytes of an unpacked file."""


def cut_volumes(path: Path, targets: Mapping[int, Path]) -> None:
    """Write some volumes of a 4-D file, each whole or not at all; memory holds one volume.

    Args:
        path: ``.nii`` or ``.nii.gz`` of four axes.
        targets: Where each volume goes, by its number from 0: a path that ends in ``.nii.gz``.

    Raises:
        DataError: As ``read_header``; too few volumes, or fewer bytes than the header promises.
        ResourceError: The disk is full.
    """
    header = read_header(path)
    count = header.shape[3] if len(header.shape) == 4 else 1
    for number in targets:
        refuse_absent_volume(path, count, number)
    with path.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if zipped:
            with igzip.IGzipFile(fileobj=raw) as unzipped:
                _cut(path, unzipped.read, header, count, targets)
        else:
            _cut(path, raw.read, header, count, targets)


def _cut(path: Path, read: Read, header: ImageHeader, count: int, targets: Mapping[int, Path]) -> None:
    size = int(np.prod(header.shape[:3], dtype=np.int64)) * header.dtype.itemsize
    start = _header_of_one(path, read, header)
    for number in range(count):
        voxels = _read(path, read, size)
        if number in targets:
            with atomic_path(targets[number]) as temporary:
                temporary.write_bytes(igzip.compress(start + voxels, compresslevel=1, mtime=0))


def _header_of_one(path: Path, read: Read, header: ImageHeader) -> bytes:
    """Everything before the voxels, with three axes; what is read next is the first voxel."""
    order = ">" if header.big_endian else "<"
    first = _read(path, read, 4)
    length, dim_at, dim_form, offset_at, offset_form = (
        _NIFTI_1 if struct.unpack(order + "i", first)[0] == _NIFTI_1[0] else _NIFTI_2
    )
    start = bytearray(first + _read(path, read, length - 4))
    (offset,) = struct.unpack_from(order + offset_form, start, offset_at)
    if not length <= offset < 2**31:
        raise _truncated(path, f"vox_offset {offset:g}")  # voxels in a file of their own
    start += _read(path, read, int(offset) - length)
    dim = struct.unpack_from(order + dim_form, start, dim_at)
    struct.pack_into(order + dim_form, start, dim_at, 3, *dim[1:4], 1, 1, 1, 1)
    return bytes(start)


def _read(path: Path, read: Read, count: int) -> bytes:
    try:
        data = read(count)
    except _DAMAGED as error:
        raise _truncated(path, str(error)) from error
    if len(data) < count:
        raise _truncated(path, f"{count - len(data)} bytes are missing")
    return data


def _truncated(path: Path, detail: str) -> DataError:
    return DataError(
        "The image is shorter than its header says.",
        where=f"{path}: {' '.join(detail.split())[:200]}",
        fix="fetch the file again",
        code="nifti_truncated",
    )
