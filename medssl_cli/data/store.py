"""The prepared store: volumes decoded once, any slice on any axis in about a millisecond; pictures packed in shards.

::

    <cache>/cases/ab/<key>.b2nd      one case: (S[+1 for the region of interest], Z, Y, X) and the facts of its slices
    <cache>/pictures/ab/<key>.pack   128 pictures of an image tree with their facts
    <cache>/<digest>/                index of one set of cases: store.json, table.bin, facts.bin, ids.bin, files.bin,
                                     and labels.bin where the region of interest is a label map

A file's key is a digest of the paths, sizes and times of its sources, the sequence names, the preprocessing and the
format, so a file that exists is complete and current, and two sets of cases share what they have in common. The index
is memory-mapped: opening costs the same for ten cases and for a million, and loader processes share its pages.
Pictures are packed because thousands of files of a few hundred bytes cost an inode, a block and a lookup each.

Letters: S sequences, Z Y X voxels, N slices along one axis, C H W channels and pixels.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import blosc2
import numpy as np
import SimpleITK as sitk

from medssl_cli.core.case import Case
from medssl_cli.core.errors import ConfigError, DataError, ResourceError
from medssl_cli.core.run import (
    atomic_path,
    digest_of,
    publish_folder,
    say_disk_errors,
    temporary_folder,
    to_json,
)
from medssl_cli.core.volume import Slice, Spacing, affine_spacing
from medssl_cli.data.prepared_file import (
    DTYPES,
    RECORD,
    Failure,
    Job,
    Kind,
    failure_of,
    open_volume,
    pack_pictures,
    pack_volume,
    read_facts,
    read_label_bits,
    read_shard,
    unpack_bits,
)
from medssl_cli.data.preprocess import PreprocessConfig, naming_case, scale_to_unit

log = logging.getLogger(__name__)

FORMAT = 2
"""Raised whenever the bytes of a prepared file change their meaning: older stores are then built anew."""

PICTURES_PER_SHARD = 128
OPEN_FILES = 64

Window = tuple[int, int, int, int]
"""(top, left, height, width) in pixels of a slice."""

_KEY_BYTES = 32
_LABEL_BYTES = 32  # a bit for each value of a label map
_STALE_S = 3600
_LATER_KEYS = ("window_hu", "window_sequences")
"""Settings of the preprocessing that came after the first stores: unset, they are no part of a key."""


@dataclass(frozen=True)
class StoredSlice(Slice):
    """A slice in the data type of the store, with the values of each sequence that become 0 and 1.

    In a store of label maps ``labels_HW`` holds their values, uint8, and ``roi_HW`` is where these are not 0.
    """

    low_S: np.ndarray
    high_S: np.ndarray
    labels_HW: np.ndarray | None = None

    def scaled(self) -> np.ndarray:
        """(S, H, W) float32 in [0, 1]; an absent sequence is all zeros."""
        return scale_to_unit(self.image_SHW, self.low_S, self.high_S)


class SliceFacts(NamedTuple):
    """What is known of every slice of one case along one axis, without reading a voxel."""

    low_NS: np.ndarray
    high_NS: np.ndarray
    roi_pixels_N: np.ndarray
    """Pixels of the region of interest; 0 when the case has none."""
    roi_centre_N2: np.ndarray
    """Mean (row, column) of those pixels; NaN where there are none."""


@dataclass(frozen=True)
class CaseFacts:
    """What is known of one case without reading a voxel.

    Args:
        case_id: Whose.
        shape: (Z, Y, X), or (C, H, W) of a picture.
        dtype: As stored.
        affine: 4x4 float64 of the prepared grid (identity for a picture).
        available_S: Which sequences exist.
        roi: Whether a region of interest is stored.
    """

    case_id: str
    shape: tuple[int, int, int]
    dtype: np.dtype
    affine: np.ndarray
    available_S: np.ndarray
    roi: bool

    @property
    def spacing(self) -> Spacing:
        """Voxel size (z, y, x) in mm."""
        return affine_spacing(self.affine)


class Store:
    """Prepared cases on disk. Cheap to open and to copy into another process: files open when they are first read.

    Args:
        cache: Folder given to ``build_store``.
        digest: Name of the set of cases.

    Raises:
        DataError: There is no complete store of that name.
    """

    def __init__(self, cache: Path, digest: str) -> None:
        self.cache, self.digest = cache, digest
        self.folder = cache / digest
        try:
            about = json.loads((self.folder / "store.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                "There is no prepared store here.",
                where=f"{self.folder}: {error}",
                fix="run `medssl pretrain` on the data; it builds the store",
                code="store_missing",
            ) from error
        self.kind: Kind = about["kind"]
        self.sequences: tuple[str, ...] = tuple(about["sequences"])
        self.preprocess = PreprocessConfig.model_validate(about["preprocess"])
        self.failures: list[Failure] = [(f[0], f[1], f[2], f[3]) for f in about["failures"]]
        self.size_bytes: int = about["size_bytes"]
        self.channels: int = about["channels"]
        self._count: int = about["cases"]
        self._local = _Local()

    @classmethod
    def open(cls, folder: Path) -> Store:
        """The store whose index lies in ``folder`` (``<cache>/<digest>``)."""
        return cls(folder.parent, folder.name)

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_local": _Local()}

    def case_id(self, case: int) -> str:
        """Id of the case at position ``case``."""
        record = self._table[case]
        return bytes(self._ids[record["id"] : record["id"] + record["id_bytes"]]).decode("utf-8", "surrogatepass")

    def case_ids(self) -> list[str]:
        """All ids, in order."""
        return [self.case_id(case) for case in range(len(self))]

    def facts(self, case: int) -> CaseFacts:
        """Shape, place and contents of one case."""
        record = self._table[case]
        z, y, x = (int(n) for n in record["shape"])
        return CaseFacts(
            case_id=self.case_id(case),
            shape=(z, y, x),
            dtype=DTYPES[record["dtype"]],
            affine=np.array(record["affine"]),
            available_S=unpack_bits(int(record["available"]), len(self.sequences)),
            roi=bool(record["roi"]),
        )

    def spacings(self) -> np.ndarray:
        """(cases, 3) voxel sizes (z, y, x) in mm."""
        return np.linalg.norm(self._table["affine"][:, :3, :3], axis=1)[:, ::-1]

    def is_eight_bit(self) -> bool:
        """Whether every case holds whole numbers from 0 to 255 alone: these are kept as bytes."""
        return bool((self._table["dtype"] == DTYPES.index(np.dtype(np.uint8))).all())

    def roi_cases(self) -> np.ndarray:
        """Positions of the cases that have a region of interest."""
        return np.flatnonzero(self._table["roi"])

    def slice_facts(self, case: int, axis: int) -> SliceFacts:
        """Limits and region of interest of every slice along ``axis``; views of the mapped index."""
        record = self._table[case]
        shape, sequences = record["shape"], len(self.sequences)
        width = 2 * sequences + 3
        start = int(record["facts"]) + width * int(shape[:axis].sum())
        rows = self._facts[start : start + width * int(shape[axis])].reshape(int(shape[axis]), width)
        return SliceFacts(
            rows[:, :sequences],
            rows[:, sequences : 2 * sequences],
            rows[:, 2 * sequences].astype(np.int64),
            rows[:, 2 * sequences + 1 :],
        )

    def label_values(self, case: int) -> np.ndarray:
        """Values that the label map of a case holds, rising; no voxel is read.

        Raises:
            ValueError: The store keeps no label maps.
        """
        if self.kind != "labels":
            raise ValueError(f"a store of {self.kind} has no label maps")
        bits = self._mapped("labels.bin", np.dtype("u1"))[_LABEL_BYTES * case : _LABEL_BYTES * (case + 1)]
        return np.flatnonzero(np.unpackbits(bits))

    def read_labels(self, case: int, axis: int, index: int) -> np.ndarray:
        """(H, W) uint8 values of the label map on one plane; no image is read.

        Raises:
            DataError: The prepared file is missing or damaged.
            ValueError: The store keeps no label maps.
        """
        if self.kind != "labels":
            raise ValueError(f"a store of {self.kind} has no label maps")
        key: list[slice | int] = [len(self.sequences), slice(None), slice(None), slice(None)]
        key[1 + axis] = index
        return self._read_volume_part(case, self._table[case], tuple(key)).astype(np.uint8)

    def read_slice(
        self, case: int, axis: int, index: int, *, window: Window | None = None, roi: bool = True
    ) -> StoredSlice:
        """One plane of all sequences.

        Args:
            case: Position of the case.
            axis: Array axis that is cut (AXIAL, CORONAL, SAGITTAL).
            index: Position on that axis.
            window: Part of the plane to read; the whole when None.
            roi: Read the region of interest too, where there is one; False never touches it.

        Raises:
            DataError: The prepared file is missing or damaged.
        """
        record = self._table[case]
        facts = self.slice_facts(case, axis)
        rest = [n for n in range(3) if n != axis]
        top, left, height, width = window or (0, 0, *(int(record["shape"][n]) for n in rest))
        sequences = len(self.sequences)
        with_roi = roi and bool(record["roi"])
        key: list[slice | int] = [slice(0, sequences + with_roi), 0, 0, 0]
        key[1 + axis] = index
        key[1 + rest[0]], key[1 + rest[1]] = slice(top, top + height), slice(left, left + width)
        planes = self._read_volume_part(case, record, tuple(key))
        spacing = affine_spacing(record["affine"])
        return StoredSlice(
            image_SHW=planes[:sequences],
            roi_HW=planes[sequences] != 0 if with_roi else None,
            labels_HW=planes[sequences].astype(np.uint8) if with_roi and self.kind == "labels" else None,
            axis=axis,
            index=index,
            spacing=(spacing[rest[0]], spacing[rest[1]]),
            available_S=unpack_bits(int(record["available"]), sequences),
            low_S=np.array(facts.low_NS[index]),
            high_S=np.array(facts.high_NS[index]),
        )

    def read_volume(self, case: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(images_SZYX, roi_ZYX or None) of one case; in a store of label maps roi_ZYX holds their values, uint8."""
        record = self._table[case]
        planes = self._read_volume_part(case, record, (slice(None),) * 4)
        sequences = len(self.sequences)
        if self.kind == "labels":
            return planes[:sequences], planes[sequences].astype(np.uint8)
        return planes[:sequences], planes[sequences] != 0 if record["roi"] else None

    def read_picture(self, case: int) -> tuple[np.ndarray, float, float]:
        """(image_CHW as stored, low, high): the values that become 0 and 1."""
        record = self._table[case]
        low, high = self._facts[int(record["facts"]) : int(record["facts"]) + 2]
        with self._naming_damage(case, record):
            data = os.pread(self._shard(int(record["file"])), int(record["bytes"]), int(record["start"]))
            image = np.frombuffer(blosc2.decompress2(data, nthreads=1), DTYPES[record["dtype"]])
            return image.reshape(record["shape"]), float(low), float(high)

    def close(self) -> None:
        """Close every file; reading opens them again."""
        self._local = _Local()

    # ------------------------------------------------------------------------------------------------------------------

    @property
    def _table(self) -> np.ndarray:
        return self._mapped("table.bin", RECORD)

    @property
    def _facts(self) -> np.ndarray:
        return self._mapped("facts.bin", np.dtype("<f4"))

    @property
    def _ids(self) -> np.ndarray:
        return self._mapped("ids.bin", np.dtype("u1"))

    def _mapped(self, name: str, dtype: np.dtype) -> np.ndarray:
        mapped = self._local.maps.get(name)
        if mapped is None:
            mapped = np.memmap(self.folder / name, dtype, mode="r").view(np.ndarray)
            self._local.maps[name] = mapped
        return mapped

    def _file(self, number: int) -> Path:
        keys = self._mapped("files.bin", np.dtype("u1"))
        key = bytes(keys[_KEY_BYTES * number : _KEY_BYTES * (number + 1)]).hex()
        return _unit_path(self.cache, self.kind, key)

    def _read_volume_part(self, case: int, record: np.void, key: tuple[slice | int, ...]) -> np.ndarray:
        with self._naming_damage(case, record):
            files = self._local.fresh().volumes
            number = int(record["file"])
            array = files.pop(number, None)
            if array is None:
                array = open_volume(self._file(number))
            files[number] = array
            if len(files) > OPEN_FILES:
                files.popitem(last=False)
            return array[key]

    def _shard(self, number: int) -> int:
        shards = self._local.fresh().shards
        shard = shards.pop(number, None) or _Descriptor(self._file(number))
        shards[number] = shard
        if len(shards) > OPEN_FILES:
            shards.popitem(last=False)
        return shard.number

    @contextlib.contextmanager
    def _naming_damage(self, case: int, record: np.void) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            path = self._file(int(record["file"]))
            raise DataError(
                "A prepared file is missing or damaged.",
                where=f"case {self.case_id(case)}: {path}: {error}",
                fix="delete that file if it is there, and run the same command again: it is prepared anew",
                code="store_damaged",
            ) from error


class _Descriptor:
    """An open file, closed when it is forgotten; read with ``pread``, so that forked processes may share it."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class _Local:
    """Open files of one process."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.maps: dict[str, np.ndarray] = {}
        self.volumes: OrderedDict[int, blosc2.NDArray] = OrderedDict()
        self.shards: OrderedDict[int, _Descriptor] = OrderedDict()

    def fresh(self) -> _Local:
        """Itself, emptied of handles that were opened before a fork; the read-only maps stay shared."""
        if self.process != os.getpid():
            self.process = os.getpid()
            self.volumes = OrderedDict()
            self.shards = OrderedDict()
        return self


# --- building --------------------------------------------------------------------------------------------------------


def default_cache(cache: Path | None = None) -> Path:
    """Where prepared data is kept: as given, else ``MEDSSL_CACHE``, else ``medssl`` in the user's cache folder."""
    if cache is not None:
        return cache
    named = os.environ.get("MEDSSL_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medssl"


def data_digest(cases: Iterable[Case], sequences: tuple[str, ...], preprocess: PreprocessConfig, kind: Kind) -> str:
    """Name of a set of cases as prepared: changes with any file, its place, size or time, and with the preprocessing.

    Raises:
        DataError: A file is missing.
    """
    return _digest([_case_key(case, _base(sequences, preprocess, kind)) for case in cases])


def build_store(
    cases: list[Case],
    sequences: tuple[str, ...],
    preprocess: PreprocessConfig,
    cache: Path,
    *,
    kind: Kind = "volumes",
    workers: int = 1,
    on_error: Literal["stop", "skip"] = "stop",
    progress: Callable[[int, int], None] | None = None,
) -> Store:
    """Prepare what is not yet prepared, and open the store.

    Each file is written whole or not at all and finished files are kept, so a build that was killed goes on where it
    stopped. Two processes that build the same store take turns; two that share some cases write the same bytes.

    Args:
        cases: Which; their order is that of the store.
        sequences: Names in channel order; for pictures any one name.
        preprocess: How.
        cache: Folder for prepared data, made if missing.
        kind: ``volumes``, ``images`` for one picture a case, or ``labels`` for volumes that each have a label map.
        workers: Processes that prepare; 1 works in this one.
        on_error: ``stop`` raises the first fault in the order of the cases; ``skip`` leaves such cases out and lists
            them in ``Store.failures``.
        progress: Called with (cases done, cases in all).

    Raises:
        ConfigError: ``cache`` is a file.
        DataError: No cases, a case twice, a bad case with ``stop``, or nothing left with ``skip``.
        ResourceError: The disk is full; says how many bytes are needed. Finished cases stay.
    """
    _check_cases(cases, sequences)
    if cache.exists() and not cache.is_dir():
        raise ConfigError(
            "The cache is a file.", where=str(cache), fix="name a folder with --cache", code="cache_is_file"
        )
    keys, failures = _case_keys(cases, _base(sequences, preprocess, kind), on_error)
    digest = _digest([key or f"unreadable {case.case_id}" for case, key in zip(cases, keys, strict=True)])
    job = Job(sequences, preprocess, kind, on_error)
    report = progress or (lambda done, total: None)
    units = _plan_units(cases, keys, cache, kind)
    with say_disk_errors(cache), _taking_turns(cache / "locks" / f"{digest}.lock"):
        if not _is_complete(cache, digest, units, on_error):
            _remove_leftovers(cache)
            failures += _prepare_units(units, job, workers, len(cases), report)
            _write_index(cache, digest, units, job, failures)
    report(len(cases), len(cases))
    return Store(cache, digest)


def estimate_bytes(cases: list[Case]) -> int:
    """Size of the source files: what a store of them is expected to take on disk, rounded up by a quarter."""
    return sum(_source_bytes(case) for case in cases) * 5 // 4


@dataclass(frozen=True)
class _Unit:
    """The cases that share one prepared file: one volume case, or up to 128 pictures."""

    key: str
    path: Path
    cases: list[Case] = field(repr=False)


def _prepare_units(
    units: list[_Unit], job: Job, workers: int, total: int, report: Callable[[int, int], None]
) -> list[Failure]:
    missing = [unit for unit in units if not _is_usable(unit, job)]
    done = total - sum(len(unit.cases) for unit in missing)
    report(done, total)
    failures: list[Failure] = []
    for unit, found in _run_units(missing, job, workers):
        failures += found
        done += len(unit.cases)
        report(done, total)
    return failures


def _is_usable(unit: _Unit, job: Job) -> bool:
    """Whether the file is there; one that lists failures is made again when failures are to stop the run."""
    if not unit.path.exists():
        return False
    return job.kind != "images" or job.on_error == "skip" or not read_shard(unit.path).failures


def _run_units(units: list[_Unit], job: Job, workers: int) -> Iterator[tuple[_Unit, list[Failure]]]:
    """(unit, failures) in order; at most a few units a worker are under way, so memory does not grow with the set."""
    sizes = [estimate_bytes(unit.cases) for unit in units]
    needed = [sum(sizes)]
    for size in sizes:
        needed.append(needed[-1] - size)
    if workers <= 1 or len(units) < 2:
        for unit, bytes_needed in zip(units, needed, strict=False):
            yield unit, _prepare_unit(unit, job, bytes_needed)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would copy locks that threads of torch or ITK hold
    with ProcessPoolExecutor(min(workers, len(units)), spawn, initializer=_start_worker) as pool:
        waiting: OrderedDict[int, Future[list[Failure]]] = OrderedDict()
        ahead = 2 * workers
        try:
            for number in range(len(units) + ahead):
                if number < len(units):
                    waiting[number] = pool.submit(_prepare_unit, units[number], job, needed[number])
                if number >= ahead:
                    first = next(iter(waiting))
                    found = waiting[first].result()
                    del waiting[first]
                    yield units[first], found
        except BrokenProcessPool as error:
            raise ResourceError(
                "A process that prepares cases was killed.",
                where=f"at case {units[next(iter(waiting), 0)].cases[0].case_id} or soon after",
                fix="give it more memory or use fewer workers; the same command goes on where it stopped",
                code="worker_killed",
            ) from error
        finally:
            for answer in waiting.values():
                answer.cancel()


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    blosc2.set_nthreads(1)


def _end_with_parent() -> None:
    """A killed parent leaves no workers behind, waiting for cases that never come."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _prepare_unit(unit: _Unit, job: Job, needed: int) -> list[Failure]:
    """Write one prepared file; the failures among its cases."""
    failures: list[Failure] = []
    if job.kind == "images":
        content, failures = pack_pictures(unit.cases, job)
    else:
        try:
            content = pack_volume(unit.cases[0], job)
        except DataError as error:
            if job.on_error == "stop":
                raise
            return [failure_of(unit.cases[0], error)]
    disk = functools.partial(say_disk_errors, unit.path, max(needed, len(content)))
    with disk(), atomic_path(unit.path) as temporary, disk():
        temporary.write_bytes(content)
    return failures


# --- keys ------------------------------------------------------------------------------------------------------------


def _base(sequences: tuple[str, ...], preprocess: PreprocessConfig, kind: Kind) -> tuple[object, ...]:
    names = sequences if kind != "images" else ()
    values = preprocess.model_dump(mode="json")
    return FORMAT, kind, names, {k: v for k, v in values.items() if k not in _LATER_KEYS or v is not None}


def _case_keys(
    cases: list[Case], base: tuple[object, ...], on_error: Literal["stop", "skip"]
) -> tuple[list[str], list[Failure]]:
    """The key of each case, empty for those whose files cannot be looked at."""
    keys, failures = [], []
    for case in cases:
        try:
            keys.append(_case_key(case, base))
        except DataError as error:
            if on_error == "stop":
                raise
            keys.append("")
            failures.append(failure_of(case, error))
    return keys, failures


def _case_key(case: Case, base: tuple[object, ...]) -> str:
    files = [(s.name, s.volume_index, *_fingerprint(s.path, case)) for s in case.sequences.values()]
    roi = None if case.roi is None else _fingerprint(case.roi, case)
    return digest_of(base, case.case_id, files, roi)


def _fingerprint(path: Path, case: Case) -> tuple[str, int, int]:
    """(resolved path, bytes, time in ns) of a file."""
    try:
        facts = os.stat(path)
    except OSError as error:
        with naming_case(case):
            raise DataError(
                "The file is missing.", where=f"{path}: {error.strerror}", fix="check the path", code="file_missing"
            ) from error
    return f"{_real_folder(str(path.parent))}/{path.name}", facts.st_size, facts.st_mtime_ns


@functools.lru_cache(maxsize=1024)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def _digest(keys: list[str]) -> str:
    return digest_of(FORMAT, keys)


def _check_cases(cases: list[Case], sequences: tuple[str, ...]) -> None:
    if not cases:
        raise DataError("There are no cases to prepare.", fix="check the data root and the split CSV", code="no_cases")
    if not 1 <= len(sequences) <= 64 or len(set(sequences)) != len(sequences):
        raise ValueError(f"1 to 64 different sequence names are needed, got {sequences}")
    seen: set[str] = set()
    for case in cases:
        if case.case_id in seen:
            raise DataError(
                "A case id occurs twice.",
                where=case.case_id,
                fix="give each case one id, and each id one line in the split CSV",
                code="case_twice",
            )
        seen.add(case.case_id)


def _plan_units(cases: list[Case], keys: list[str], cache: Path, kind: Kind) -> list[_Unit]:
    known = [(case, key) for case, key in zip(cases, keys, strict=True) if key]
    if kind != "images":
        return [_Unit(key, _unit_path(cache, kind, key), [case]) for case, key in known]
    units = []
    for start in range(0, len(known), PICTURES_PER_SHARD):
        part = known[start : start + PICTURES_PER_SHARD]
        key = digest_of([key for _, key in part])
        units.append(_Unit(key, _unit_path(cache, kind, key), [case for case, _ in part]))
    return units


def _unit_path(cache: Path, kind: Kind, key: str) -> Path:
    folder, suffix = ("cases", ".b2nd") if kind != "images" else ("pictures", ".pack")
    return cache / folder / key[:2] / f"{key}{suffix}"


def _source_bytes(case: Case) -> int:
    total = 0
    for path in [*(s.path for s in case.sequences.values()), *([case.roi] if case.roi else [])]:
        with contextlib.suppress(OSError):  # a missing file takes no room; it is reported where it is read
            total += path.stat().st_size
    return total


# --- index -----------------------------------------------------------------------------------------------------------


def _is_complete(cache: Path, digest: str, units: list[_Unit], on_error: str) -> bool:
    """Whether the index is there, with every file that it names, and no failure that should have stopped it."""
    if not (cache / digest / "store.json").exists():
        return False
    failed = {failure[0] for failure in Store(cache, digest).failures}
    if failed and on_error == "stop":
        return False
    gone = [unit for unit in units if not unit.path.exists() and unit.cases[0].case_id not in failed]
    if gone:
        log.warning("%d prepared files are gone from %s and are prepared anew", len(gone), cache)
    return not gone


def _write_index(cache: Path, digest: str, units: list[_Unit], job: Job, failures: list[Failure]) -> None:
    """Gather the facts of every file into the mapped tables, one after another: memory stays flat."""
    told = {failure[0] for failure in failures}
    temporary = temporary_folder(cache, digest[:16])
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        tables = stack.enter_context(_Tables(temporary, labels=job.kind == "labels"))
        for unit in units:
            if unit.path.exists():  # a volume that failed has none
                failures += [f for f in tables.add(unit, job) if f[0] not in told]
        if not tables.cases:
            raise DataError(
                "No case could be prepared.",
                where="\n".join(f"{case}: {reason}" for case, _, reason, _ in failures[:10]),
                fix="mend the first of them and run again; `medssl check-data` lists every fault",
                code="no_cases",
            )
        tables.close()
        about = {
            "format": FORMAT,
            "kind": job.kind,
            "sequences": job.sequences,
            "cases": tables.cases,
            "size_bytes": tables.size_bytes,
            "channels": tables.channels,
            "preprocess": job.preprocess.model_dump(mode="json"),
            "failures": failures,
        }
        (temporary / "store.json").write_text(to_json(about) + "\n", encoding="utf-8")
        folder = cache / digest
        if folder.exists():  # an index with files missing: readers that have it open keep their copy
            stale = temporary_folder(cache, "old")
            os.replace(folder, stale / "index")
            stack.callback(shutil.rmtree, stale, ignore_errors=True)
        publish_folder(temporary, folder)


class _Tables:
    """The files of an index while they are written."""

    def __init__(self, folder: Path, *, labels: bool) -> None:
        self.cases = self.size_bytes = self.channels = 0
        self._floats = self._id_bytes = self._units = 0
        names = ("table", "facts", "ids", "files", *(["labels"] if labels else []))
        self._open = {name: (folder / f"{name}.bin").open("wb") for name in names}

    def __enter__(self) -> _Tables:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Flush and close."""
        for file in self._open.values():
            file.close()

    def add(self, unit: _Unit, job: Job) -> list[Failure]:
        """Append the cases of one prepared file; the failures that it lists."""
        failures: list[Failure] = []
        if job.kind != "images":
            record, facts = read_facts(unit.path)
            if job.kind == "labels":
                self._open["labels"].write(read_label_bits(unit.path))
            self._append(unit.cases[0], record, facts, len(job.sequences))
        else:
            shard = read_shard(unit.path)
            failures = shard.failures
            for case, record, limits in zip(unit.cases, shard.records, shard.limits, strict=True):
                if record["bytes"]:
                    self._append(case, record, limits, int(record["shape"][0]))
        self._open["files"].write(bytes.fromhex(unit.key))
        self._units += 1
        self.size_bytes += unit.path.stat().st_size
        return failures

    def _append(self, case: Case, record: np.ndarray | np.void, facts: np.ndarray, channels: int) -> None:
        identity = case.case_id.encode("utf-8", "surrogatepass")
        record["file"], record["facts"] = self._units, self._floats
        record["id"], record["id_bytes"] = self._id_bytes, len(identity)
        self._open["table"].write(record.tobytes())
        self._open["facts"].write(facts.tobytes())
        self._open["ids"].write(identity)
        self._floats += facts.size
        self._id_bytes += len(identity)
        self.cases += 1
        self.channels = max(self.channels, channels)


# --- several processes -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _taking_turns(path: Path) -> Iterator[None]:
    """Wait until no other process builds the same store; the lock goes with its process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is preparing the same data in %s; waiting for it", path.parent.parent)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
            log.warning("%s cannot lock files: two processes may prepare the same cases, with the same result", path)
        yield


def _remove_leftovers(cache: Path) -> None:
    """Remove temporary files of killed builds, once they are so old that nobody can be writing them."""
    young = time.time() - _STALE_S
    for pattern in ("cases/*/.*.tmp*", "pictures/*/.*.tmp*", ".tmp-*"):
        for path in cache.glob(pattern):
            with contextlib.suppress(FileNotFoundError):  # another process was quicker
                if path.stat().st_mtime < young:
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
