"""What a conversion of a layout would write: which file goes where, whose it is, and what stands in its way.

A plan is made of names and headers alone. Everything that cannot be converted is found here, before anything is
written, and told at once.
"""

from __future__ import annotations

import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from medssl_cli.core.errors import DataError
from medssl_cli.core.run import MARKER, contained, hide_home
from medssl_cli.core.wording import counted
from medssl_cli.data.manifest import groups_by_pattern

PARTS = ("train", "val", "test")
FOLDS = "folds"
"""Folder of the lists of folds; its marker tells readers of case trees that it is no case."""

_RESERVED = (FOLDS, MARKER)
_MAX_NAME_BYTES = 255

Rows = list[tuple[object, ...]]
Tables = dict[str, tuple[tuple[str, ...], Rows]]
"""(header, rows) by the path of a CSV below the output folder."""


@dataclass(frozen=True)
class Placement:
    """One file.

    Args:
        source: Where it is.
        target: Where it goes, relative to the output folder, with forward slashes.
        volume: The one of a 4-D file that is cut out; None for the file as it is.
    """

    source: Path
    target: str
    volume: int | None = None


@dataclass(frozen=True)
class Fault:
    """What cannot be converted, and why; one line of ``failures.csv``."""

    case_id: str
    path: str
    reason: str
    fix: str
    code: str


@dataclass(frozen=True)
class PlannedCase:
    """The files that stay together.

    Args:
        case_id: As readers of the result will call it: a folder, or the path of a picture.
        files: What is written.
        part: ``train``, ``val``, ``test`` or empty.
        patient_id: Where something tells it; else empty.
        cells: Of the columns of ``labels.csv``.
    """

    case_id: str
    files: tuple[Placement, ...]
    part: str = ""
    patient_id: str = ""
    cells: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A conversion, worked out.

    Args:
        product: What comes out, in words.
        id_column: Of ``labels.csv``: ``case_id`` of a tree of cases, ``image`` of pictures; empty writes no tables.
        cases: In the order in which they are written.
        faults: What is left out.
        columns: Of ``labels.csv``, beside id, patient and part.
        documents: JSON files of the result.
        folds: Ids of train and val by fold.
        notes: What a reader should know.
        ignored: Files of the source that nothing was made of.
        next_steps: Commands that read the result, with ``OUT`` for its folder.
        follows_links: A file may be a link to anywhere, as the reader of this layout takes it.
    """

    product: str
    id_column: Literal["case_id", "image", ""]
    cases: tuple[PlannedCase, ...]
    faults: tuple[Fault, ...] = ()
    columns: tuple[str, ...] = ()
    documents: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    folds: tuple[Mapping[str, Sequence[str]], ...] = ()
    notes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    next_steps: tuple[str, ...] = ()
    follows_links: bool = False

    @property
    def counts(self) -> dict[str, int]:
        """Cases by part; ``all`` where nothing tells parts."""
        found = {part: sum(case.part == part for case in self.cases) for part in (*PARTS, "")}
        return {part or "all": count for part, count in found.items() if count}

    @property
    def n_patients(self) -> int | None:
        """Patients; None where nothing tells them."""
        known = {case.patient_id for case in self.cases} - {""}
        return len(known) or None

    def tables(self) -> Tables:
        """The CSVs of the result: lists by part, labels, and where each file comes from."""
        return {**self._lists(), **self._labels()}

    def _lists(self) -> Tables:
        found: Tables = {}
        if not self.id_column:
            return found
        has_groups = self.id_column == "image" and any(case.patient_id for case in self.cases)
        header = ("patient_id", "group") if has_groups else ("patient_id",)
        for part in PARTS:
            cases = [case for case in self.cases if case.part == part]
            if cases:
                rows: Rows = [(c.case_id, c.patient_id or c.case_id)[: len(header)] for c in cases]
                found[f"{part}.csv"] = (header, rows)
        here = {case.case_id for case in self.cases}
        for number, fold in enumerate(self.folds):
            for part, names in fold.items():
                found[f"{FOLDS}/fold_{number}/{part}.csv"] = (("patient_id",), [(n,) for n in names if n in here])
        return found

    def _labels(self) -> Tables:
        has_patients = any(case.patient_id for case in self.cases)
        if not self.id_column or not (self.columns or has_patients):
            return {}
        has_parts = any(case.part for case in self.cases)
        header = (
            self.id_column,
            *(("patient_id",) if has_patients else ()),
            *self.columns,
            *(("split",) if has_parts else ()),
        )
        rows: Rows = [
            (
                case.case_id,
                *((case.patient_id or case.case_id,) if has_patients else ()),
                *case.cells,
                *((case.part,) if has_parts else ()),
            )
            for case in self.cases
        ]
        return {"labels.csv": (header, rows)}


def checked(plan: Plan, root: Path) -> Plan:
    """The plan without what cannot be placed: its faults name files that are missing, empty or unreadable, names that
    collide, paths that leave a folder, and patients in two parts."""
    faults = [
        *_file_faults(plan, root),
        *_collisions(plan.cases),
        *_leaks(plan.cases),
    ]
    bad = {fault.case_id for fault in faults}
    kept = tuple(case for case in plan.cases if case.case_id not in bad)
    return replace(plan, cases=kept, faults=(*plan.faults, *faults))


def with_patients(cases: Sequence[PlannedCase], names: Sequence[str], pattern: str | None) -> tuple[PlannedCase, ...]:
    """The cases with the patient that a pattern finds in ``names``, one for each case.

    Raises:
        ConfigError: Not a regular expression.
        DataError: Names that it does not match.
    """
    if pattern is None:
        return tuple(cases)
    groups = groups_by_pattern(list(dict.fromkeys(names)), pattern)
    return tuple(replace(case, patient_id=groups[name]) for case, name in zip(cases, names, strict=True))


def pictures_by_place(root: Path, is_wanted: Any) -> tuple[list[PurePosixPath], list[str]]:
    """(paths of the wanted files below ``root``, sorted; files and linked folders that are not taken).

    Hidden entries are in neither.
    """
    found: list[PurePosixPath] = []
    others: list[str] = []
    for here, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        base = Path(here)
        others += [f"{(base / n).relative_to(root).as_posix()}/" for n in folders if (base / n).is_symlink()]
        for name in sorted(files):
            if not name.startswith("."):
                relative = PurePosixPath((base / name).relative_to(root).as_posix())
                if is_wanted(Path(name)):
                    found.append(relative)
                else:
                    others.append(relative.as_posix())
    return sorted(found), others


def flat_name(parts: Iterable[str]) -> str:
    """Folders and file name as one file name: ``a/b/1.jpg`` becomes ``a__b__1.jpg``."""
    return "__".join(parts)


def describe_faults(faults: Sequence[Fault], shown: int = 100) -> str:
    """A line for each fault, for the ``where`` of an error."""
    lines = [f"{fault.path}: {fault.reason}" for fault in faults[:shown]]
    return "\n".join([*lines, *([f"and {len(faults) - shown} more"] if len(faults) > shown else [])])


# --- what cannot be placed -------------------------------------------------------------------------------------------


def _file_faults(plan: Plan, root: Path) -> Iterator[Fault]:
    for case in plan.cases:
        for file in case.files:
            fault = _source_fault(root, file.source, follows=plan.follows_links) or _target_fault(file.target)
            if fault is not None:
                yield Fault(case.case_id, _shown(root, file.source), *fault)


def _source_fault(root: Path, path: Path, *, follows: bool) -> tuple[str, str, str] | None:
    try:
        if not follows:
            contained(root, path.relative_to(root), "file")
        found = path.stat()
    except DataError as error:
        return f"{error.what} {error.where}", error.fix, error.code
    except FileNotFoundError:
        return "the file is missing", "add it, or leave the case out", "file_missing"
    except OSError as error:
        return str(error.strerror), "make it readable", "file_unreadable"
    if not stat.S_ISREG(found.st_mode):
        return "this is no file", "remove it", "file_missing"
    if found.st_size == 0:
        return "the file is empty", "fetch it again", "file_empty"
    if not os.access(path, os.R_OK):
        return "the file may not be read", "make it readable", "file_unreadable"
    return None


def _target_fault(target: str) -> tuple[str, str, str] | None:
    parts = PurePosixPath(target).parts
    if any(len(part.encode("utf-8", "surrogatepass")) > _MAX_NAME_BYTES for part in parts):
        return f"its new name is longer than {_MAX_NAME_BYTES} bytes: {target[:80]}…", "shorten it", "name_long"
    if parts[0] in _RESERVED:
        return f"the name {parts[0]!r} is taken by the result itself", "rename it", "name_collision"
    return None


def _collisions(cases: Sequence[PlannedCase]) -> Iterator[Fault]:
    """Files that would have one name; capitals do not count, for some disks do not tell them apart."""
    by_name: dict[str, list[tuple[PlannedCase, Placement]]] = defaultdict(list)
    for case in cases:
        for file in case.files:
            by_name[file.target.casefold()].append((case, file))
    for found in by_name.values():
        if len(found) > 1:
            every = " and ".join(str(file.source.name) for _, file in found)
            for case, file in found:
                reason = f"{counted(len(found), 'file')} would be called {file.target}: {every}"
                yield Fault(case.case_id, file.source.name, reason, "rename one of them", "name_collision")


def _leaks(cases: Sequence[PlannedCase]) -> Iterator[Fault]:
    """Patients in two parts."""
    parts: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        if case.patient_id and case.part:
            parts[case.patient_id].add(case.part)
    for case in cases:
        if len(parts.get(case.patient_id, ())) > 1:
            reason = f"patient {case.patient_id} is in {' and '.join(sorted(parts[case.patient_id]))}"
            fix = "keep each patient in one part, or join the parts and split anew with `medssl split`"
            yield Fault(case.case_id, case.case_id, reason, fix, "split_leak")


def _shown(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else hide_home(str(path))
