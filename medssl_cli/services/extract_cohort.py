"""The cases of a cohort in their splits, as a backbone wants them: trees, tables and other layouts, leaks refused."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from medssl_cli.core.case import Case
from medssl_cli.core.case import Sequence as CaseSequence
from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.core.run import hide_home
from medssl_cli.core.wording import counted
from medssl_cli.data.copies import refuse_copies
from medssl_cli.data.datasets import DataConfig
from medssl_cli.data.feature_store import ALL, Row
from medssl_cli.data.images import is_image, volume_stem
from medssl_cli.data.labels import read_patients
from medssl_cli.data.layouts import detect_layout
from medssl_cli.data.manifest import IMAGE, ROI_STEM, case_ids, check_no_overlap, say_some
from medssl_cli.data.sequences import resolve_sequence
from medssl_cli.services.backbone import Backbone
from medssl_cli.services.training_data import SPLITS, Failure, Kind, TrainingData, read_training_data, tell_absent

log = logging.getLogger(__name__)

OnError = Literal["stop", "skip"]
_LOOKED_AT = 20
"""Case folders, or files, that are looked at to learn what a folder is."""
_NO_DICOM = (".csv", ".tsv", ".txt", ".json", ".yaml", ".md", ".html")


@dataclass(frozen=True)
class Cohort:
    """Cases in their splits.

    Args:
        root: Folder or table that was read.
        parts: Cases by split, in order of their ids; ``all`` where no split is known.
        kind: ``volumes`` or ``images``.
        group_level: What tells people apart: ``patient_id``, ``study_uid`` or ``case_id``.
        config: Of the data, as it was read.
        invalid: Cases that were left out, by split.
    """

    root: Path
    parts: dict[str, list[Case]]
    kind: Kind
    group_level: str
    config: DataConfig
    invalid: dict[str, list[Failure]] = field(default_factory=dict)

    @property
    def unreadable(self) -> list[Failure]:
        """Cases of all splits that were left out."""
        return [failure for failures in self.invalid.values() for failure in failures]

    @property
    def cases(self) -> list[Case]:
        """Of all splits."""
        return [case for cases in self.parts.values() for case in cases]


class CohortOptions(Protocol):
    """The options by which every command chooses the cases of a cohort; see ``read_cohort``."""

    @property
    def split_csv(self) -> Path | None:
        """One list of cases."""

    @property
    def splits(self) -> Path | None:
        """Folder of lists."""

    @property
    def sequence(self) -> str | None:
        """The one sequence to read."""

    @property
    def labels(self) -> Path | None:
        """Table that may tell patients."""

    @property
    def on_error(self) -> OnError:
        """What a bad case does."""


def asked_cohort(root: Path, backbone: Backbone, options: CohortOptions) -> Cohort:
    """``read_cohort`` with the options of a command, all of them: one that is forgotten may let patients leak."""
    return read_cohort(
        root,
        backbone,
        split_csv=options.split_csv,
        splits=options.splits,
        sequence=options.sequence,
        labels=options.labels,
        on_error=options.on_error,
    )


def read_cohort(
    root: Path,
    backbone: Backbone,
    *,
    split_csv: Path | None = None,
    splits: Path | None = None,
    sequence: str | None = None,
    labels: Path | None = None,
    on_error: OnError = "stop",
) -> Cohort:
    """Read a case tree, an image tree, a series table or another layout; nothing but names and headers.

    Args:
        root: What to read.
        backbone: Tells the sequences and how volumes are prepared.
        split_csv: One list of cases to take.
        splits: Folder of `medssl split`: ``train.csv``, ``val.csv`` and ``test.csv``, as far as they are there.
        sequence: The one sequence to read: the stem of its files, or what the volumes of a table are.
        labels: Table of labels, which may tell the patient of each case; else ``labels.csv`` in the tree.
        on_error: Whether a bad case stops, or is left out and listed.

    Raises:
        ConfigError: Contradicting options, or a sequence that has to be named.
        DataError: Missing or unreadable cases, or splits that share patients or images.
    """
    if split_csv is not None and splits is not None:
        raise ConfigError(
            "Cases come from one list or from a folder of lists, not from both.",
            where="--split-csv and --splits",
            fix="leave one of them out",
            code="flags_exclude",
        )
    config = _data_config(root, backbone, sequence, on_error)
    lists = _lists_in(splits) if splits is not None else {} if split_csv is None else {_list_name(split_csv): split_csv}
    if lists:
        read = {name: _read(config, backbone, path, compare=splits is None) for name, path in lists.items()}
        parts = {name: found.cases for name, found in read.items()}
        invalid = {name: found.unreadable for name, found in read.items()}
        first = next(iter(read.values()))
    else:
        first = _read(config, backbone, None)
        parts = _by_split(root, first.cases)
        invalid = _failures_by_part(first.unreadable, parts)
    _refuse_other_kind(root, first, backbone)
    if first.kind == "volumes":
        every = [case for cases in parts.values() for case in cases]
        tell_absent(every, first.config.mri_sequences, "Its tokens are masked there.")
    parts = _with_patients(parts, root, labels, of_images=first.kind == "images")
    check_no_overlap(parts)
    refuse_copies(parts)
    parts = {name: [_renamed(case, backbone) for case in cases] for name, cases in parts.items()}
    return Cohort(root, parts, first.kind, _group_level(parts), first.config, {n: f for n, f in invalid.items() if f})


def is_cohort(path: Path, backbone: Backbone) -> bool:
    """Whether a folder or file is a cohort, as against one case.

    A table is a cohort, a volume or a picture is one case. A folder that holds volumes of the model's sequences, or
    DICOM files, is one case; another one whose sub-folders hold volumes, or with pictures anywhere, is a cohort.
    """
    if not path.is_dir():
        return path.suffix.lower() in (".csv", ".tsv", ".txt")
    is_plain = backbone.model.sequences is None
    holds_own = any(resolve_sequence(path, name) is not None for name in backbone.sequences)
    if holds_own or (is_plain and _stems(path) and not _has_cases(path)) or _holds_dicom(path):
        return False
    try:
        return detect_layout(path) != "cases" or _has_cases(path)
    except DataError:
        return False


def _has_cases(root: Path) -> bool:
    return any(_stems(root / name) for name in case_ids(root))


def _holds_dicom(folder: Path) -> bool:
    """Whether a file right in the folder has DICOM's magic word; the first ones are looked into."""
    files = (entry for entry in folder.iterdir() if entry.is_file() and not is_image(entry))
    for path in islice((path for path in files if path.suffix.lower() not in _NO_DICOM), _LOOKED_AT):
        with path.open("rb") as file:
            if file.read(132)[128:] == b"DICM":
                return True
    return False


# --- how the data are read -------------------------------------------------------------------------------------------


def _data_config(root: Path, backbone: Backbone, sequence: str | None, on_error: OnError) -> DataConfig:
    layout = detect_layout(root)
    values: dict[str, Any] = {"root": str(root), "roi": "", "on_error": on_error, "preprocess": backbone.preprocess}
    plain = backbone.model.sequences is None
    names: tuple[str, ...] | None = None if plain else backbone.sequences
    if layout == "images":
        names = None
        if sequence is not None:
            raise ConfigError(
                "--sequence tells which volumes to read; these are pictures.",
                where=hide_home(str(root)),
                fix="leave it out",
                code="sequence_needless",
            )
    elif sequence is not None:
        names = (_known(sequence, backbone),)
    elif layout == "cases" and plain:
        names = (_only_stem(root),)
    elif layout == "table" and not plain and len(backbone.sequences) > 1:
        raise ConfigError(
            "A row of a table is a volume of one sequence, the model takes several.",
            where=f"{hide_home(str(root))}; the model's sequences: {', '.join(backbone.sequences)}",
            fix="tell which one it is with --sequence, or put the sequences of a case into one folder",
            code="table_sequences",
        )
    return DataConfig(**values) if names is None else DataConfig(**values, mri_sequences=names)


def _known(sequence: str, backbone: Backbone) -> str:
    """A sequence of the model; one for plain pictures looks at any."""
    if backbone.model.sequences is not None and sequence not in backbone.sequences:
        raise ConfigError(
            f"The model has no sequence {sequence!r}.",
            where=f"its sequences: {', '.join(backbone.sequences)}",
            fix="pass one of them to --sequence",
            code="sequence_unknown",
        )
    return sequence


def _only_stem(root: Path) -> str:
    """The one sequence that every case has, for a model to which it is just a picture.

    Raises:
        ConfigError: There are several, or none that all have.
    """
    found = [_stems(root / name) - {ROI_STEM, "mask", "label", "seg"} for name in case_ids(root)[:_LOOKED_AT]]
    counts = Counter(stem for stems in found for stem in stems)
    common = [stem for stem, count in counts.items() if count == len(found)]
    if len(common) == 1 and len(counts) == 1:
        log.info("sequence: %s, the only one there is", common[0])
        return common[0]
    raise ConfigError(
        "The model looks at single pictures: which sequence of the cases is to be shown to it has to be told.",
        where=f"{hide_home(str(root))}: {say_some(sorted(counts))}",
        fix="pass one of them to --sequence",
        code="sequence_missing",
    )


def _stems(folder: Path) -> set[str]:
    return {stem for path in folder.iterdir() if (stem := volume_stem(path)) is not None}


def _read(config: DataConfig, backbone: Backbone, split_csv: Path | None, *, compare: bool = True) -> TrainingData:
    update = {"split_csv": None if split_csv is None else str(split_csv)}
    found = read_training_data(config.model_copy(update=update), every_split=True, compare_lists=compare)
    if backbone.model.sequences is None and found.kind == "volumes" and len(found.config.mri_sequences) > 1:
        raise ConfigError(
            "The model looks at single pictures: which sequence of the cases is to be shown to it has to be told.",
            where=f"{hide_home(config.root)}: {', '.join(found.config.mri_sequences)}",
            fix="pass one of them to --sequence",
            code="sequence_missing",
        )
    return found


def _renamed(case: Case, backbone: Backbone) -> Case:
    """The case under the name by which a model of plain pictures knows its one image."""
    if backbone.model.sequences is not None or set(case.sequences) == {IMAGE}:
        return case
    (entry,) = case.sequences.values()
    return replace(case, sequences={IMAGE: CaseSequence(IMAGE, entry.path, entry.volume_index, entry.note)})


def _refuse_other_kind(root: Path, found: TrainingData, backbone: Backbone) -> None:
    if found.kind == "images" and backbone.model.sequences is not None:
        raise DataError(
            "The model reads volumes, these are pictures.",
            where=f"{hide_home(str(root))}; the model's sequences: {', '.join(backbone.sequences)}",
            fix="name volumes, or a model pretrained on pictures",
            code="case_kind",
        )


# --- splits ----------------------------------------------------------------------------------------------------------


def _lists_in(folder: Path) -> dict[str, Path]:
    found = {name: folder / f"{name}.csv" for name in SPLITS if (folder / f"{name}.csv").is_file()}
    if not found:
        raise DataError(
            "There is no split here.",
            where=f"{hide_home(str(folder))}: none of {', '.join(f'{name}.csv' for name in SPLITS)}",
            fix="name the --out folder of `medssl split`",
            code="split_missing",
        )
    return found


def _with_patients(
    parts: Mapping[str, list[Case]], root: Path, labels: Path | None, *, of_images: bool
) -> dict[str, list[Case]]:
    """The cases with the patients that a table of labels tells, so that both eyes of one stay on one side."""
    base = root if root.is_dir() else root.parent
    table = labels or root / "labels.csv"
    if not table.is_file():
        return dict(parts)
    rows = [
        Row(case.case_id, case.patient_id, case.study_uid, None, 0, 0, row_path(case, base))
        for cases in parts.values()
        for case in cases
    ]
    owners = read_patients(table, rows, of_images=of_images, root=base)
    if owners:
        log.info("patients of %s are those that %s tells", counted(len(owners), "case"), hide_home(str(table)))
    return {
        name: [replace(case, patient_id=owners.get(case.case_id, case.patient_id)) for case in cases]
        for name, cases in parts.items()
    }


def row_path(case: Case, base: Path) -> str:
    """The image of a case, or the folder of several; relative to the data root where it lies below it."""
    paths = [sequence.path for sequence in case.sequences.values()]
    path = paths[0] if len(paths) == 1 else paths[0].parent
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else hide_home(str(path))


def _list_name(path: Path) -> str:
    return path.stem if path.stem in SPLITS else ALL


def _by_split(root: Path, cases: list[Case]) -> dict[str, list[Case]]:
    """Cases by the split that folders or a column tell; a table named train.csv is that split."""
    counts = Counter(case.split for case in cases)
    if set(counts) <= {""}:
        return {_list_name(root) if root.is_file() else ALL: cases}
    if counts[""]:
        log.warning("%s in no split folder left out", counted(counts[""], "case"))
    return {name: [case for case in cases if case.split == name] for name in SPLITS if counts[name]}


def _failures_by_part(failures: list[Failure], parts: Mapping[str, list[Case]]) -> dict[str, list[Failure]]:
    """Of a bad case no split is known but where there is only one."""
    return {next(iter(parts)) if len(parts) == 1 else ALL: failures}


def _group_level(parts: Mapping[str, list[Case]]) -> str:
    cases = [case for found in parts.values() for case in found]
    if all(case.patient_id == case.case_id for case in cases):
        return "case_id"
    known = [case for case in cases if case.patient_id != case.case_id]
    return "study_uid" if all(case.patient_id == case.study_uid for case in known) else "patient_id"
