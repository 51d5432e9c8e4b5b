"""NIfTI, PNG, JPEG and TIFF in and out, NumPy arrays in.

``read_volume`` and ``read_image`` refuse what is not what it says it is.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip, igzip_lib
from PIL import Image, ImageFile

from medssl_cli.core.errors import DataError
from medssl_cli.core.run import atomic_path
from medssl_cli.core.volume import Volume, affine_orientation, affine_spacing
from medssl_cli.core.wording import counted
from medssl_cli.data.npy import is_npy, open_npy, read_npy_picture, read_npy_volume

VOLUME_SUFFIXES = (".nii.gz", ".nii")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".npy")
"""A ``.npy`` file may hold a volume as well: ``npy_kind`` tells."""

MAX_VOXELS = 2**33
"""Largest volume that is read, 8.6 billion voxels: a header beyond it is damage or an attack."""

_HEADER_BYTES = 540
_DAMAGED: tuple[type[Exception], ...] = (EOFError, OSError, zlib.error, igzip_lib.IsalError)  # type: ignore[assignment]
_RECONVERT = "convert the image again from its source"


@dataclass(frozen=True)
class ImageHeader:
    """What a NIfTI file says of itself, before its voxels are read.

    Args:
        shape: (X, Y, Z) or (X, Y, Z, T), as in the file, trailing axes of length 1 removed beyond the third.
        dtype: Stored data type.
        affine: 4x4 float64, voxel -> mm RAS+, as nibabel chooses it (sform, else qform).
        sform, qform: The two affines, None where their code is 0.
        slope, inter: Scaling as stored.
        big_endian: Byte order of the file.
        n_axes: How many axes the file itself declares, 2 for a plane.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    affine: np.ndarray
    sform: np.ndarray | None
    qform: np.ndarray | None
    slope: float
    inter: float
    big_endian: bool
    n_axes: int = 3

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size (z, y, x) in mm."""
        return affine_spacing(self.affine)


def volume_stem(path: Path) -> str | None:
    """File name without ``.nii`` or ``.nii.gz``; None for another kind of file."""
    lower = path.name.lower()
    for suffix in VOLUME_SUFFIXES:
        if lower.endswith(suffix):
            return path.name[: -len(suffix)]
    return None


def is_image(path: Path) -> bool:
    """Whether the suffix is that of a 2-D picture that we read."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def read_header(path: Path) -> ImageHeader:
    """Read and check the header of a NIfTI or NumPy file; only its first bytes are decompressed.

    Raises:
        DataError: Missing, empty, wrong magic, truncated, impossible dimensions, singular affine. ``code`` names which.
    """
    if is_npy(path):
        return _npy_header(path)
    return _parse_header(path, _read_start(path))


def read_volume(path: Path, *, volume_index: int | None = None) -> Volume:
    """Read a NIfTI file, or a NumPy array (Z, Y, X) as a volume with voxels of 1 mm.

    Args:
        path: ``.nii``, ``.nii.gz`` or ``.npy``.
        volume_index: Which volume of a 4-D file; None reads all and gives (T, Z, Y, X).

    Returns:
        A Volume in the stored data type, or float32 where the file scales its values. Non-finite voxels are kept:
        ``check_finite`` or the caller decides.

    Raises:
        DataError: As ``read_header``; also fewer or more bytes than the header promises, or too few volumes.
    """
    header = read_header(path)
    if is_npy(path):
        refuse_absent_volume(path, 1, volume_index)
        return Volume(read_npy_volume(path), header.affine)
    expected = int(np.prod(header.shape, dtype=np.int64)) * header.dtype.itemsize
    data = _read_all(path, limit=expected + 2**20)
    try:
        image = nib.Nifti1Image.from_bytes(data) if data[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c") else None
        if image is None:
            image = nib.Nifti2Image.from_bytes(data)
        unscaled = image.dataobj.get_unscaled()  # type: ignore[attr-defined]  # an ArrayProxy, typed as any array
        array = np.asanyarray(unscaled).reshape(header.shape)
    except DataError:
        raise
    except Exception as error:  # nibabel raises many kinds for a damaged file
        raise _fault(path, "The image is shorter than its header says.", "nifti_truncated", str(error)) from error
    array = _scaled(array, header)
    refuse_absent_volume(path, header.shape[3] if array.ndim == 4 else 1, volume_index)
    if volume_index is not None and array.ndim == 4:
        array = array[..., volume_index]
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("="))
    return Volume(np.ascontiguousarray(array.T), header.affine)


def refuse_absent_volume(path: Path, count: int, volume_index: int | None) -> None:
    """Refuse a volume that a file of ``count`` volumes does not have, rather than take another one for it.

    Raises:
        DataError: ``volume_index`` is beyond the last.
    """
    if volume_index is not None and not 0 <= volume_index < count:
        raise DataError(
            "A 4-D file with more volumes was expected.",
            where=f"{path}: {count} volume{'s' * (count > 1)}, number {volume_index} is asked for, counted from 0",
            fix="name as many channels in dataset.json as the file has volumes, or leave the case out",
            code="volume_absent",
        )


def write_volume(path: Path, volume: Volume, *, scaling: tuple[float, float] | None = None) -> None:
    """Write NIfTI-1 whole or not at all; level 1, sform and qform both set.

    64-bit integers, which other readers refuse, become int32 or, where a value is too large for it, float64.

    Args:
        path: ``.nii`` or ``.nii.gz``.
        volume: Voxels as they are stored.
        scaling: Slope and intercept that a reader applies to them; None leaves the values as they are.

    Raises:
        ValueError: A 64-bit integer has no equal in float64; nothing is written.
    """
    array = volume.array
    if array.dtype == np.bool_:
        array = array.astype(np.uint8)
    if array.dtype.kind in "iu" and array.dtype.itemsize == 8:
        array = _narrowed(array)
    if array.dtype == np.float16:
        array = array.astype(np.float32)
    image = nib.Nifti1Image(array.T, volume.affine)
    image.set_sform(volume.affine, 1)
    image.set_qform(volume.affine, 1)
    image.header.set_xyzt_units("mm", "sec")
    if scaling is not None:
        image.header.set_slope_inter(*scaling)  # nibabel then writes the voxels as they are
    data = image.to_bytes()
    if path.name.endswith(".gz"):
        data = igzip.compress(data, compresslevel=1, mtime=0)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def _narrowed(array: np.ndarray) -> np.ndarray:
    """64-bit integers in a type that every reader knows, with the same values."""
    low, high = int(array.min(initial=0)), int(array.max(initial=0))
    if low >= -(2**31) and high < 2**31:
        return array.astype(np.int32)
    if max(-low, high) < 2**53:
        return array.astype(np.float64)
    raise ValueError(f"voxels from {low} to {high} can be written neither as int32 nor exactly as float64")


def check_finite(path: Path, array: np.ndarray) -> None:
    """Refuse NaN and infinite voxels, naming the first.

    Raises:
        DataError: With the count and one voxel (x, y, z).
    """
    if array.dtype.kind != "f":
        return
    bad = ~np.isfinite(array)
    if bad.any():
        n = int(bad.sum())
        where = tuple(int(i) for i in np.argwhere(bad)[0][::-1])
        raise _fault(
            path,
            f"{counted(n, 'voxel')} {'is' if n == 1 else 'are'} NaN or infinite.",
            "voxels_nonfinite",
            f"first at voxel {where}",
            "mask or replace them before training",
        )


def read_image(path: Path) -> np.ndarray:
    """Read a picture as (C, H, W), C 1 or 3, in the stored depth: uint8, uint16 or float32, of ``.npy`` any plain type.

    Palettes and CMYK become RGB, alpha is dropped, 1-bit becomes 0/255. An EXIF orientation is not applied.

    Raises:
        DataError: Missing, empty, truncated, not a picture, or several pages in one file.
    """
    if is_npy(path):
        return read_npy_picture(path)
    try:
        with Image.open(path) as image:
            pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
            image.load()
            array = _read_deep(path, image.mode) if _is_squeezed(image) else np.asarray(_plain_mode(image))
    except DataError:
        raise
    except FileNotFoundError as error:
        raise _fault(path, "The file is missing.", "file_missing", "", "check the path") from error
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise _fault(path, "The picture cannot be read.", "image_unreadable", str(error), "export it again") from error
    if pages > 1:
        fix = "export the page that is meant; a stack of slices is a volume: convert it to NIfTI"
        raise _fault(path, "The file holds several pages.", "image_pages", f"{pages} pages", fix)
    if array.dtype == np.int32:  # Pillow reads 16-bit grey of some writers as 32-bit
        array = array.astype(np.uint16) if array.min() >= 0 and array.max() < 65536 else array.astype(np.float32)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _plain_mode(image: Image.Image) -> Image.Image:
    """Grey or RGB without alpha, in the depth that Pillow has read."""
    if image.mode in ("1", "LA", "La"):
        return image.convert("L")
    if image.mode in ("L", "RGB", "I", "F") or image.mode.startswith("I;16"):
        return image
    return image.convert("RGB")


def _is_squeezed(image: ImageFile.ImageFile) -> bool:
    """Whether Pillow has cut a deeper picture to 8 bits, as it does with 16 bits in several channels."""
    if image.format == "PNG":
        with open(image.filename, "rb") as file:
            header = file.read(26)
        depth, colour_type = header[24], header[25]
        return depth == 16 and colour_type != 0
    if image.format == "TIFF":
        bits = image.tag_v2.get(258, (1,))  # type: ignore[attr-defined]  # BitsPerSample, one for each channel
        deepest = max(bits) if isinstance(bits, tuple) else bits
        return deepest > 8 and not (image.mode in ("I", "F") or image.mode.startswith("I;16"))
    return False


def _read_deep(path: Path, mode: str) -> np.ndarray:
    """(H, W, 3) uint16 as stored, alpha dropped, read by ITK; ``mode`` is what Pillow makes of the channels."""
    import SimpleITK as sitk

    try:
        array = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    except RuntimeError:
        array = np.empty(0)
    if mode not in ("RGB", "RGBA", "RGBX") or array.ndim != 3 or array.dtype != np.uint16:
        fix = "export it as RGB or grey of 16 bits, or with 8 bits if that is meant"
        raise _fault(path, "The picture would lose its depth.", "image_depth", f"over 8 bits a channel, {mode}", fix)
    return np.ascontiguousarray(array[..., :3])


def write_image(path: Path, image: np.ndarray) -> None:
    """Write (H, W) or (H, W, 3) uint8 as PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")


def _npy_header(path: Path) -> ImageHeader:
    array = open_npy(path)
    size = int(np.prod(array.shape, dtype=np.int64))
    if array.ndim != 3 or not 0 < size <= MAX_VOXELS:
        fix = "name volumes of three axes (Z, Y, X)"
        raise _fault(path, "The array is no volume.", "npy_shape", f"shape {array.shape}", fix)
    return ImageHeader(
        path=path,
        shape=array.shape[::-1],
        dtype=array.dtype,
        affine=np.eye(4),
        sform=None,
        qform=None,
        slope=1.0,
        inter=0.0,
        big_endian=array.dtype.byteorder == ">",
    )


def _read_start(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            head = file.read(2)
            file.seek(0)
            if head == b"\x1f\x8b":
                with igzip.IGzipFile(fileobj=file) as unzipped:
                    return unzipped.read(_HEADER_BYTES)
            return file.read(_HEADER_BYTES)
    except FileNotFoundError as error:
        raise _fault(path, "The file is missing.", "file_missing", "", "check the path") from error
    except IsADirectoryError as error:
        raise _fault(path, "A file was expected, this is a folder.", "file_missing", "", "name the file") from error
    except _DAMAGED as error:
        raise _fault(path, "The image is truncated or damaged.", "nifti_truncated", str(error)) from error


def _read_all(path: Path, limit: int) -> bytes:
    """The whole file, decompressed, but never more than ``limit`` bytes: a gzip bomb stops there."""
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if not zipped:
                return file.read(limit)
            with igzip.IGzipFile(fileobj=file) as unzipped:
                data = unzipped.read(limit)
                if len(data) == limit and unzipped.read(1):
                    raise _fault(
                        path, "The file unpacks to more than its header says.", "nifti_oversized", f"over {limit} bytes"
                    )
                return data
    except _DAMAGED as error:
        raise _fault(path, "The image is truncated or damaged.", "nifti_truncated", str(error)) from error


def _parse_header(path: Path, data: bytes) -> ImageHeader:
    if not data:
        raise _fault(path, "The file is empty.", "file_empty")
    if len(data) < 348:
        raise _fault(path, "The file is too short for a NIfTI header.", "nifti_truncated", f"{len(data)} bytes")
    kind: type[nib.Nifti1Header]
    if data[344:348] in (b"n+1\0", b"ni1\0"):
        kind = nib.Nifti1Header
    elif data[4:8] in (b"n+2\0", b"ni2\0"):
        kind = nib.Nifti2Header
    else:
        raise _fault(path, "This is not a NIfTI file.", "nifti_magic", f"magic {data[344:348]!r}")
    try:
        header = kind.from_fileobj(io.BytesIO(data), check=False)
        dims = [int(n) for n in header["dim"]]
        dtype = header.get_data_dtype()
    except (struct.error, ValueError, KeyError, nib.spatialimages.HeaderDataError) as error:
        raise _fault(path, "The NIfTI header is damaged.", "nifti_header", str(error)) from error
    shape = _checked_shape(path, dims)
    try:
        affine = np.asarray(header.get_best_affine(), dtype=np.float64)
        affine_orientation(affine)
    except (ValueError, nib.spatialimages.HeaderDataError) as error:  # a quaternion longer than 1
        raise _fault(path, "The affine is singular or not finite.", "affine_singular", str(error)) from error
    except DataError as error:
        raise _fault(path, "The affine is singular or not finite.", "affine_singular", error.where) from error
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    return ImageHeader(
        path=path,
        shape=shape,
        dtype=dtype,
        affine=affine,
        sform=np.asarray(header.get_sform()) if int(header["sform_code"]) > 0 else None,
        qform=_qform(header),
        slope=slope,
        inter=inter,
        big_endian=header.endianness == ">",
        n_axes=dims[0],
    )


def _qform(header: nib.Nifti1Header) -> np.ndarray | None:
    if int(header["qform_code"]) <= 0:
        return None
    try:
        return np.asarray(header.get_qform())
    except (ValueError, nib.spatialimages.HeaderDataError):
        return np.full((4, 4), np.nan)  # unusable quaternion: reported by the checks as a disagreement with the sform


def _checked_shape(path: Path, dims: list[int]) -> tuple[int, ...]:
    count = dims[0]
    shape = tuple(dims[1 : count + 1])
    if not 1 <= count <= 7 or any(n < 1 for n in shape):
        raise _fault(path, "The header has impossible dimensions.", "nifti_header", f"dim = {dims}")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    shape = shape + (1,) * (3 - len(shape)) if len(shape) < 3 else shape
    if float(np.prod(np.array(shape, dtype=np.float64))) > MAX_VOXELS:
        raise _fault(path, "The header promises an impossibly large image.", "nifti_huge", f"dim = {dims}")
    if len(shape) > 4:
        raise _fault(path, "Images of more than four dimensions are not read.", "nifti_dimensions", f"dim = {dims}")
    return shape


def _scaled(array: np.ndarray, header: ImageHeader) -> np.ndarray:
    """Slope and intercept applied; slope 0 or NaN means unscaled, as NIfTI says."""
    slope, inter = header.slope, header.inter
    if not np.isfinite(slope) or slope == 0:
        return array
    if not np.isfinite(inter):
        inter = 0.0
    if (slope, inter) == (1.0, 0.0):
        return array
    if array.dtype.kind in "iu" and slope == 1.0 and float(inter).is_integer():
        wide = array.astype(np.int32) + np.int32(inter)
        fits = wide.min(initial=0) >= -32768 and wide.max(initial=0) <= 32767
        return wide.astype(np.int16) if fits else wide
    return array.astype(np.float32) * np.float32(slope) + np.float32(inter)


def _fault(path: Path, what: str, code: str, detail: str = "", fix: str = _RECONVERT) -> DataError:
    detail = " ".join(detail.split())[:200]
    return DataError(what, where=f"{path}" + (f": {detail}" if detail else ""), fix=fix, code=code)
