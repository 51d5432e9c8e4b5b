"""Case trees, image trees, series tables and split CSVs: the one reader of ids and labels.

``split``, ``check-data``, ``pretrain`` and ``eval`` all read ids here, so that one file can't give two answers. Ids are
text: ``007`` stays ``007``. Paths that leave the data root are refused.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from medssl_cli.core import case as core
from medssl_cli.core.case import Case
from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.run import contained
from medssl_cli.data.images import is_image, volume_stem
from medssl_cli.data.sequences import resolve_sequence

log = logging.getLogger(__name__)

ID_ALIASES = ("patient_id", "case_id", "id", "ID", "subject", "name")
"""Columns that hold the id, the first that exists wins; otherwise the first column of the file."""
PATIENT_ALIASES = ("patient_id", "patient", "patientid", "subject_id", "subject", "person_id")
STUDY_ALIASES = ("study_uid", "study_id", "studyinstanceuid", "study")
PATH_ALIASES = ("path", "nifti_path", "file", "image", "filename", "file_name", "image_path", "file_path")
SERIES_ALIASES = ("series_uid", "series_id", "seriesinstanceuid", "series")
SPLIT_ALIASES = ("split",)
_IMAGE_ID_ALIASES = ("image", "path", "file")

PRETRAIN_SEQUENCES = ("ax_t2wi", "ax_adc", "ax_dwi")
ROI_STEM = "roi_Prostate"
IMAGE = "image"
"""Name of the one sequence of an image case, and of a row of a series table."""

Kind = Literal["cases", "images", "table"]
_TABLE_SUFFIXES = (".csv", ".tsv", ".txt")
_SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_OWN_FOLDER_MARK = ".medssl.json"
_SHOWN = 8


# --- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A CSV as text cells.

    Args:
        path: Where it was read.
        header: Column names, stripped.
        rows: Cells, stripped; each row is as long as the header.
        lines: Line of the file where each row begins, from 1.
    """

    path: Path
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[int, ...]

    def find(self, aliases: Sequence[str]) -> str | None:
        """The column named as the first alias that exists: as spelt, else ignoring capitals."""
        for alias in aliases:
            if alias in self.header:
                return alias
        lower = {name.lower(): name for name in reversed(self.header)}
        return next((lower[alias.lower()] for alias in aliases if alias.lower() in lower), None)

    def column(self, name: str) -> list[str]:
        """Cells of one column.

        Raises:
            DataError: No such column, or two of that name.
        """
        if self.header.count(name) != 1:
            near = difflib.get_close_matches(name, self.header, n=1, cutoff=0.5)
            what = "no column" if name not in self.header else "several columns"
            raise DataError(
                f"The table has {what} {name!r}.",
                where=f"{self.path}: {', '.join(self.header)}",
                fix=f"did you mean {near[0]!r}?" if near else "name one of these columns",
                code="column_missing",
            )
        index = self.header.index(name)
        return [row[index] for row in self.rows]


def read_table(path: Path) -> Table:
    """Read a CSV: UTF-8 with or without byte-order mark, any line ends, comma, semicolon or tab.

    Blank lines and lines that begin with ``#`` are skipped; the first other line is the header.

    Raises:
        DataError: Missing, not UTF-8, empty, unbalanced quotes, a row longer or shorter than the header.
    """
    text = _read_text(path)
    records = list(_records(path, text))
    if not records:
        raise _table_fault(path, "The table is empty.", "it has no header line", "table_empty")
    (_, header), *body = records
    if len(records) > 1 and len(header) > 1:  # spreadsheets pad the header with empty columns
        while header and not header[-1]:
            header = header[:-1]
    rows, lines = [], []
    for line, cells in body:
        while len(cells) > len(header) and not cells[-1]:
            cells = cells[:-1]
        if len(cells) != len(header):
            found = f"line {line}: {len(cells)} cells, the header has {len(header)}"
            raise _table_fault(path, "A row does not fit the header.", found, "table_ragged")
        rows.append(tuple(cells))
        lines.append(line)
    return Table(path, tuple(header), tuple(rows), tuple(lines))


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            "The table cannot be read.",
            where=f"{path}: {error.strerror}",
            fix="check the path",
            code="table_missing",
        ) from error
    except ValueError as error:
        raise _table_fault(path, "The path of a table is refused.", str(error), "path_escapes") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            "The table is not UTF-8 text.",
            where=f"{path}, line {line}: byte 0x{data[error.start]:02x}",
            fix="save it as `CSV UTF-8` in the spreadsheet, or run `iconv -f latin1 -t utf-8`",
            code="table_encoding",
        ) from error
    if "\0" in text:
        raise DataError(
            "The table is not text.",
            where=f"{path}: it holds NUL characters",
            fix="save it as `CSV UTF-8`",
            code="table_encoding",
        )
    return text


def _records(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """(line, stripped cells) of each record that is neither blank nor a comment."""
    delimiter = ""
    for line, record in _joined_lines(path, text):
        delimiter = delimiter or _delimiter(record)
        try:
            parsed = list(csv.reader([record], delimiter=delimiter, strict=True))
        except csv.Error as error:
            raise _table_fault(path, "A row cannot be read.", f"line {line}: {error}", "table_quotes") from error
        cells = [cell.strip() for cells in parsed for cell in cells]
        if any(cells):
            yield line, cells


def _joined_lines(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Physical lines, joined where a quoted cell runs over a line end; comments and blank lines left out."""
    pending, start = "", 0
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), start=1):
        if not pending and (not line.strip() or line.lstrip().startswith("#")):
            continue
        start = start if pending else number
        pending = f"{pending}\n{line}" if pending else line
        if pending.count('"') % 2 == 0:
            yield start, pending
            pending = ""
    if pending:
        raise _table_fault(path, "A quoted cell is never closed.", f"line {start}: {pending[:60]!r}", "table_quotes")


def _delimiter(header: str) -> str:
    unquoted = re.sub(r'"[^"]*"', "", header)
    return max((",", ";", "\t"), key=unquoted.count)


def _table_fault(path: Path, what: str, detail: str, code: str) -> DataError:
    return DataError(what, where=f"{path}: {detail}", fix="correct the file, or export it again", code=code)


@dataclass(frozen=True)
class Ids:
    """The ids of one file.

    Args:
        ids: Without repeats, sorted.
        duplicates: Ids that stand there more than once, sorted.
        column: The column they were read from; empty for a list without header.
    """

    ids: tuple[str, ...]
    duplicates: tuple[str, ...]
    column: str


def read_ids(path: Path) -> Ids:
    """The ids of a split CSV, or of a ``.txt`` list with one folder a line and no header.

    Raises:
        DataError: As ``read_table``; also an empty id, or no id at all.
    """
    if path.suffix.lower() == ".txt":
        found, lines, column = _read_list(path)
    else:
        table = read_table(path)
        column = table.find(ID_ALIASES) or table.header[0]
        found, lines = table.column(column), list(table.lines)
    empty = [line for line, text in zip(lines, found, strict=True) if not text]
    if empty:
        detail = f"column {column!r}, line {', '.join(map(str, empty[:_SHOWN]))}"
        raise _table_fault(path, "A row has no id.", detail, "id_empty")
    if not found:
        raise DataError(
            "The file names no case.", where=str(path), fix="put one id in each row below the header", code="ids_none"
        )
    counts = Counter(found)
    repeated = tuple(sorted(name for name, n in counts.items() if n > 1))
    return Ids(tuple(sorted(counts)), repeated, column)


def _read_list(path: Path) -> tuple[list[str], list[int], str]:
    pairs = [(n, line.strip()) for n, line in enumerate(_read_text(path).splitlines(), 1)]
    kept = [(n, line) for n, line in pairs if line and not line.startswith("#")]
    if kept and kept[0][1].split(",")[0] in ID_ALIASES:  # a CSV under another suffix
        table = read_table(path)
        column = table.find(ID_ALIASES) or table.header[0]
        return table.column(column), list(table.lines), column
    return [line for _, line in kept], [n for n, _ in kept], ""


def label_id_column(table: Table, *, of_images: bool = False) -> str:
    """The column of a label table that names cases, or images; the first column if none has a known name."""
    if of_images:
        return table.find((*_IMAGE_ID_ALIASES, *ID_ALIASES, "patient")) or table.header[0]
    return table.find(("case_id", *ID_ALIASES, *_IMAGE_ID_ALIASES, "case", "patient")) or table.header[0]


def read_labels(path: Path, target: str, *, of_images: bool = False) -> dict[str, str]:
    """Label by id of a CSV with an id, image, path or file column.

    Args:
        path: The CSV.
        target: Column of the label.
        of_images: Prefer a column that names images to one that names patients.

    Raises:
        DataError: As ``read_table``; no such column; one id with two labels.
    """
    table = read_table(path)
    ids = table.column(label_id_column(table, of_images=of_images))
    labels: dict[str, str] = {}
    for line, name, label in zip(table.lines, ids, table.column(target), strict=True):
        if labels.setdefault(name, label) != label:
            raise DataError(
                "One id has two labels.",
                where=f"{path}, line {line}: {name!r} is {labels[name]!r} and {label!r}",
                fix="keep one row for each id",
                code="label_conflict",
            )
    return labels


def say_some(names: Iterable[str], shown: int = _SHOWN) -> str:
    """The first names and how many more there are: ``'a', 'b' and 3 more``."""
    every = list(names)
    text = ", ".join(repr(name[:80]) for name in every[:shown])
    return text + (f" and {len(every) - shown} more" if len(every) > shown else "")


# --- what lies at a path ---------------------------------------------------------------------------------------------


def detect_kind(source: Path) -> Kind:
    """Whether ``source`` is a case tree, an image tree or a series table.

    A folder whose sub-folders hold NIfTI files is a case tree, one with pictures anywhere below it an image tree, and
    one with nothing but sub-folders again a case tree.

    Raises:
        DataError: Nothing of the three.
    """
    if source.is_file():
        if source.suffix.lower() in _TABLE_SUFFIXES:
            return "table"
        raise _no_source(source, "it is one file", "name a folder of cases, a folder of images, or a CSV")
    if not source.is_dir():
        raise _no_source(source, "it does not exist", "check the path")
    folders = case_ids(source)
    if any(_holds_volume(source / name) for name in folders):
        return "cases"
    if next(_walk_images(source), None) is not None:
        return "images"
    if folders:
        return "cases"
    flat = [p.name for p in source.iterdir() if volume_stem(p) is not None]
    if flat:
        advice = "put each into a folder of its case (<case>/ax_t2wi.nii.gz), or give a CSV with a path column"
        raise _no_source(source, f"{len(flat)} volumes without case folders: {say_some(sorted(flat), 3)}", advice)
    raise _no_source(source, "the folder is empty", "name a folder of cases, a folder of images, or a CSV")


def _no_source(source: Path, detail: str, fix: str) -> DataError:
    return DataError("There are no cases.", where=f"{source}: {detail}", fix=fix, code="source_unknown")


def _holds_volume(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(volume_stem(Path(entry.name)) is not None for entry in entries)


def case_ids(root: Path) -> list[str]:
    """Names of the case folders of a tree, sorted; hidden folders and result folders of medssl are none."""
    return sorted(
        p.name
        for p in root.iterdir()
        if not p.name.startswith(".") and p.is_dir() and not (p / _OWN_FOLDER_MARK).exists()
    )


# --- case trees ------------------------------------------------------------------------------------------------------


def read_cases(
    root: Path,
    sequences: tuple[str, ...],
    *,
    split_csv: Path | None = None,
    roi: str = ROI_STEM,
    split: str = "",
    labels: Mapping[str, str] | None = None,
    on_fault: Callable[[str, DataError], None] | None = None,
) -> list[Case]:
    """Cases of a tree ``<root>/<case_id>/<stem>.nii[.gz]``, sorted by id.

    Args:
        root: The data root. ``cases.csv`` or ``labels.csv`` in it tell patient and study of each case.
        sequences: Names to look for; a sequence that a case lacks has no entry.
        split_csv: Which cases to take; all folders if None.
        roi: Stem of the mask of the region of interest.
        split: Written into each case.
        labels: Label by case id, as of ``read_labels``.
        on_fault: Called for a case that cannot be read, which is then left out; without it all faults are raised.

    Raises:
        DataError: No case; ids without a folder, with the nearest names; paths that leave the root; ambiguous files.
    """
    ids = selected_ids(root, split_csv)
    owners = read_owners(root)
    cases, faults = [], []
    for case_id in ids:
        try:
            cases.append(read_case(root, case_id, sequences, roi=roi, owners=owners, split=split, labels=labels))
        except DataError as error:
            if on_fault is None:
                faults.append((case_id, error))
            else:
                on_fault(case_id, error)
    if faults:
        raise _joined(faults)
    _tell_choices(cases)
    return cases


def selected_ids(root: Path, split_csv: Path | None) -> list[str]:
    """Case ids of a tree, or those of a CSV, each of which must be the name of a folder.

    Raises:
        DataError: The root is missing or empty; ids without a folder (``id_unknown``).
    """
    known = case_ids(root) if root.is_dir() else []
    if not known:
        raise _no_source(root, "no case folder in it" if root.is_dir() else "it does not exist", "check the data root")
    if split_csv is None:
        return known
    found = read_ids(split_csv)
    for name in found.ids:
        contained_id(root, name)
    if found.column and _is_dir(root / found.column):
        raise DataError(
            "The split file has no header: its first line is the name of a case.",
            where=f"{split_csv}: {found.column!r}",
            fix="put the line `patient_id` above the ids",
            code="header_missing",
        )
    unknown = [name for name in found.ids if not _is_dir(root / name)]
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(found.ids)} ids have no folder.",
            where=f"{split_csv}, column {found.column!r}: "
            + ", ".join(f"{name!r}{nearest_id(name, known)}" for name in unknown[:_SHOWN])
            + (f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""),
            fix=f"ids must equal the folder names below {root}; a spreadsheet may have cut leading zeros",
            code="id_unknown",
        )
    if found.duplicates:
        log.info("%s: %s stand more than once and count once", split_csv, say_some(found.duplicates))
    return list(found.ids)


def contained_id(root: Path, name: str) -> Path:
    """The folder of a case id; an id that climbs or means the root itself is refused."""
    if not {".", ".."}.isdisjoint(name.replace("\\", "/").split("/")):
        raise DataError(
            "A case id was refused.",
            where=f"{name[:120]!r} is no name of a folder below {root}",
            fix="ids must equal the folder names below the data root",
            code="path_escapes",
        )
    return contained(root, name, "case id")


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a path too long for the disk
        return False


def nearest_id(name: str, known: Sequence[str]) -> str:
    """`` (did you mean 'x'?)`` or nothing; a name that differs in leading zeros or capitals only is nearest."""
    bare = name.lstrip("0").casefold()
    twin = next((k for k in known if k.lstrip("0").casefold() == bare), None)
    near = [twin] if twin else difflib.get_close_matches(name[:100], known, n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


@dataclass(frozen=True)
class Owner:
    """Whose a case is."""

    patient_id: str = ""
    study_uid: str = ""


def read_owners(root: Path) -> dict[str, Owner]:
    """Patient and study of each case, from the tables at the root of a tree.

    These are ``cases.csv``, which ``convert dicom`` leaves there, and a ``labels.csv`` with columns for case and
    patient; what the first says of a case wins.

    Raises:
        DataError: One case with two patients.
    """
    owners: dict[str, Owner] = {}
    for name in ("labels.csv", "cases.csv"):
        if (root / name).is_file():
            owners.update(table_owners(read_table(root / name)))
    return owners


def table_owners(table: Table) -> dict[str, Owner]:
    """Patient and study of each case of a table with a column ``case_id``; empty for another table.

    Raises:
        DataError: One case with two patients.
    """
    case_column = table.find(("case_id",))
    patients, studies = _optional(table, PATIENT_ALIASES), _optional(table, STUDY_ALIASES)
    owners: dict[str, Owner] = {}
    names = table.column(case_column) if case_column and any((*patients, *studies)) else []
    for line, name, patient, study in zip(table.lines, names, patients, studies, strict=False):
        if owners.setdefault(name, Owner(patient, study)).patient_id != patient:
            found = f"line {line}: case {name!r} of {owners[name].patient_id!r} and {patient!r}"
            raise _table_fault(table.path, "One case belongs to two patients.", found, "owner_conflict")
    return owners


def read_case(
    root: Path,
    case_id: str,
    sequences: tuple[str, ...],
    *,
    roi: str = ROI_STEM,
    owners: Mapping[str, Owner] | None = None,
    split: str = "",
    labels: Mapping[str, str] | None = None,
) -> Case:
    """One case of a tree; nothing but names, headers and sidecars are read.

    Raises:
        DataError: The folder is missing, a path leaves the root, or a choice of files is ambiguous.
    """
    folder = contained_id(root, case_id)
    if not _is_dir(folder):
        raise DataError(
            "The folder of a case is missing.",
            where=str(folder),
            fix="correct the id or the tree",
            code="folder_missing",
        )
    owner = (owners or {}).get(case_id, Owner())
    found = {name: resolve_sequence(folder, name) for name in sequences}
    mask = resolve_sequence(folder, roi) if roi else None
    for sequence in (*found.values(), mask):
        if sequence is not None:
            contained(root, sequence.path.relative_to(root), "file")
    return Case(
        case_id=case_id,
        patient_id=owner.patient_id or case_id,
        sequences={name: sequence for name, sequence in found.items() if sequence is not None},
        study_uid=owner.study_uid,
        roi=None if mask is None else mask.path,
        label=(labels or {}).get(case_id, ""),
        split=split,
    )


def _joined(faults: list[tuple[str, DataError]]) -> DataError:
    if len(faults) == 1:
        return faults[0][1]
    shown = "\n".join(f"{case_id}: {error.what} {error.where}" for case_id, error in faults[:_SHOWN])
    more = f"\nand {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    fixes = "; ".join(dict.fromkeys(error.fix for _, error in faults))
    return DataError(f"{len(faults)} cases cannot be read.", where=shown + more, fix=fixes, code=faults[0][1].code)


def _tell_choices(cases: list[Case]) -> None:
    """One log line for each kind of choice, not one for each case."""
    notes: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        for name, sequence in case.sequences.items():
            if sequence.note:
                notes.setdefault((name, sequence.note), []).append(case.case_id)
    for (name, note), ids in notes.items():
        log.info("%s: %s (%d of %d cases, first %s)", name, note, len(ids), len(cases), ids[0])


# --- image trees -----------------------------------------------------------------------------------------------------


def read_image_cases(
    root: Path,
    *,
    split_csv: Path | None = None,
    group_pattern: str | None = None,
    split: str = "",
    labels: Mapping[str, str] | None = None,
) -> list[Case]:
    """Every PNG, JPEG, TIFF, BMP or NumPy file below ``root`` as a case of its own, sorted by relative path.

    The id is the path relative to ``root``. In the layout ``train/class_a/x.png`` the folders give split and label.
    A column ``group`` of ``split_csv`` or ``group_pattern`` gives the patient; else each image is its own.

    Raises:
        DataError: No image; ids of ``split_csv`` without an image; a link that leads out of the root.
    """
    if not root.is_dir():
        raise _no_source(root, "it does not exist", "check the path")
    known = sorted(_walk_images(root))
    if not known:
        raise _no_source(root, "no PNG, JPEG, TIFF, BMP or NumPy file below it", "check the path")
    groups: dict[str, str] = {}
    if split_csv is not None:
        known, groups = _selected_images(root, split_csv, known)
    if group_pattern is not None:
        groups = groups_by_pattern(known, group_pattern)
    given = match_image_ids(root, labels or {}, known)
    cases = []
    for name in known:
        folder_split, folder_label = _imagenet_place(name)
        cases.append(
            Case(
                case_id=name,
                patient_id=groups.get(name, name),
                sequences={IMAGE: core.Sequence(IMAGE, root / name)},
                label=(labels or {}).get(given.get(name, ""), folder_label),
                split=split or folder_split,
            )
        )
    return cases


def _walk_images(root: Path) -> Iterator[str]:
    """Relative POSIX paths of the pictures below ``root``; hidden entries are left out, links out of it refused."""
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if (here / name).is_symlink():
                contained(root, (here / name).relative_to(root), "link")
        for name in sorted(files):
            path = here / name
            if not name.startswith(".") and is_image(path):
                relative = path.relative_to(root)
                if path.is_symlink():
                    contained(root, relative, "link")
                yield relative.as_posix()


def _selected_images(root: Path, split_csv: Path, known: list[str]) -> tuple[list[str], dict[str, str]]:
    ids = read_ids(split_csv)
    for name in ids.ids:
        contained(root, name, "image path")
    matched = match_image_ids(root, dict.fromkeys(ids.ids, ""), known)
    unknown = sorted(set(ids.ids) - set(matched.values()))
    if unknown:
        raise DataError(
            f"{len(unknown)} of {len(ids.ids)} images are missing.",
            where=f"{split_csv}: " + ", ".join(f"{n!r}{nearest_id(n, known)}" for n in unknown[:_SHOWN]),
            fix=f"ids are paths relative to {root}",
            code="id_unknown",
        )
    groups: dict[str, str] = {}
    if ids.column:
        table = read_table(split_csv)
        if "group" in table.header:
            by_id = dict(zip(table.column(ids.column), table.column("group"), strict=True))
            groups = {name: by_id[given] for name, given in matched.items() if by_id[given]}
    return sorted(matched), groups


def match_image_ids(root: Path, given: Mapping[str, str], known: Sequence[str]) -> dict[str, str]:
    """Which given id means which image: {relative path: given id}.

    An id is the relative path, or that path below the name of the root folder, or a file name or stem if only one
    image has it.
    """
    stems: dict[str, list[str]] = {}
    for name in known:
        for spelling in {PurePosixPath(name).name, PurePosixPath(name).stem}:
            stems.setdefault(spelling, []).append(name)
    exact = set(known)
    found: dict[str, str] = {}
    for name in given:
        plain = PurePosixPath(name.replace("\\", "/")).as_posix()
        below = plain.removeprefix(f"{root.resolve().name}/")
        same = stems.get(plain, [])
        if plain in exact:
            found[plain] = name
        elif below in exact:
            found[below] = name
        elif len(same) == 1:
            found[same[0]] = name
    return found


def _imagenet_place(name: str) -> tuple[str, str]:
    """(split, label) of ``train/class_a/…/x.png``; empty texts for another layout."""
    parts = PurePosixPath(name).parts
    split = _SPLIT_FOLDERS.get(parts[0].lower(), "") if len(parts) > 1 else ""
    return (split, parts[1]) if split and len(parts) > 2 else (split, "")


def split_of_folder(name: str) -> str:
    """``train``, ``val`` or ``test`` for a folder named so or ``training``, ``validation``, …; else empty."""
    return _SPLIT_FOLDERS.get(name.lower(), "")


def class_folders(root: Path) -> dict[str, str]:
    """Class of each image of a tree ``class_a/x.png`` without split folders; empty for another layout.

    Every image must lie exactly one folder deep, in two folders or more, which hold two images each on average: a
    folder for each image tells of no class.
    """
    places = {name: PurePosixPath(name).parts for name in _walk_images(root)}
    found = {name: parts[0] for name, parts in places.items() if len(parts) == 2}
    folders = set(found.values())
    is_flat = len(found) == len(places) and not any(name.lower() in _SPLIT_FOLDERS for name in folders)
    return found if is_flat and 2 <= len(folders) <= len(found) / 2 else {}


def groups_by_pattern(names: Sequence[str], pattern: str) -> dict[str, str]:
    """Group of each name: what the first parenthesis of the regular expression matches, or the whole match.

    A name that it does not match, but whose file name begins with a group found in others and then a sign that is
    neither letter nor digit (``P254-R.jpg`` beside ``P254_L.jpg``), belongs to that group; a warning says so.

    Raises:
        ConfigError: Not a regular expression.
        DataError: Other names that it does not match.
    """
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            "The group pattern is not a regular expression.",
            where=f"--group-pattern {pattern!r}: {error}",
            fix=r"e.g. --group-pattern '(Patient\d+)_'",
            code="pattern_invalid",
        ) from error
    groups = {}
    for name in names:
        match = compiled.search(name)
        if match:
            groups[name] = (match[1] if compiled.groups else match[0]) or ""
    known = set(groups.values()) - {""}
    unmatched = [name for name in names if not groups.get(name)]
    for name in unmatched:
        groups[name] = _leading_group(PurePosixPath(name).name, known)
    unknown = [name for name in unmatched if not groups[name]]
    if unknown:
        raise DataError(
            f"The group pattern does not match {len(unknown)} of {len(names)} names.",
            where=f"{pattern!r}: {say_some(unknown)}",
            fix="widen the pattern; a name without a group could lie on both sides of the split",
            code="group_unknown",
        )
    if unmatched:
        shown = ", ".join(f"{name} to {groups[name]}" for name in unmatched[:_SHOWN])
        log.warning("the group pattern misses %d names; they are counted by their beginning: %s", len(unmatched), shown)
    return groups


def _leading_group(name: str, known: set[str]) -> str:
    """The group that ``name`` begins with, up to a sign that is neither letter nor digit; empty if none."""
    ends = [i for i, char in enumerate(name) if not char.isalnum()]
    return next((name[:i] for i in reversed(ends) if name[:i] in known), "")


# --- series tables ---------------------------------------------------------------------------------------------------


def read_table_cases(
    path: Path,
    *,
    root: Path | None = None,
    target: str | None = None,
    sequence: str = IMAGE,
    split_csv: Path | None = None,
) -> list[Case]:
    """The rows of a series table as cases, in the order of the file.

    Args:
        path: CSV with a path column and, where known, patient, study, series and label columns. A column ``split`` that
            holds train, val or test in every row tells the split.
        root: Folder that paths are relative to; if None the one that the environment variable DATASETS_DIR names, or
            the table's own. Paths must stay below it.
        target: Column of the label.
        sequence: Name of the one sequence of each case.
        split_csv: Rows of this table as ``split`` writes them, or ids; all rows if None.

    Raises:
        DataError: No path column, an empty or escaping path, two rows of one id, an id of ``split_csv`` without a row.
    """
    table = read_table(path)
    base = root or Path(os.environ.get("DATASETS_DIR") or path.parent)
    path_column = table.find(PATH_ALIASES)
    if path_column is None:
        raise DataError(
            "The series table has no column of paths.",
            where=f"{path}: {', '.join(table.header)}",
            fix=f"name it one of: {', '.join(PATH_ALIASES)}",
            code="column_missing",
        )
    paths = table.column(path_column)
    ids = row_ids(table)
    patients, studies = (_optional(table, aliases) for aliases in (PATIENT_ALIASES, STUDY_ALIASES))
    labels = [""] * len(paths) if target is None else table.column(target)
    splits = _split_column(table)
    cases = []
    for row, (line, text, name) in enumerate(zip(table.lines, paths, ids, strict=True)):
        if not text:
            raise _table_fault(path, "A row has no path.", f"line {line}", "path_empty")
        file = _table_path(path, line, base, text)
        owner = patients[row] or studies[row] or name
        files = {sequence: core.Sequence(sequence, file)}
        cases.append(Case(name, owner, files, study_uid=studies[row], label=labels[row], split=splits[row]))
    return cases if split_csv is None else _selected_rows(table, cases, split_csv)


def _table_path(table: Path, line: int, base: Path, text: str) -> Path:
    try:
        return contained(base, _relative(base, text), "path of a table")
    except DataError as error:
        raise DataError(
            error.what,
            where=f"{table}, line {line}: {error.where}",
            fix="put the table beside the files, or set DATASETS_DIR to the folder that holds them all",
            code=error.code,
        ) from error


def _split_column(table: Table) -> list[str]:
    """train, val or test of each row; empty texts where no column tells it for all rows."""
    splits = [_SPLIT_FOLDERS.get(cell.lower(), "") for cell in _optional(table, SPLIT_ALIASES)]
    return splits if all(splits) else [""] * len(splits)


def _selected_rows(table: Table, cases: list[Case], split_csv: Path) -> list[Case]:
    """The cases whose rows a split holds: by the columns that tell rows apart, else by id, patient or study."""
    wanted, of_case = _ids_of_split(table, cases, split_csv)
    known = {key for keys in of_case for key in keys}
    unknown = sorted(wanted - known)
    if unknown:
        near = ", ".join(f"{name!r}{nearest_id(name, sorted(known))}" for name in unknown[:_SHOWN])
        raise DataError(
            f"{len(unknown)} of {len(wanted)} ids have no row.",
            where=f"{split_csv}: {near}",
            fix=f"take rows, patients or studies of {table.path}",
            code="id_unknown",
        )
    return [case for case, keys in zip(cases, of_case, strict=True) if wanted & keys]


def _ids_of_split(table: Table, cases: list[Case], split_csv: Path) -> tuple[set[str], list[set[str]]]:
    """(what the split names, what each case answers to)."""
    columns = row_columns(table)
    if split_csv.suffix.lower() != ".txt":
        chosen = read_table(split_csv)
        if columns and all(name in chosen.header for name in columns) and chosen.rows:
            return set(joined_cells(chosen, columns)), [{case.case_id} for case in cases]
    return set(read_ids(split_csv).ids), [{case.case_id, case.patient_id, case.study_uid} - {""} for case in cases]


def row_ids(table: Table) -> list[str]:
    """An id for each row: study and series where both are known, else the finest column without repeats."""
    columns = row_columns(table)
    return joined_cells(table, columns) if columns else [f"line {line}" for line in table.lines]


def joined_cells(table: Table, columns: Sequence[str]) -> list[str]:
    """The cells of some columns of each row, joined by ``__``."""
    return ["__".join(cells) for cells in zip(*(table.column(name) for name in columns), strict=True)]


def row_columns(table: Table) -> tuple[str, ...]:
    """The columns that tell the rows apart, none if there are none.

    Raises:
        DataError: A series stands there twice.
    """
    study, series = table.find(STUDY_ALIASES), table.find(SERIES_ALIASES)
    if study and series:
        joined = joined_cells(table, (study, series))
        repeated = [name for name, n in Counter(joined).items() if n > 1]
        if repeated:
            found = f"({study}, {series}): {say_some(repeated)}"
            raise _table_fault(table.path, "A series stands there twice.", found, "id_duplicate")
        return study, series
    for aliases in (("case_id",), SERIES_ALIASES, STUDY_ALIASES, PATH_ALIASES, ID_ALIASES):
        column = table.find(aliases)
        if column:
            cells = table.column(column)
            if len(set(cells)) == len(cells) and all(cells):
                return (column,)
    return ()


def _optional(table: Table, aliases: Sequence[str]) -> list[str]:
    column = table.find(aliases)
    return [""] * len(table.rows) if column is None else table.column(column)


def _relative(base: Path, text: str) -> str:
    """An absolute path below ``base`` as a relative one; others as they are, for ``contained`` to judge."""
    if os.path.isabs(text):
        for root in (base, base.resolve()):
            if Path(text).is_relative_to(root):
                return str(Path(text).relative_to(root))
    return text


# --- whose is what ---------------------------------------------------------------------------------------------------


def patient_of(table: Table) -> tuple[list[str], str]:
    """(group of each row, name of the level): patient when a column tells it, else study, else the row itself.

    Raises:
        DataError: A row without a patient while others have one.
    """
    for level, aliases in (("patient_id", PATIENT_ALIASES), ("study_uid", STUDY_ALIASES)):
        column = table.find(aliases)
        if column:
            return filled_column(table, column), level
    return row_ids(table), "case"


def filled_column(table: Table, column: str) -> list[str]:
    """Cells of a column that must not be empty.

    Raises:
        DataError: With the lines of the empty cells.
    """
    cells = table.column(column)
    empty = [str(line) for line, cell in zip(table.lines, cells, strict=True) if not cell]
    if empty:
        found = f"column {column!r}, line {', '.join(empty[:_SHOWN])}"
        raise _table_fault(table.path, f"{len(empty)} rows have no {column}.", found, "group_unknown")
    return cells


def split_digest(ids: Iterable[str]) -> str:
    """SHA-256 of the sorted ids joined by line ends, in hex."""
    return hashlib.sha256("\n".join(sorted(ids)).encode("utf-8", "surrogatepass")).hexdigest()


def check_no_overlap(splits: Mapping[str, Sequence[Case]]) -> None:
    """Refuse splits that share a case, a patient, a study or a file.

    Raises:
        DataError: ``split_leak``, naming what is shared.
    """
    facts: tuple[tuple[str, Callable[[Case], Iterable[str]]], ...] = (
        ("case", lambda case: (case.case_id,)),
        ("patient", lambda case: (case.patient_id,)),
        ("study", lambda case: (case.study_uid,) if case.study_uid else ()),
        ("file", lambda case: (str(s.path.resolve()) for s in case.sequences.values())),
    )
    shared = []
    for what, keys in facts:
        where: dict[str, dict[str, str]] = {}
        for name, cases in splits.items():
            for case in cases:
                for key in keys(case):
                    where.setdefault(key, {}).setdefault(name, case.case_id)
        for key, places in where.items():
            if len(places) > 1:
                shown = " and ".join(f"{split} ({case_id})" for split, case_id in places.items())
                shared.append(f"{what} {key}: {shown}")
    if shared:
        more = f"\nand {len(shared) - _SHOWN} more" if len(shared) > _SHOWN else ""
        raise DataError(
            "The splits share patients: scores would be too good.",
            where="\n".join(shared[:_SHOWN]) + more,
            fix="make the split with `medssl split`, which keeps each patient on one side",
            code="split_leak",
        )


# --- the dataset string of DINOv2 ------------------------------------------------------------------------------------

_DATASET_LAYOUTS = {
    "ImageNet": "images",
    "ImageNet22k": "images",
    "ProstateSSL": "",
    "MedicalDataset": "",
    "GliomaSSL": "mmdinov2",
    "GliomaSupervised": "mmdinov2",
}
"""Names of data sets in DINOv2's strings, and the layout that a name tells."""
_DATASET_NAMES = tuple(_DATASET_LAYOUTS)
_PHOTOGRAPHS = ("ImageNet", "ImageNet22k")
_DATASET_KEYS = (
    "split",
    "root",
    "split_csv",
    "mri_sequences",
    "random_axes",
    "random_slices",
    "append_label_mask",
    "percentage_labels",
    "spatial_size",
)


def parse_dataset_string(text: str) -> dict[str, Any]:
    """``ProstateSSL:split=TRAIN:root="/a:b":random_axes=True`` as values of the ``data:`` section.

    Names of gliomas tell the layout of mm-dinov2 as well. DINOv2's own names of photographs need neither split nor
    root, which a user of such a file gives elsewhere; their ``extra`` folder of indices is not used.

    Quotes, single or double, hold a value together; a second ``=`` belongs to the value. Keys that are not given are
    not in the result.

    Raises:
        ConfigError: Every fault at once: unknown name or key with the nearest one, wrong value, missing split or root.
    """
    faults: list[str] = []
    name, *parts = _dataset_parts(text, faults)
    if name not in _DATASET_NAMES:
        faults.append(f"unknown dataset {name[:60]!r}{_did_you_mean(name, _DATASET_NAMES)}")
    values: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals:
            faults.append(f'{part[:60]!r} is not key=value; a value that holds a colon needs quotes: root="X:/data"')
        elif key == "extra" and name in _PHOTOGRAPHS:
            log.info("No effect: extra in the dataset string %s: no index of files is needed.", text[:200])
        elif key not in _DATASET_KEYS:
            faults.append(f"unknown key {key[:60]!r}{_did_you_mean(key, _DATASET_KEYS)}")
        elif key in values:
            faults.append(f"{key} is given twice")
        else:
            values[key] = _dataset_value(key, _unquoted(value), faults)
    needed = () if name in _PHOTOGRAPHS else ("split", "root")
    faults += [f"{key} is missing" for key in needed if key not in values]
    if faults:
        raise ConfigError(
            "The dataset string cannot be read.",
            where=f"{text[:200]!r}\n" + "\n".join(faults),
            fix="write ProstateSSL:split=TRAIN:root=DIR:split_csv=FILE, or use the data: section of the config",
            code="dataset_string",
        )
    if _DATASET_LAYOUTS[name]:
        values["layout"] = _DATASET_LAYOUTS[name]
    return values


def _dataset_parts(text: str, faults: list[str]) -> list[str]:
    """The text cut at colons outside quotes."""
    parts, quote = [""], ""
    for char in text.strip():
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'" and parts[-1].rstrip().endswith("="):
            quote = char
        elif char == ":":
            parts.append("")
            continue
        parts[-1] += char
    if quote:
        faults.append(f"the quote {quote} is never closed")
    return parts


def _unquoted(value: str) -> str:
    value = value.strip()
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value


def _did_you_mean(name: str, valid: Sequence[str]) -> str:
    near = difflib.get_close_matches(name[:60], valid, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else f"; valid: {', '.join(valid)}"


def _dataset_value(key: str, value: str, faults: list[str]) -> Any:
    if key == "split":
        if value.upper() not in ("TRAIN", "VAL", "TEST"):
            faults.append(f"split: TRAIN, VAL or TEST, not {value[:60]!r}")
        return value.upper()
    if key == "mri_sequences":
        names = tuple(part.strip() for part in value.split(",") if part.strip())
        if not names or len(set(names)) < len(names):
            faults.append(f"mri_sequences: different names joined by commas, not {value[:60]!r}")
        return names
    if key in ("random_axes", "random_slices", "append_label_mask"):
        if value.lower() not in ("true", "false"):
            faults.append(f"{key}: True or False, not {value[:60]!r}")
        return value.lower() == "true"
    if key == "percentage_labels":
        number = _number(value)
        if number is None:
            faults.append(f"{key}: a number from 0 to 1, not {value[:60]!r}")
        return None if number is None else min(1.0, max(0.0, number))
    if key == "spatial_size":
        number = _number(value)
        if number is None or number < 1 or number != int(number):
            faults.append(f"{key}: a positive whole number, not {value[:60]!r}")
            return None
        return int(number)
    if not value:
        faults.append(f"{key} is empty")
    return value


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if abs(number) < float("inf") else None
