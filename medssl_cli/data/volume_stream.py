"""A NIfTI file of several volumes on one grid, written plane by plane: none of them has to fit into memory.

Letters: C volumes, Z Y X voxels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import nibabel as nib
import numpy as np
from isal import igzip

from medssl_cli.core.run import atomic_path

_OFFSET = 352
"""Bytes before the voxels: the header of NIfTI-1 and four that say that no extension follows."""


def write_volumes(path: Path, volumes_CZYX: np.ndarray, affine: np.ndarray) -> None:
    """Write (C, Z, Y, X) as NIfTI-1 with the axes x, y, z, volume, whole or not at all; one volume as a 3-D file.

    Args:
        path: ``.nii`` or ``.nii.gz``.
        volumes_CZYX: Perhaps on the disk (``numpy.memmap``); float32 or another type of NIfTI-1.
        affine: 4x4, voxel (x, y, z, 1) -> mm, RAS+; set as sform and qform, as ``write_volume`` does.
    """
    with atomic_path(path) as temporary, _opened(temporary) as file:
        _header(volumes_CZYX, affine).write_to(file)
        for volume_ZYX in volumes_CZYX:
            for plane_YX in volume_ZYX:  # x runs fastest in both
                file.write(np.ascontiguousarray(plane_YX).tobytes())


def _header(volumes_CZYX: np.ndarray, affine: np.ndarray) -> nib.Nifti1Header:
    count, *shape = volumes_CZYX.shape
    header = nib.Nifti1Header()
    header.set_data_shape((*reversed(shape), count) if count > 1 else tuple(reversed(shape)))
    header.set_data_dtype(volumes_CZYX.dtype)
    header.set_sform(affine, 1)
    header.set_qform(affine, 1)
    header.set_xyzt_units("mm", "sec")
    header.set_slope_inter(1, 0)
    header["magic"] = b"n+1"
    header["vox_offset"] = _OFFSET
    return header


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    if not path.name.endswith(".gz"):
        with path.open("wb") as file:
            yield file
        return
    with path.open("wb") as raw, igzip.IGzipFile(fileobj=raw, mode="wb", compresslevel=1, mtime=0) as file:
        yield file  # type: ignore[misc]  # a file of bytes, typed as what it derives from
