"""Label tables: which row of a table is of which row of features, and what its cells mean as numbers.

A table may name cases, studies and series, patients or pictures; the first of these columns of which a cell names
something is taken. A label of a patient counts for all cases of the patient. Ids are text and cells are read as
everywhere else, see ``manifest.read_table``.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from medssl_cli.core.errors import DataError
from medssl_cli.core.run import hide_home
from medssl_cli.core.wording import counted
from medssl_cli.data.feature_store import Row
from medssl_cli.data.manifest import (
    ID_ALIASES,
    PATH_ALIASES,
    PATIENT_ALIASES,
    SERIES_ALIASES,
    STUDY_ALIASES,
    Table,
    joined_cells,
    match_image_ids,
    read_table,
    say_some,
)

log = logging.getLogger(__name__)

SLICE_COLUMN = "slice_index"
"""A table with this column labels slices."""
_IMAGE_ALIASES = ("image", "path", "file", *PATH_ALIASES)
_SHOWN = 8

Key = tuple[str, int | None]
"""(id as the table spells it, slice)."""


@dataclass(frozen=True)
class _Ids:
    """One way in which a table may name rows.

    Args:
        column: In words.
        cells: Of each line.
        kind: What the cells name: ``case``, ``study``, ``series`` or ``path``.
    """

    column: str
    cells: list[str]
    kind: str


def read_targets(
    path: Path, targets: Sequence[str], rows: Sequence[Row], *, of_images: bool, root: Path | None
) -> list[tuple[str, ...]]:
    """Text cells of the target columns for each row of features.

    Args:
        path: CSV with a column of ids, or of paths, and the targets.
        targets: Columns.
        rows: To be labelled; those of a whole case have no slice index.
        of_images: A column of paths is preferred to one of patients, and paths are matched in several spellings.
        root: Data root that paths are relative to.

    Returns:
        For each row a cell for each target; empty texts where the table tells nothing.

    Raises:
        DataError: Unknown columns, an id with two labels, labels of slices for rows of whole cases, or no row matched.
    """
    table = read_table(path)
    columns = target_columns(table, targets)
    slices = _slices_of(table, rows)
    tried = []
    for ids in _candidates(table, of_images=of_images):
        names = _names_of_rows(ids, rows, of_images=of_images, root=root)
        if any(names):
            labels = _labels_by_key(table, ids, slices, columns, targets)
            keys = [(name, None if slices is None else r.slice_index) for name, r in zip(names, rows, strict=True)]
            _tell_absent(path, rows, [key in labels for key in keys])
            return [labels.get(key, ("",) * len(targets)) for key in keys]
        tried.append(f"{ids.column}: {say_some(dict.fromkeys(ids.cells), 3)}")
    cases = dict.fromkeys(row.case_id for row in rows)
    raise DataError(
        "No label belongs to a case.",
        where=f"{hide_home(str(path))}: {'; '.join(tried)}\ncases: {say_some(cases, 3)}",
        fix="the ids of the labels must equal the names of the cases, patients or pictures; a spreadsheet may have cut "
        "leading zeros",
        code="labels_missing",
    )


def read_patients(path: Path, rows: Sequence[Row], *, of_images: bool, root: Path | None) -> dict[str, str]:
    """Patients that a table of labels tells, by case id; empty where it has no such column or names none of the cases.

    Only of cases whose patient is not known otherwise, whose patient is the case itself.

    Args:
        path: Table of labels.
        rows: As for ``read_targets``; slices count as their case.
        of_images: As for ``read_targets``.
        root: As for ``read_targets``.

    Raises:
        DataError: One case with two patients.
    """
    table = read_table(path)
    column = table.find(PATIENT_ALIASES)
    unknown = {row.case_id: row for row in rows if row.patient_id in ("", row.case_id)}
    if column is None or not unknown:
        return {}
    cells = table.column(column)
    for ids in _candidates(table, of_images=of_images):
        names = _names_of_rows(ids, list(unknown.values()), of_images=of_images, root=root)
        if any(names):
            owners = _labels_by_key(table, ids, None, [cells], [column])
            told = {case_id: owners[name, None][0] for case_id, name in zip(unknown, names, strict=True) if name}
            return {case_id: patient for case_id, patient in told.items() if patient}
    return {}


def target_columns(table: Table, targets: Sequence[str]) -> list[list[str]]:
    """Cells of each target column.

    Raises:
        DataError: Columns that the table does not have, all in one message with the nearest names.
    """
    unknown = [name for name in targets if table.header.count(name) != 1]
    if unknown or not targets:
        lines = []
        for name in unknown:
            near = difflib.get_close_matches(name, table.header, n=1, cutoff=0.5)
            many = table.header.count(name) > 1
            lines.append(
                f"{name!r} stands there twice"
                if many
                else f"{name!r}" + (f" (did you mean {near[0]!r}?)" if near else "")
            )
        raise DataError(
            "The table does not have the columns of the labels." if unknown else "No column of labels was named.",
            where=f"{hide_home(str(table.path))}: {', '.join(lines) or '--target is empty'}",
            fix=f"its columns: {', '.join(table.header)}",
            code="column_missing",
        )
    return [table.column(name) for name in targets]


def _slices_of(table: Table, rows: Sequence[Row]) -> list[int] | None:
    """Slice of each line of a table of slices; None for a table of cases."""
    column = table.find((SLICE_COLUMN,))
    if column is None:
        return None
    if any(row.slice_index is None for row in rows):
        raise DataError(
            "The labels are of slices, the features are of whole cases.",
            where=f"{hide_home(str(table.path))}: column {column!r}",
            fix="extract with --pool none, or drop the column to label whole cases",
            code="labels_by_slice",
        )
    slices = []
    for line, text in zip(table.lines, table.column(column), strict=True):
        if not text.isascii() or not text.isdigit():
            raise DataError(
                "A slice index is no whole number from 0 on.",
                where=f"{hide_home(str(table.path))}, line {line}: {text[:60]!r}",
                fix="count slices from 0 along the slice axis of the orientation",
                code="slice_index",
            )
        slices.append(int(text))
    return slices


# --- whose is a line -------------------------------------------------------------------------------------------------


def _candidates(table: Table, *, of_images: bool) -> Iterator[_Ids]:
    """The ways in which the table may name rows, the finest first; the first column if no name is known."""
    seen: set[str] = set()

    def column(aliases: Sequence[str], kind: str) -> Iterator[_Ids]:
        name = table.find(aliases)
        if name is not None and name not in seen:
            seen.add(name)
            yield _Ids(name, table.column(name), kind)

    if of_images:
        yield from column(_IMAGE_ALIASES, "path")
    yield from column(("case_id",), "case")
    study, series = table.find(STUDY_ALIASES), table.find(SERIES_ALIASES)
    if study is not None and series is not None and not of_images:
        yield _Ids(f"{study}, {series}", joined_cells(table, (study, series)), "case")
    yield from column(SERIES_ALIASES, "series")
    if not of_images:
        yield from column(_IMAGE_ALIASES, "path")
    yield from column(STUDY_ALIASES, "study")
    for aliases in (ID_ALIASES, PATIENT_ALIASES, ("case",)):
        yield from column(aliases, "path" if of_images else "case")
    if not seen and table.header:
        yield _Ids(table.header[0], table.column(table.header[0]), "path" if of_images else "case")


def _names_of_rows(ids: _Ids, rows: Sequence[Row], *, of_images: bool, root: Path | None) -> list[str]:
    """The id by which the table names each row; empty where it does not."""
    given = set(ids.cells) - {""}
    if ids.kind == "path":
        known = dict.fromkeys(row.case_id if of_images else row.path for row in rows)
        names = _by_path(ids.cells, list(known), root)
        by_path = [names.get(row.case_id if of_images else row.path, "") for row in rows]
        if any(by_path) or not of_images:
            return by_path
    answers = [_answers(row, ids.kind) for row in rows]
    return [next((name for name in names if name in given), "") for names in answers]


def _answers(row: Row, kind: str) -> tuple[str, ...]:
    """What a row answers to, the finest first."""
    if kind == "study":
        return (row.study_uid,)
    if kind == "series":
        return row.case_id, row.case_id.rpartition("__")[2]
    return row.case_id, row.patient_id, row.study_uid


def _by_path(cells: Sequence[str], known: Sequence[str], root: Path | None) -> dict[str, str]:
    """{path of a row: cell that names it}; absolute cells count from the root."""
    base = root.parent if root is not None and root.is_file() else root
    spelt = {_below(text, base): text for text in dict.fromkeys(cells) if text}
    found = match_image_ids(base or Path("/"), dict.fromkeys(spelt, ""), known)
    names = {name: spelt[given] for name, given in found.items()}
    return {**_by_ending(set(spelt.values()) - set(names.values()), set(known) - set(names)), **names}


def _by_ending(cells: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """{path: cell} of cells that tell folders above the root too, where one cell alone ends in the path."""
    ends: dict[str, list[str]] = {}
    for text in cells:
        parts = PurePosixPath(text.replace("\\", "/")).parts
        endings = ("/".join(parts[start:]) for start in range(1, len(parts)))
        if name := next((ending for ending in endings if ending in known), ""):
            ends.setdefault(name, []).append(text)
    return {name: texts[0] for name, texts in ends.items() if len(texts) == 1}


def _below(text: str, base: Path | None) -> str:
    if base is not None and os.path.isabs(text):
        for root in (base, base.absolute(), base.resolve()):
            if Path(text).is_relative_to(root):
                return Path(text).relative_to(root).as_posix()
    return text


def _labels_by_key(
    table: Table, ids: _Ids, slices: list[int] | None, columns: Sequence[Sequence[str]], targets: Sequence[str]
) -> dict[Key, tuple[str, ...]]:
    """Cells by id, and slice where the table has one.

    Raises:
        DataError: One id with two labels.
    """
    labels: dict[Key, tuple[str, ...]] = {}
    lines: dict[Key, int] = {}
    for place, (line, name) in enumerate(zip(table.lines, ids.cells, strict=True)):
        key = (name, None if slices is None else slices[place])
        cells = tuple(column[place] for column in columns)
        if labels.setdefault(key, cells) != cells:
            at = f"{name!r}" + ("" if key[1] is None else f", slice {key[1]},")
            raise DataError(
                "One id has two labels.",
                where=f"{hide_home(str(table.path))}, lines {lines[key]} and {line}: {at} is "
                f"{_say(targets, labels[key])} and {_say(targets, cells)}",
                fix="keep one row for each id",
                code="label_conflict",
            )
        lines.setdefault(key, line)
    return labels


def _say(targets: Sequence[str], cells: Sequence[str]) -> str:
    return ", ".join(f"{target}={cell!r}" for target, cell in zip(targets, cells, strict=True))


def _tell_absent(path: Path, rows: Sequence[Row], told: Sequence[bool]) -> None:
    known = {row.case_id for row, has_label in zip(rows, told, strict=True) if has_label}
    absent = [case_id for case_id in dict.fromkeys(row.case_id for row in rows) if case_id not in known]
    if absent:
        log.warning(
            "%s tells nothing of %s: %s", hide_home(str(path)), counted(len(absent), "case"), say_some(absent, 5)
        )


# --- cells to numbers ------------------------------------------------------------------------------------------------


def encode_columns(
    cells: Sequence[tuple[str, ...]],
    targets: Sequence[str],
    label_values: Mapping[str, Sequence[str]] | None = None,
) -> tuple[np.ndarray, dict[str, list[str]]]:
    """Text cells as numbers.

    A column of numbers keeps them. Any other column is classes: the place of its text in sorted order.

    Args:
        cells: One text for each target of each row; empty for unknown.
        targets: Names of the columns.
        label_values: Texts by class of each column of classes, as made before; all others must be numbers.

    Returns:
        (R, C) float32 with NaN where unknown, and the texts by class of each column that is not of numbers.

    Raises:
        DataError: A text that ``label_values`` does not know, or an infinite number.
    """
    labels_RC = np.full((len(cells), len(targets)), np.nan, np.float32)
    values: dict[str, list[str]] = {}
    for column, target in enumerate(targets):
        texts = [row[column] for row in cells]
        numbers = [_number(text) for text in texts]
        known = None if label_values is None else label_values.get(target)
        is_classes = known is not None if label_values is not None else any(n is None for n in numbers)
        if is_classes:
            values[target] = list(known) if known is not None else sorted({text for text in texts if text})
            numbers = _places(texts, values[target], target)
        labels_RC[:, column] = _checked(numbers, texts, target)
    return labels_RC, values


def _number(text: str) -> float | None:
    """The number; NaN for an empty text, None for another."""
    if not text:
        return math.nan
    try:
        return None if "_" in text else float(text)  # Python takes 1_2 for twelve
    except ValueError:
        return None


def _places(texts: Sequence[str], names: Sequence[str], target: str) -> list[float | None]:
    unknown = sorted({text for text in texts if text} - set(names))
    if unknown:
        raise DataError(
            "A label is none of the known classes.",
            where=f"{target}: {say_some(unknown)}; known: {', '.join(names)}",
            fix="correct the labels; spelling and capitals count",
            code="label_unknown",
        )
    place = {name: float(number) for number, name in enumerate(names)}
    return [place[text] if text else math.nan for text in texts]


def _checked(numbers: Sequence[float | None], texts: Sequence[str], target: str) -> list[float]:
    bad = [text for number, text in zip(numbers, texts, strict=True) if number is None or math.isinf(number)]
    if bad:
        raise DataError(
            "A label is no finite number.",
            where=f"{target}: {say_some(dict.fromkeys(bad), _SHOWN)}",
            fix="leave the cell empty where the value is unknown",
            code="label_number",
        )
    return [number for number in numbers if number is not None]
