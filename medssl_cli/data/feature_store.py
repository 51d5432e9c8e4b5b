"""Stored features of a cohort: vectors, labels, ids and facts of each case, row by row, in one folder.

Everything a row needs to be told apart stands in the same row of three files, so that nothing can shift: a part whose
files disagree in rows is refused. A part is opened when it is asked for, and how often is counted: whoever must not
look at the test part can prove it.

Letters: R rows, P numbers of a row, C label columns, N slices of a case, S sequences, h w patches, D width.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import hashlib
import io
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from medssl_cli.core.errors import DataError
from medssl_cli.core.run import (
    atomic_path,
    digest_of,
    hide_home,
    publish_folder,
    say_disk_errors,
    temporary_folder,
    write_json,
)
from medssl_cli.data.manifest import split_digest

FEATURES = "features"
"""Folder of the features below an output folder."""
INFO = "features.json"
ALL = "all"
"""The one part where no split is known."""
MOST_CLASSES = 50
"""A column of more different values is a measurement: its values are not counted."""

_ROW_HEADER = ("case_id", "patient_id", "study_uid", "slice_index", "n_slices", "view", "path")
_FACT_HEADER = (
    *("case_id", "spacing_z_mm", "spacing_y_mm", "spacing_x_mm", "slices", "height", "width", "missing"),
)  # fmt: skip
_PERCENTILES = ("p01", "p50", "p99")
_BLOCK_ROWS = 4096
_EXTRACT_AGAIN = "run `medssl extract` again: what is cached is not computed twice"


@dataclass(frozen=True)
class Row:
    """Whose a row of the arrays is.

    Args:
        case_id: The case.
        patient_id: The person, as far as known.
        study_uid: The visit, when known.
        slice_index: Position of the slice; None where a row is a whole case.
        n_slices: Slices of the case that were looked at.
        view: 0 for the image as it is, from 1 for random flips of it.
        path: The image, or the folder of its sequences; relative to the data root where it lies below it.
    """

    case_id: str
    patient_id: str
    study_uid: str
    slice_index: int | None
    n_slices: int
    view: int
    path: str


@dataclass(frozen=True)
class ImageFacts:
    """What the images of a case are, whatever the network makes of them.

    Args:
        spacing_mm: Voxel size (z, y, x) of the reference sequence as stored; None for a picture.
        shape: (slices, height, width) as stored; a picture as prepared.
        intensity: 1st, 50th and 99th percentile of each sequence in the units of its file.
        missing: Sequences of the model that the case lacks.
    """

    spacing_mm: tuple[float, float, float] | None
    shape: tuple[int, int, int]
    intensity: dict[str, tuple[float, float, float]]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class FeaturePart:
    """The features of one split.

    Args:
        name: ``train``, ``val``, ``test`` or ``all``.
        embeddings_RP: Vectors, float32; may lie on the disk.
        labels_RC: Float32, NaN where unknown; None where no labels are known.
        rows: One for each vector.
        facts: By case id.
    """

    name: str
    embeddings_RP: np.ndarray
    labels_RC: np.ndarray | None
    rows: tuple[Row, ...]
    facts: dict[str, ImageFacts] = field(default_factory=dict)

    @property
    def case_ids(self) -> tuple[str, ...]:
        """Each case once, in the order of the rows."""
        return tuple(dict.fromkeys(row.case_id for row in self.rows))


class FeatureSet:
    """Parts of features, each opened when it is asked for.

    Args:
        info: Contents of ``features.json``.
        parts: How each part is opened, by name.
        folder: Where they lie; None for features in memory.
    """

    def __init__(
        self, info: dict[str, Any], parts: Mapping[str, Callable[[], FeaturePart]], folder: Path | None = None
    ) -> None:
        self.folder, self.info, self.names = folder, info, tuple(parts)
        self.accesses: Counter[str] = Counter()
        self._open = dict(parts)
        self._opened: dict[str, FeaturePart] = {}

    def part(self, name: str) -> FeaturePart:
        """One split; counted in ``accesses``.

        Raises:
            DataError: No such part, or its files are missing, damaged, or disagree with each other.
        """
        if name not in self._open:
            near = difflib.get_close_matches(name, self.names, n=1)
            raise DataError(
                f"The features have no part {name!r}.",
                where=f"{self._where()}: {', '.join(self.names) or 'no part'}",
                fix=f"did you mean {near[0]!r}?" if near else "extract with --splits, or name one of these parts",
                code="part_missing",
            )
        self.accesses[name] += 1
        if name not in self._opened:
            self._opened[name] = self._open[name]()
        return self._opened[name]

    def _where(self) -> str:
        return "features in memory" if self.folder is None else hide_home(str(self.folder))


def features_in_memory(info: dict[str, Any], parts: Sequence[FeaturePart]) -> FeatureSet:
    """Features that were never written; ``info`` as for ``write_features``."""
    for part in parts:
        check_part(part, f"part {part.name}")
    return FeatureSet({**info, **describe_parts(parts, info)}, {part.name: partial(_same, part) for part in parts})


def _same(part: FeaturePart) -> FeaturePart:
    return part


# --- reading ---------------------------------------------------------------------------------------------------------


def read_features(path: Path) -> FeatureSet:
    """The features below an output folder of ``medssl extract``, or in the folder ``features`` itself.

    Raises:
        DataError: There are none, or their description cannot be read.
    """
    inside = path / FEATURES
    folder = path if (path / INFO).is_file() or (path.name == FEATURES and not inside.is_dir()) else inside
    info = _read_info(folder / INFO)
    return FeatureSet(info, {name: partial(_read_part, folder, name, info) for name in info["splits"]}, folder)


def is_features(path: Path) -> bool:
    """Whether ``path`` is, or holds, a folder of features."""
    return (path / INFO).is_file() or (path / FEATURES / INFO).is_file()


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            "There are no features here.",
            where=f"{hide_home(str(path))}: {error.strerror}",
            fix="name the --out folder of `medssl extract`, or run it first",
            code="features_missing",
        ) from error
    except ValueError as error:
        raise _damaged(path, f"it is no JSON: {error}") from error
    needed = ("splits", "pool_mode", "embedding_dim", "slice_dim", "targets")
    absent = [key for key in needed if not isinstance(info, dict) or key not in info]
    if absent or not isinstance(info["splits"], dict):
        raise _damaged(path, f"without {', '.join(absent) or 'splits'}")
    odd = [name for name in info["splits"] if not name.isidentifier()]
    if odd:
        raise _damaged(path, f"a part has the odd name {odd[0][:60]!r}")
    return info


def _read_part(folder: Path, name: str, info: Mapping[str, Any]) -> FeaturePart:
    """A part with its vectors left on the disk; its files must agree."""
    embeddings_RP = _read_array(folder / f"{name}_embeddings.npy")
    labels_RC = None
    if info["targets"]:
        labels_RC = np.array(_read_array(folder / f"{name}_labels.npy"))
    rows = _read_rows(folder / f"{name}_ids.csv")
    part = FeaturePart(name, embeddings_RP, labels_RC, rows, _read_facts(folder / f"{name}_facts.csv"))
    check_part(part, hide_home(str(folder)))
    _check_against(part, folder, info)
    return part


def _read_array(path: Path) -> np.ndarray:
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, " ".join(str(error).split())[:200]) from error
    if array.ndim != 2 or array.dtype != np.float32:
        raise _damaged(path, f"{array.dtype} of shape {array.shape}, not float32 of two axes")
    return array


def _read_rows(path: Path) -> tuple[Row, ...]:
    try:
        return tuple(_row_of(cells) for cells in _read_csv(path, _ROW_HEADER))
    except ValueError as error:
        raise _damaged(path, str(error)) from error


def _row_of(cells: Sequence[str]) -> Row:
    case_id, patient_id, study_uid, index, n_slices, view, path = cells
    return Row(case_id, patient_id, study_uid, int(index) if index else None, int(n_slices), int(view), path)


def _read_facts(path: Path) -> dict[str, ImageFacts]:
    try:
        header, *lines = _read_csv(path, _FACT_HEADER, keep_header=True)
        names = [column.removesuffix("_p01") for column in header[len(_FACT_HEADER) :: len(_PERCENTILES)]]
        return {cells[0]: _facts_of(cells, names) for cells in lines}
    except ValueError as error:
        raise _damaged(path, str(error)) from error


def _facts_of(cells: Sequence[str], names: Sequence[str]) -> ImageFacts:
    numbers = cells[len(_FACT_HEADER) :]
    intensity = {}
    for place, name in enumerate(names):
        three = numbers[3 * place : 3 * place + 3]
        if all(three):
            low, middle, high = (float(text) for text in three)
            intensity[name] = (low, middle, high)
    z, y, x = cells[1:4]
    spacing = (float(z), float(y), float(x)) if z else None
    shape = (int(cells[4]), int(cells[5]), int(cells[6]))
    return ImageFacts(spacing, shape, intensity, tuple(cells[7].split(";")) if cells[7] else ())


def _read_csv(path: Path, header: Sequence[str], *, keep_header: bool = False) -> list[list[str]]:
    """Cells exactly as written: an id may begin with ``#`` or a blank, which a reader of tables would drop."""
    try:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            lines = list(csv.reader(file, strict=True))
    except (OSError, csv.Error) as error:
        raise _damaged(path, str(error)) from error
    if (
        not lines
        or tuple(lines[0][: len(header)]) != tuple(header)
        or not (keep_header or len(lines[0]) == len(header))
    ):
        raise _damaged(path, f"the header is not {', '.join(header)}")
    ragged = next((number for number, cells in enumerate(lines, 1) if len(cells) != len(lines[0])), None)
    if ragged is not None:
        raise _damaged(path, f"line {ragged} has another number of cells than the header")
    return lines if keep_header else lines[1:]


def _damaged(path: Path, detail: str) -> DataError:
    return DataError(
        "The features are damaged.",
        where=f"{hide_home(str(path))}: {detail}",
        fix=_EXTRACT_AGAIN,
        code="features_damaged",
    )


# --- what must hold --------------------------------------------------------------------------------------------------


def check_part(part: FeaturePart, where: str) -> None:
    """Refuse a part whose arrays and ids disagree in rows, or whose vectors are not finite.

    Raises:
        DataError: ``features_misaligned`` or ``features_nonfinite``.
    """
    counts = {"embeddings": len(part.embeddings_RP), "ids": len(part.rows)}
    if part.labels_RC is not None:
        counts["labels"] = len(part.labels_RC)
    if len(set(counts.values())) > 1:
        raise DataError(
            "Vectors, labels and ids do not have the same number of rows.",
            where=f"{where}, part {part.name}: " + ", ".join(f"{count} {name}" for name, count in counts.items()),
            fix=_EXTRACT_AGAIN,
            code="features_misaligned",
        )
    for start in range(0, len(part.rows), _BLOCK_ROWS):
        bad = np.flatnonzero(~np.isfinite(part.embeddings_RP[start : start + _BLOCK_ROWS]).all(axis=1))
        if len(bad):
            row = start + int(bad[0])
            raise DataError(
                "A stored vector is not finite.",
                where=f"{where}, part {part.name}, row {row}: case {part.rows[row].case_id}",
                fix=_EXTRACT_AGAIN,
                code="features_nonfinite",
            )


def _check_against(part: FeaturePart, folder: Path, info: Mapping[str, Any]) -> None:
    """Refuse a part that is not the one that ``features.json`` describes."""
    told = info["splits"][part.name]
    columns = 0 if part.labels_RC is None else part.labels_RC.shape[1]
    faults = []
    if part.embeddings_RP.shape[1] != info["embedding_dim"]:
        faults.append(f"{part.embeddings_RP.shape[1]} numbers in a row, {INFO} says {info['embedding_dim']}")
    if columns != len(info["targets"]):
        faults.append(f"{columns} label columns, {INFO} says {len(info['targets'])}")
    if told.get("sha256") not in (None, part_digest(part)):
        faults.append("rows were changed, moved or taken out since they were written")
    if faults:
        raise DataError(
            "The files of the features do not belong together.",
            where=f"{hide_home(str(folder))}, part {part.name}: {'; '.join(faults)}",
            fix=f"{_EXTRACT_AGAIN}; other labels come with --labels",
            code="features_changed",
        )


def part_digest(part: FeaturePart) -> str:
    """SHA-256 over vectors, labels and ids of a part, in hex."""
    digest = hashlib.sha256()
    for array in (part.embeddings_RP, part.labels_RC):
        inner = hashlib.sha256()
        for start in range(0, 0 if array is None else len(array), _BLOCK_ROWS):
            block = np.ascontiguousarray(array[start : start + _BLOCK_ROWS], np.dtype("<f4"))  # type: ignore[index]
            inner.update(np.where(np.isnan(block), np.float32(np.nan), block).tobytes())
        digest.update(inner.digest())
    inner = hashlib.sha256()
    for row in part.rows:
        inner.update(_csv_line(_row_cells(row)))
    digest.update(inner.digest())
    return digest.hexdigest()


def describe_parts(parts: Sequence[FeaturePart], info: Mapping[str, Any]) -> dict[str, Any]:
    """``splits`` and ``feature_digest`` of ``features.json``."""
    splits = {part.name: _describe(part, info) for part in parts}
    return {"splits": splits, "feature_digest": digest_of("features", {n: s["sha256"] for n, s in splits.items()})}


def _describe(part: FeaturePart, info: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "n_cases": len(part.case_ids),
        "n_rows": len(part.rows),
        "n_patients": len({row.patient_id for row in part.rows}),
        "split_digest": split_digest(part.case_ids),
        "class_counts": _class_counts(part, info),
        "sha256": part_digest(part),
    }


def _class_counts(part: FeaturePart, info: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Rows of view 0 by value of each column; a column of measurements is left out."""
    if part.labels_RC is None:
        return {}
    plain = np.array([row.view == 0 for row in part.rows], dtype=bool)
    found = {}
    for column, target in enumerate(info["targets"]):
        values, counts = np.unique(part.labels_RC[plain, column], return_counts=True)
        known = ~np.isnan(values)
        if known.sum() > MOST_CLASSES:
            continue
        names = info.get("label_values", {}).get(target)
        found[target] = {
            (names[int(value)] if names else f"{value:g}"): int(count)
            for value, count in zip(values[known], counts[known], strict=True)
        }
    return found


# --- writing ---------------------------------------------------------------------------------------------------------


def write_features(folder: Path, info: Mapping[str, Any], parts: Sequence[FeaturePart]) -> None:
    """Write a folder of features as a whole; what lay there is replaced once the new one is complete.

    Args:
        folder: The folder itself, e.g. ``OUT/features``.
        info: ``features.json`` without ``splits`` and ``feature_digest``, which are told by the parts.
        parts: At least one.

    Raises:
        DataError: Vectors, labels and ids disagree.
        ResourceError: The disk is full or not writable; what lay there is as it was.
    """
    temporary = temporary_folder(folder.parent, FEATURES)
    try:
        with say_disk_errors(folder):
            for part in parts:
                check_part(part, hide_home(str(folder)))
                with PartWriter(temporary, part.name, part.embeddings_RP.shape[1]) as writer:
                    for start in range(0, len(part.rows), _BLOCK_ROWS):
                        block = slice(start, start + _BLOCK_ROWS)
                        writer.add(part.rows[block], part.embeddings_RP[block])
                    writer.facts.update(part.facts)
                writer.write_tables(part.labels_RC)
            write_json(temporary / INFO, {**info, **describe_parts(parts, info)})
            replace_folder(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_folder(temporary: Path, final: Path) -> None:
    """Put a finished folder in the place of another, which goes."""
    if not final.exists():
        publish_folder(temporary, final)
        return
    old = temporary_folder(final.parent, "old") / final.name
    os.replace(final, old)
    try:
        publish_folder(temporary, final)
    except BaseException:
        with contextlib.suppress(OSError):
            os.replace(old, final)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)


class PartWriter:
    """One part in the making: vectors go to the disk as they come, so that memory does not grow with their number.

    Args:
        folder: Where to write; seen by nobody yet.
        name: Of the part.
        width: Numbers of a vector.
    """

    def __init__(self, folder: Path, name: str, width: int) -> None:
        self.folder, self.name, self.width = folder, name, width
        self.rows: list[Row] = []
        self.facts: dict[str, ImageFacts] = {}
        self._path = folder / f"{name}_embeddings.npy"
        self._file = self._path.open("w+b")
        self._write_header(0)

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, rows: Iterable[Row], vectors_RP: np.ndarray, facts: ImageFacts | None = None) -> int:
        """Append rows of one case with their vectors; the number of the first."""
        first, found = len(self.rows), list(rows)
        if vectors_RP.shape != (len(found), self.width):
            raise ValueError(f"vectors {vectors_RP.shape} for {len(found)} rows of {self.width}")
        self._file.write(np.ascontiguousarray(vectors_RP, np.dtype("<f4")).tobytes())
        self.rows += found
        if facts is not None and found:
            self.facts[found[0].case_id] = facts
        return first

    def add_patches(self, row: int, patches_NShwD: np.ndarray) -> None:
        """Patch tokens of the case whose first row is ``row``."""
        folder = self.folder / "patch_tokens"
        folder.mkdir(exist_ok=True)
        np.save(folder / f"{self.name}_{row:06d}.npy", np.ascontiguousarray(patches_NShwD, np.float32))

    def close(self) -> None:
        """Finish the file of vectors; nothing more can be added."""
        if not self._file.closed:
            self._write_header(len(self.rows))
            self._file.close()

    def discard(self) -> None:
        """Leave no trace of a part without rows."""
        self.close()
        self._path.unlink(missing_ok=True)

    def write_tables(self, labels_RC: np.ndarray | None) -> None:
        """Labels, ids and facts."""
        self.close()
        if labels_RC is not None:
            if len(labels_RC) != len(self.rows):
                raise ValueError(f"{len(labels_RC)} labels for {len(self.rows)} rows")
            np.save(self.folder / f"{self.name}_labels.npy", np.ascontiguousarray(labels_RC, np.float32))
        _write_csv(self.folder / f"{self.name}_ids.csv", _ROW_HEADER, map(_row_cells, self.rows))
        names = list(dict.fromkeys(name for facts in self.facts.values() for name in facts.intensity))
        header = [*_FACT_HEADER, *(f"{name}_{which}" for name in names for which in _PERCENTILES)]
        lines = (_fact_cells(case_id, facts, names) for case_id, facts in self.facts.items())
        _write_csv(self.folder / f"{self.name}_facts.csv", header, lines)

    def part(self, labels_RC: np.ndarray | None) -> FeaturePart:
        """The part as written, its vectors on the disk."""
        self.close()
        return FeaturePart(self.name, _read_array(self._path), labels_RC, tuple(self.rows), self.facts)

    def _write_header(self, count: int) -> None:
        """The head of a ``.npy`` file, as long for any number of rows."""
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            buffer, {"descr": "<f4", "fortran_order": False, "shape": (count, self.width)}
        )
        head = buffer.getvalue()
        if len(head) > _HEAD_BYTES:
            raise ValueError(f"a header of {len(head)} bytes")
        body = head[10:].rstrip() + b" " * (_HEAD_BYTES - len(head[:10]) - len(head[10:].rstrip()) - 1) + b"\n"
        self._file.seek(0)
        self._file.write(head[:8] + len(body).to_bytes(2, "little") + body)
        self._file.seek(0, io.SEEK_END)


_HEAD_BYTES = 192


def _row_cells(row: Row) -> tuple[str, ...]:
    index = "" if row.slice_index is None else str(row.slice_index)
    return row.case_id, row.patient_id, row.study_uid, index, str(row.n_slices), str(row.view), row.path


def _fact_cells(case_id: str, facts: ImageFacts, names: Sequence[str]) -> list[str]:
    spacing = ("", "", "") if facts.spacing_mm is None else tuple(_number(mm) for mm in facts.spacing_mm)
    numbers = [_number(value) for name in names for value in facts.intensity.get(name, (math.nan,) * 3)]
    return [case_id, *spacing, *(str(n) for n in facts.shape), ";".join(facts.missing), *numbers]


def _number(value: float) -> str:
    return repr(float(value)) if math.isfinite(value) else ""


def _csv_line(cells: Sequence[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode("utf-8", "surrogateescape")


def _write_csv(path: Path, header: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """As ``core.run.write_csv``; names of files that are not UTF-8 keep their bytes."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        for cells in (header, *lines):
            file.write(_csv_line(cells))
