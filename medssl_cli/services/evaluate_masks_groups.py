"""Whose case a pair of label maps is, and what tables say of it: for intervals over patients and for subgroups."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medssl_cli.core.errors import DataError
from medssl_cli.core.run import hide_home
from medssl_cli.core.wording import counted
from medssl_cli.data.feature_store import Row
from medssl_cli.data.labels import read_patients, read_targets
from medssl_cli.data.manifest import groups_by_pattern, read_owners, read_table, say_some
from medssl_cli.services.evaluate_request import EvaluateRequest

_SLICE_NAME = re.compile(r"^(.+?)_slice_\d+$", re.IGNORECASE)
UNKNOWN_NOTE = (
    "No patients are known beside the cases: each case counts as a patient of its own, so intervals are too narrow "
    "where a patient has several. Name them with --group-pattern or with a column patient_id in --subgroups."
)


@dataclass(frozen=True)
class CaseTables:
    """Cases and the tables in which something is said of them.

    Args:
        rows: One a case, by which tables name it.
        root: Folder of the references or of the data.
        tables: With columns of these cases.
        of_images: The cases are pictures.
    """

    rows: tuple[Row, ...]
    root: Path
    tables: tuple[Path, ...] = ()
    of_images: bool = False

    def kept(self, case_ids: Sequence[str]) -> CaseTables:
        """With the rows of some of the cases, in the order of these."""
        rows = {row.case_id: row for row in self.rows}
        return replace(self, rows=tuple(rows[name] for name in case_ids))

    def column(self, name: str) -> list[str]:
        """Text of a column for each case, empty where it is not known.

        Raises:
            DataError: No table has it.
        """
        for path in self.tables:
            if name in read_table(path).header:
                cells = read_targets(path, [name], self.rows, of_images=self.of_images, root=self.root)
                return [cell for (cell,) in cells]
        known = [column for path in self.tables for column in read_table(path).header]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        raise DataError(
            f"No table of the cases has a column {name!r}.",
            where=", ".join(hide_home(str(path)) for path in self.tables) or "no table is known",
            fix=f"did you mean {near[0]!r}?" if near else "pass --subgroups CSV with a column of ids and this one",
            code="column_missing",
        )


def tables_at(root: Path, subgroups: Path | None) -> tuple[Path, ...]:
    """Tables of the cases: the one given, and those at the root of the references or above it."""
    folder = root if root.is_dir() else root.parent
    near = [at / name for at in (folder, folder.parent) for name in ("cases.csv", "labels.csv")]
    return tuple(
        dict.fromkeys([*([] if subgroups is None else [subgroups]), *(path for path in near if path.is_file())])
    )


def with_patients(cases: CaseTables, patients: Mapping[str, str], asked: Sequence[str]) -> CaseTables:
    """The cases with their patients, by which tables may name them; a study is what follows the patient in the name.

    Args:
        cases: Without.
        patients: Of each case.
        asked: Columns that will be wanted: they are looked for now, before anything is measured.

    Raises:
        DataError: A column is nowhere to be found, or no case is in its table.
    """
    rows = []
    for row in cases.rows:
        patient = patients[row.case_id]
        study = row.case_id.removeprefix(patient)[1:] if row.case_id.startswith(f"{patient}_") else row.study_uid
        rows.append(replace(row, patient_id=patient, study_uid=study))
    known = replace(cases, rows=tuple(rows))
    for name in asked:
        known.column(name)
    return known


def patients_of(request: EvaluateRequest, cases: CaseTables) -> tuple[dict[str, str], str, tuple[str, ...]]:
    """(group of each case, what groups them, what the reader has to know of it).

    The first that there is: the column of --group-by, the pattern, the table of --subgroups, the tables beside the
    references, the part before ``_slice_`` of every name, each case by itself.

    Raises:
        ConfigError: The pattern is none.
        DataError: Cases without a group.
    """
    names = [row.case_id for row in cases.rows]
    if request.group_by is not None:
        return (
            _filled(dict(zip(names, cases.column(request.group_by), strict=True)), request.group_by),
            request.group_by,
            (),
        )
    if request.group_pattern is not None:
        return groups_by_pattern(names, request.group_pattern), "patient_id", ()
    known = _known_patients(request, cases)
    if known:
        lost = [name for name in names if name not in known]
        notes = (f"The patient of {counted(len(lost), 'case')} is not known: {say_some(lost)}.",) if lost else ()
        return {name: known.get(name, name) for name in names}, "patient_id", notes
    slices = {name: match[1] for name in names if (match := _SLICE_NAME.match(name.rpartition("/")[2]))}
    if len(slices) == len(names) and names:
        return slices, "patient_id", ()
    return {name: name for name in names}, "case_id", (UNKNOWN_NOTE,)


def _known_patients(request: EvaluateRequest, cases: CaseTables) -> dict[str, str]:
    """Patients that tables or the data tell, by case."""
    names = {row.case_id for row in cases.rows}
    known = {row.case_id: row.patient_id for row in cases.rows if row.patient_id not in ("", row.case_id)}
    folder = cases.root if cases.root.is_dir() else cases.root.parent
    for root in (folder.parent, folder):
        known |= {name: owner.patient_id for name, owner in read_owners(root).items() if owner.patient_id}
    if request.subgroups is not None:
        blank = [Row(row.case_id, "", row.study_uid, None, 1, 0, row.path) for row in cases.rows]
        known |= read_patients(request.subgroups, blank, of_images=cases.of_images, root=cases.root)
    return {name: patient for name, patient in known.items() if name in names}


def _filled(groups: dict[str, str], column: str) -> dict[str, str]:
    unknown = [name for name, group in groups.items() if not group]
    if unknown:
        raise DataError(
            f"{counted(len(unknown), 'case')} without a group.",
            where=f"--group-by {column}: {say_some(unknown)}",
            fix="fill the column for every case",
            code="group_unknown",
        )
    return groups


def case_rows(case_ids: Sequence[str], names: Sequence[str], patients: Sequence[str] | None = None) -> tuple[Row, ...]:
    """Rows by which tables name cases; ``names`` are files below the root."""
    owners = patients or [""] * len(case_ids)
    return tuple(Row(c, p, "", None, 1, 0, n) for c, p, n in zip(case_ids, owners, names, strict=True))
