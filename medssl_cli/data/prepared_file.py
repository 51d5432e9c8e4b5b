"""The bytes of one prepared file: a volume with the facts of its slices, or a shard of pictures with theirs.

A volume is a blosc2 array (S[+1 for the region of interest], Z, Y, X) whose metadata holds one record and, for every
slice of the three axes in turn, the intensity limits of each sequence and place and size of the region of interest.
A shard holds compressed pictures one after another, their records and limits, failures and a footer. Everything that a
loader must know before it reads voxels is worked out here, once.

Letters: S sequences, Z Y X voxels, N slices along one axis, C H W channels and pixels.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import blosc2
import numpy as np

from medssl_cli.core.case import Case
from medssl_cli.core.errors import DataError
from medssl_cli.core.run import hide_home
from medssl_cli.core.volume import affine_spacing
from medssl_cli.data.preprocess import Prepared, PreprocessConfig, prepare_case, prepare_picture, sequence_limits

Kind = Literal["volumes", "images", "labels"]
"""Volumes, pictures, or volumes whose region of interest is a label map with its values."""

Failure = tuple[str, str, str, str]
"""(case_id, path, reason, fix): a line of ``failures.csv``."""

DTYPES = tuple(np.dtype(kind) for kind in (np.uint8, np.int16, np.uint16, np.int32, np.float32))
RECORD = np.dtype(
    [
        ("shape", "<i4", 3),  # (Z, Y, X) of a volume, (C, H, W) of a picture
        ("dtype", "u1"),
        ("roi", "?"),
        ("available", "<u8"),  # bit s is set when sequence s exists
        ("affine", "<f8", (4, 4)),
        ("facts", "<i8"),  # first float of this case in facts.bin
        ("file", "<i8"),  # its row in files.bin
        ("start", "<i8"),  # of a picture: first byte in its shard
        ("bytes", "<i8"),  # of a picture: compressed size
        ("id", "<i8"),  # first byte in ids.bin
        ("id_bytes", "<i4"),
    ]
)
_FOOTER = struct.Struct("<8sqqq")  # magic, first byte of the records, pictures, bytes of the failures
_MAGIC = b"medsslP1"


@dataclass(frozen=True)
class Job:
    """How cases are prepared: what a worker process must know besides the cases.

    Args:
        sequences: Names in channel order.
        preprocess: Grid and intensity limits.
        kind: Volumes, pictures, or volumes with label maps.
        on_error: Whether a bad case ends the build or is listed.
    """

    sequences: tuple[str, ...]
    preprocess: PreprocessConfig
    kind: Kind
    on_error: Literal["stop", "skip"]


def pack_volume(case: Case, job: Job) -> bytes:
    """The bytes of a ``.b2nd`` file: voxels, with record and facts in its metadata."""
    prepared = prepare_case(case, job.sequences, job.preprocess, roi_values=job.kind == "labels")
    record = np.zeros((), RECORD)
    record["shape"] = prepared.images_SZYX.shape[1:]
    record["dtype"] = DTYPES.index(prepared.images_SZYX.dtype)
    record["roi"] = prepared.roi_ZYX is not None
    record["available"] = pack_bits(prepared.available_S)
    record["affine"] = prepared.affine
    planes = prepared.images_SZYX
    if prepared.roi_ZYX is not None:
        planes = np.concatenate([planes, prepared.roi_ZYX[None].astype(planes.dtype)])
    array = blosc2.asarray(planes, contiguous=True, **_layout(prepared))
    array.schunk.vlmeta["medssl"] = record.tobytes() + _facts_of(prepared, job).tobytes()
    if job.kind == "labels" and prepared.roi_ZYX is not None:
        array.schunk.vlmeta["labels"] = np.packbits(np.bincount(prepared.roi_ZYX.ravel(), minlength=256) > 0).tobytes()
    return array.to_cframe()


def _layout(prepared: Prepared) -> dict[str, Any]:
    """Chunks and blocks. A block is the smallest part that is decompressed.

    Thick slices are read along the axial axis nearly always: flat blocks, so that an axial slice decompresses twice
    its own size. Where the voxels are about cubes, every axis is drawn alike: thicker blocks. LZ4 unpacks three times
    as fast as zstd; zstd is taken for flat blocks with interpolated sequences, which it packs by a third smaller.
    """
    z, y, x = prepared.images_SZYX.shape[1:]
    spacing = affine_spacing(prepared.affine)
    flat = spacing.z > 2 * max(spacing.y, spacing.x)
    block = (1, min(z, 2), min(y, 64), min(x, 64)) if flat else (1, min(z, 8), min(y, 32), min(x, 64))
    planes = len(prepared.images_SZYX) + (prepared.roi_ZYX is not None)
    plane_bytes = planes * y * x * prepared.images_SZYX.itemsize
    depth = max(1, min(z, 2**26 // max(1, plane_bytes)))  # chunks of 64 MiB: bounds the memory of packing
    depth = depth if depth == z else max(block[1], depth // block[1] * block[1])
    small = flat and bool(prepared.resampled_S.any())
    return {
        "chunks": (planes, depth, y, x),
        "blocks": block,
        "cparams": blosc2.CParams(
            codec=blosc2.Codec.ZSTD if small else blosc2.Codec.LZ4,
            clevel=1 if small else 5,
            filters=[blosc2.Filter.SHUFFLE if small else blosc2.Filter.BITSHUFFLE],
            filters_meta=[0],
            typesize=prepared.images_SZYX.itemsize,
            nthreads=1,
        ),
        "dparams": blosc2.DParams(nthreads=1),  # written into the file: the same bytes on every machine
    }


def _facts_of(prepared: Prepared, job: Job) -> np.ndarray:
    """float32 rows of every slice of the three axes in turn: low_S, high_S, pixels, mean row, mean column."""
    tables = []
    for axis in range(3):
        count, sequences = prepared.images_SZYX.shape[1 + axis], len(job.sequences)
        rows = np.zeros((count, 2 * sequences + 3), np.float32)
        for s in np.flatnonzero(prepared.available_S):
            rows[:, s], rows[:, sequences + s] = sequence_limits(
                job.sequences[s], prepared.images_SZYX[s], axis, job.preprocess
            )
        rows[:, 2 * sequences :] = _roi_facts(prepared.roi_ZYX, axis, count)
        tables.append(rows.ravel())
    return np.concatenate(tables).astype("<f4")


def _roi_facts(roi_ZYX: np.ndarray | None, axis: int, count: int) -> np.ndarray:
    """(N, 3): pixels, mean row and column of what is not 0 on every slice; the means are NaN without pixels."""
    facts = np.full((count, 3), np.nan)
    facts[:, 0] = 0
    if roi_ZYX is not None:
        planes = np.moveaxis(roi_ZYX != 0, axis, 0)
        by_row, by_column = planes.sum(2), planes.sum(1)
        pixels = by_row.sum(1)
        some = pixels > 0
        facts[:, 0] = pixels
        facts[some, 1] = by_row[some] @ np.arange(by_row.shape[1]) / pixels[some]
        facts[some, 2] = by_column[some] @ np.arange(by_column.shape[1]) / pixels[some]
    return facts


def pack_pictures(cases: list[Case], job: Job) -> tuple[bytes, list[Failure]]:
    """The bytes of a shard: compressed pictures, records, (low, high) of each, failures, footer.

    A failed picture keeps its record with no bytes, so that positions stay.
    """
    blobs: list[bytes] = []
    records, limits = np.zeros(len(cases), RECORD), np.zeros((len(cases), 2), "<f4")
    failures: list[Failure] = []
    for number, case in enumerate(cases):
        try:
            picture = prepare_picture(case, job.preprocess)
        except DataError as error:
            if job.on_error == "stop":
                raise
            failures.append(failure_of(case, error))
            continue
        image = np.ascontiguousarray(picture.image_CHW)
        record = records[number]
        record["start"] = sum(len(blob) for blob in blobs)
        blobs.append(_pack_picture(image))
        record["bytes"] = len(blobs[-1])
        record["shape"], record["dtype"] = image.shape, DTYPES.index(image.dtype)
        record["available"], record["affine"] = 1, np.eye(4)
        limits[number] = picture.low, picture.high
    told = json.dumps(failures).encode()
    at = sum(len(blob) for blob in blobs)
    footer = _FOOTER.pack(_MAGIC, at, len(cases), len(told))
    return b"".join([*blobs, records.tobytes(), limits.tobytes(), told, footer]), failures


def _pack_picture(image_CHW: np.ndarray) -> bytes:
    return blosc2.compress2(
        image_CHW,
        codec=blosc2.Codec.ZSTD,  # half the bytes of LZ4 on photographs, and still 0.3 ms for 3 x 257 x 384
        clevel=1,
        filters=[blosc2.Filter.BITSHUFFLE],
        filters_meta=[0],
        typesize=image_CHW.itemsize,
        nthreads=1,
    )


class Shard(NamedTuple):
    """All of a shard but its pictures."""

    records: np.ndarray
    limits: np.ndarray
    failures: list[Failure]


def read_shard(path: Path) -> Shard:
    """Records, limits and failures of a shard; no picture is read."""
    with path.open("rb") as file:
        file.seek(-_FOOTER.size, os.SEEK_END)
        magic, at, count, told = _FOOTER.unpack(file.read(_FOOTER.size))
        if magic != _MAGIC:
            raise ValueError(f"{path} is not a shard of pictures")
        file.seek(at)
        records = np.frombuffer(file.read(count * RECORD.itemsize), RECORD).copy()
        limits = np.frombuffer(file.read(count * 8), "<f4").reshape(count, 2)
        failures = [(f[0], f[1], f[2], f[3]) for f in json.loads(file.read(told))]
    return Shard(records, limits, failures)


def failure_of(case: Case, error: DataError) -> Failure:
    """The line of ``failures.csv`` for a case that could not be prepared; home folders are written as ``~``."""
    path = next((str(s.path) for s in case.sequences.values() if str(s.path) in error.where), "")
    return case.case_id, hide_home(path or error.where), hide_home(f"{error.what} {error.where}"), error.fix


def read_facts(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(record, facts) of a prepared volume."""
    array = open_volume(path)  # a name of its own: the metadata goes with the array
    data = array.schunk.vlmeta["medssl"]
    record = np.frombuffer(data[: RECORD.itemsize], RECORD).copy().reshape(())
    return record, np.frombuffer(data[RECORD.itemsize :], "<f4")


def read_label_bits(path: Path) -> bytes:
    """Which of the values 0 to 255 the label map of a prepared volume holds: 32 bytes, as ``numpy.packbits``."""
    array = open_volume(path)
    return bytes(array.schunk.vlmeta["labels"])


def open_volume(path: Path) -> blosc2.NDArray:
    """A prepared volume, opened for reading on one thread; nothing is decompressed yet."""
    return blosc2.open(str(path), mode="r", dparams=blosc2.DParams(nthreads=1))


def pack_bits(available_S: np.ndarray) -> int:
    """Bit s is set when sequence s exists."""
    return sum(1 << s for s, there in enumerate(available_S) if there)


def unpack_bits(bits: int, count: int) -> np.ndarray:
    """The reverse of ``pack_bits``: (count,) bool."""
    return np.array([bool(bits >> s & 1) for s in range(count)])
