"""From a data root to cases and a prepared store, with the gates that every training command shares."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medssl_cli.core.case import Case
from medssl_cli.core.errors import ConfigError, DataError
from medssl_cli.data.checks import check_geometry
from medssl_cli.data.copies import refuse_copies
from medssl_cli.data.datasets import DataConfig, ImageDataset, SliceDataset
from medssl_cli.data.manifest import (
    check_no_overlap,
    detect_kind,
    read_case,
    read_cases,
    read_ids,
    read_image_cases,
    read_owners,
    say_some,
    split_digest,
)
from medssl_cli.data.store import Store

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
Kind = Literal["volumes", "images"]
Failure = tuple[str, str, str, str]
"""(case_id, path, reason, fix)."""


@dataclass(frozen=True)
class TrainingData:
    """Cases of a run and what is known of them before a voxel is read.

    Args:
        cases: In order of their ids.
        kind: ``volumes`` or ``images``.
        split_digest: SHA-256 of the sorted ids.
        unreadable: Cases left out with ``on_error: skip``.
    """

    cases: list[Case]
    kind: Kind
    split_digest: str
    unreadable: list[Failure]


def read_training_data(config: DataConfig) -> TrainingData:
    """Read the cases that a config names, and refuse a split that leaks.

    Raises:
        ConfigError: No data root was given.
        DataError: Missing or unreadable cases, cases without any of the sequences, headers that contradict each other,
            or a leak between splits.
    """
    if not config.root:
        raise ConfigError(
            "No data was named.", where="data.root", fix="pass --data ROOT, or set data.root", code="data_missing"
        )
    root = Path(config.root)
    kind = _kind(config, root)
    unreadable: list[Failure] = []
    cases = _read(config, root, kind, unreadable)
    if kind == "images" and config.split_csv is None:
        cases = _of_split(config, root, cases)
    if kind == "volumes":
        cases = _with_sequences(config, root, cases, unreadable)
        cases = _in_place(config, cases, unreadable)
        _tell_absent(cases, config.mri_sequences)
    if config.split_csv is not None:
        _refuse_leak(root, kind, Path(config.split_csv), config, cases)
    return TrainingData(cases, kind, split_digest(case.case_id for case in cases), unreadable)


def build_dataset(store: Store, config: DataConfig, seed: int) -> SliceDataset | ImageDataset:
    """Slices of volumes, or whole pictures."""
    return SliceDataset(store, config, seed) if store.kind == "volumes" else ImageDataset(store)


def _kind(config: DataConfig, root: Path) -> Kind:
    if config.kind != "auto":
        return config.kind
    found = detect_kind(root)
    if found == "table":
        raise ConfigError(
            "A series table is no input of this command yet.",
            where=str(root),
            fix="name the folder of cases; `medssl convert dicom` makes one",
            code="data_kind",
        )
    return "volumes" if found == "cases" else "images"


def _read(config: DataConfig, root: Path, kind: Kind, unreadable: list[Failure]) -> list[Case]:
    split_csv = None if config.split_csv is None else Path(config.split_csv)
    if kind == "images":
        return read_image_cases(root, split_csv=split_csv)
    on_fault: Callable[[str, DataError], None] | None = None
    if config.on_error == "skip":

        def on_fault(case_id: str, error: DataError) -> None:
            unreadable.append((case_id, str(root / case_id), error.what, error.fix))

    return read_cases(root, config.mri_sequences, split_csv=split_csv, roi=config.roi, on_fault=on_fault)


def _of_split(config: DataConfig, root: Path, cases: list[Case]) -> list[Case]:
    """The pictures below the folder of ``data.split``, where the tree has folders train, val or test; else all.

    Raises:
        DataError: No picture lies there, or one image lies in two of the folders.
    """
    counts = Counter(case.split for case in cases)
    if set(counts) == {""}:
        return cases
    wanted = config.split.lower()
    chosen = [case for case in cases if case.split == wanted]
    if not chosen:
        raise DataError(
            f"No picture is of the split {wanted}.",
            where=f"{root}: {_say_counts(counts)}",
            fix=f"set data.split to one of these, move pictures to {root / wanted}, or name them in data.split_csv",
            code="split_empty",
        )
    refuse_copies({name: [case for case in cases if case.split == name] for name in counts if name})
    del counts[wanted]
    if counts:
        log.warning("%d pictures of the split %s are used; left out: %s", len(chosen), wanted, _say_counts(counts))
    return chosen


def _say_counts(counts: Counter[str]) -> str:
    return ", ".join(
        f"{count} {f'of {name}' if name else 'in no split folder'}" for name, count in sorted(counts.items())
    )


# --- sequences -------------------------------------------------------------------------------------------------------


def _with_sequences(config: DataConfig, root: Path, cases: list[Case], unreadable: list[Failure]) -> list[Case]:
    """The cases that have at least one of the sequences; the others are refused, or listed with ``on_error: skip``."""
    bare = [case for case in cases if not case.sequences]
    if not bare:
        return cases
    asked = ", ".join(config.mri_sequences)
    fix = "check data.mri_sequences and the file names, or leave these cases out"
    if len(bare) == len(cases) or config.on_error == "stop":
        raise DataError(
            f"{len(bare)} of {len(cases)} cases have none of the sequences asked for.",
            where=f"{root}: asked for {asked}; cases {say_some(case.case_id for case in bare)}",
            fix=fix,
            code="sequences_missing",
        )
    for case in bare:
        unreadable.append((case.case_id, str(root / case.case_id), f"none of the sequences {asked}", fix))
    return [case for case in cases if case.sequences]


def _in_place(config: DataConfig, cases: list[Case], unreadable: list[Failure]) -> list[Case]:
    """The cases whose headers agree; others are refused, all in one message, or listed with ``on_error: skip``."""
    faults, told = [], Counter[str]()
    for case in cases:
        findings = check_geometry(case)
        told.update(finding.code for finding in findings if finding.severity == "warning")
        faults += [finding for finding in findings if finding.severity == "error"][:1]
    for code, count in told.items():
        log.warning("%s: %d files; `medssl check-data` tells more", code, count)
    if faults and config.on_error == "stop":
        more = f"\nand {len(faults) - 10} more" if len(faults) > 10 else ""
        raise DataError(
            f"{len(faults)} of {len(cases)} cases have headers that contradict each other.",
            where="\n".join(f"case {f.case_id}: {f.path}: {f.message}" for f in faults[:10]) + more,
            fix=faults[0].fix or "convert these cases again, or leave them out",
            code=faults[0].code,
        )
    unreadable += [(f.case_id, f.path, f.message, f.fix) for f in faults]
    bad = {finding.case_id for finding in faults}
    return [case for case in cases if case.case_id not in bad]


def _tell_absent(cases: list[Case], names: tuple[str, ...]) -> None:
    """One line for each sequence that some cases lack; a sequence that no case has is refused.

    Raises:
        DataError: No case has it: its name is wrong.
    """
    absent = {name: [case.case_id for case in cases if name not in case.sequences] for name in names}
    unknown = [name for name, ids in absent.items() if cases and len(ids) == len(cases)]
    if unknown:
        raise DataError(
            f"No case has the sequence {' or '.join(unknown)}.",
            where=f"asked for {', '.join(names)}; {len(cases)} cases, e.g. {cases[0].case_id}",
            fix="correct or drop it in data.mri_sequences: it is the stem of the file, e.g. ax_adc for ax_adc.nii.gz",
            code="sequence_unknown",
        )
    for name, ids in absent.items():
        if ids:
            log.warning(
                "%s is absent in %d of %d cases: %s. Its tokens are masked there and are never a target.",
                name,
                len(ids),
                len(cases),
                say_some(ids),
            )


# --- leaks -----------------------------------------------------------------------------------------------------------


def _refuse_leak(root: Path, kind: Kind, split_csv: Path, config: DataConfig, cases: list[Case]) -> None:
    """Compare with the sibling lists that `medssl split` wrote beside the one in use.

    A list that holds something else is compared as far as it can be read: a sibling may name cases that were never
    copied to this disk.
    """
    if split_csv.stem not in SPLITS:
        return
    splits = {split_csv.stem: cases}
    for name in SPLITS:
        sibling = split_csv.with_name(f"{name}{split_csv.suffix}")
        if name != split_csv.stem and sibling.is_file():
            splits[name] = _sibling_cases(root, kind, sibling, config)
    check_no_overlap(splits)
    refuse_copies(splits)


def _sibling_cases(root: Path, kind: Kind, sibling: Path, config: DataConfig) -> list[Case]:
    if kind == "images":
        try:
            return read_image_cases(root, split_csv=sibling)
        except DataError:  # it names pictures that are not here
            return [Case(name, name) for name in read_ids(sibling).ids]
    owners = read_owners(root)
    cases = []
    for name in read_ids(sibling).ids:
        owner = owners.get(name)
        case = Case(name, owner.patient_id if owner and owner.patient_id else name)
        try:
            case = read_case(root, name, config.mri_sequences, roi=config.roi, owners=owners)
        except DataError as error:  # not here, or unreadable: its names still count
            log.debug("%s: %s is compared by its name alone: %s", sibling, name, error.what)
        cases.append(case)
    return cases
